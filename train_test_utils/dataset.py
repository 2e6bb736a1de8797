"""A data set as tensors: all of it is one uint8 tensor on the device, checked when it is made."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

IMAGE_SIZE = 32  # pixels a side, of every data set here


@dataclass(frozen=True)
class Split:
    """Images uint8 (N, 3, H, W) and labels int64 (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Split:
        return Split(self.images.to(device), self.labels.to(device))

    def __getitem__(self, chosen: Tensor) -> Split:
        return Split(self.images[chosen], self.labels[chosen])


@dataclass(frozen=True)
class ImageDataset:
    """A data set of images; `test` is read only to measure."""

    name: str
    class_names: tuple[str, ...]
    train: Split
    test: Split
    flip: bool = True  # whether a mirrored image keeps its class

    def __post_init__(self) -> None:
        for which, split in (("training", self.train), ("test", self.test)):
            _check(self.name, which, split, len(self.class_names))

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the images and labels of both splits, in order."""
        digest = hashlib.sha256()
        for tensor in (self.train.images, self.train.labels, self.test.images, self.test.labels):
            digest.update(tensor.cpu().contiguous().numpy())
        return digest.hexdigest()[:16]

    def to(self, device: torch.device | str) -> ImageDataset:
        return replace(self, train=self.train.to(device), test=self.test.to(device))

    def held_out(self, fraction: float) -> ImageDataset:
        """The training split alone, cut in two: a random `fraction`, always the same, is in the test split's place.

        For every choice (a learning rate, a method), so that the test split is left for measuring.

        Raises:
            ValueError: `fraction` leaves one of the two parts empty.
        """
        count = round(fraction * len(self.train))
        if not 0 < count < len(self.train):
            raise ValueError(
                f"a held-out fraction of {fraction:g} leaves no images to train or to measure with: choose 0.1, say"
            )
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(0)).to(self.train.labels.device)
        return replace(
            self,
            name=f"{self.name}-heldout{fraction:g}",
            train=self.train[order[count:]],
            test=self.train[order[:count]],
        )


def every_fifth_of_a_class(labels: Tensor) -> Tensor:
    """A mask that is true for every fifth image of each class (for sets that come without a test split)."""
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        mask[(labels == label).nonzero()[4::5, 0]] = True
    return mask


def _check(name: str, which: str, split: Split, classes: int) -> None:
    images, labels = split.images, split.labels
    if classes < 2:
        raise ValueError(f"{name} has {classes} class: at least two are needed to tell apart")
    if len(images) == 0 or len(images) != len(labels):
        raise ValueError(f"the {which} split of {name} has {len(images)} images and {len(labels)} labels")
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(
            f"the {which} images of {name} are {images.dtype} {tuple(images.shape)}, not uint8 (N, 3, H, W)"
        )
    if labels.dtype != torch.int64:
        raise ValueError(f"the {which} labels of {name} are {labels.dtype}, not int64")
    if labels.min() < 0 or labels.max() >= classes:
        wrong = int(labels[(labels < 0) | (labels >= classes)][0])
        raise ValueError(f"the {which} split of {name} has the label {wrong}; labels go from 0 to {classes - 1}")
