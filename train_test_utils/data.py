"""Data sets as tensors: a whole set is one uint8 tensor on the device; batches are augmented there."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

IMAGE_SIZE = 32  # pixels a side, of every data set here
GREY = 128  # what a cut-out square is filled with


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

    def held_out(self, fraction: float, seed: int = 0) -> ImageDataset:
        """The training split alone, cut in two: a random `fraction` takes the place of the test split.

        For every choice (a learning rate, a method), so that the test split is left for measuring.

        Raises:
            ValueError: `fraction` leaves one of the two parts empty.
        """
        count = round(fraction * len(self.train))
        if not 0 < count < len(self.train):
            raise ValueError(
                f"a held-out fraction of {fraction:g} leaves no images to train or to measure with: choose 0.1, say"
            )
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed)).to(
            self.train.labels.device
        )
        return replace(
            self,
            name=f"{self.name}-heldout{fraction:g}",
            train=self.train[order[count:]],
            test=self.train[order[:count]],
        )


def load_dataset(name: str, data_dir: str | Path = "data") -> ImageDataset:
    """The data set `name`: "cifar10", "cifar100", "digits", or the path of a folder with a folder of images for each
    class.

    CIFAR is read from `data_dir` where it lies there and else downloaded to it; see `cifar.load_cifar`.

    Raises:
        ValueError, FileNotFoundError: an unknown name, or data that are missing, incomplete or corrupt.
    """
    from . import cifar, image_folder  # here, since each needs a library that the other data sets do without

    if name in cifar.SOURCES:
        return cifar.load_cifar(cifar.SOURCES[name], Path(data_dir))
    if name == "digits":
        return load_digits()
    if Path(name).is_dir():
        return image_folder.load_image_folder(Path(os.path.abspath(name)))  # "." has a name too
    raise ValueError(
        f"unknown data set {name!r}: choose {', '.join([*cifar.SOURCES, 'digits'])}, or a folder with a folder of "
        "images for each class"
    )


def load_digits() -> ImageDataset:
    """scikit-learn's 1,797 handwritten digits, 8×8 pixels in 17 greys, enlarged; every fifth image of a class is for
    testing.

    Reference: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.
    """
    from sklearn.datasets import load_digits as read_digits

    digits = read_digits()
    small = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    large = F.interpolate(small, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", align_corners=False)
    images = large.round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(digits.target).long()
    test = every_fifth_of_a_class(labels)
    everything = Split(images, labels)
    return ImageDataset("digits", tuple("0123456789"), everything[~test], everything[test], flip=False)


def every_fifth_of_a_class(labels: Tensor) -> Tensor:
    """A mask that is true for every fifth image of each class (for sets that come without a test split)."""
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        mask[(labels == label).nonzero()[4::5, 0]] = True
    return mask


def to_float(images: Tensor) -> Tensor:
    """uint8 (…) → float32 in [0, 1]."""
    return images.float() / 255


def epoch_order(count: int, seed: int, epoch: int, device: torch.device | str = "cpu") -> Tensor:
    """The order of `count` images in an epoch: a permutation that depends on (seed, epoch) alone, on any device."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator).to(device)


def augment(images: Tensor, *, crop_padding: int = 4, flip: bool = True, cutout: int = 0) -> Tensor:
    """Random crops, mirror images and blanked squares, each image its own; uint8 (B, C, H, W), put out in NHWC memory.

    A crop is a shift by up to `crop_padding` pixels, borders reflected; a square of `cutout` pixels a side has its
    centre anywhere in the image. Random numbers come from PyTorch's generator of the images' device.

    Reference: T. DeVries, G. W. Taylor, "Improved Regularization of CNNs with Cutout", arXiv 1708.04552.
    """
    count, _, height, width = images.shape
    device = images.device
    rows = torch.arange(height, device=device) + _shifts(count, crop_padding, device)
    columns = torch.arange(width, device=device) + _shifts(count, crop_padding, device)
    rows, columns = _reflected(rows, height), _reflected(columns, width)
    if flip:
        mirrored = torch.rand(count, 1, device=device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    which = torch.arange(count, device=device)[:, None, None]
    out = images[which, :, rows[:, :, None], columns[:, None, :]]  # (B, H, W, C): the indexed dimensions come first
    if cutout:
        inside_rows, inside_columns = (_in_square(count, size, cutout, device) for size in (height, width))
        out = out.masked_fill((inside_rows[:, :, None] & inside_columns[:, None, :])[..., None], GREY)
    return out.permute(0, 3, 1, 2)


def _shifts(count: int, padding: int, device: torch.device) -> Tensor:
    return torch.randint(-padding, padding + 1, (count, 1), device=device)


def _reflected(positions: Tensor, size: int) -> Tensor:
    positions = positions.abs()
    return torch.where(positions >= size, 2 * (size - 1) - positions, positions)


def _in_square(count: int, size: int, side: int, device: torch.device) -> Tensor:
    first = torch.randint(0, size, (count, 1), device=device) - side // 2
    positions = torch.arange(size, device=device)
    return (positions >= first) & (positions < first + side)


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
    if labels.min() < 0 or labels.max() >= classes:
        wrong = int(labels[(labels < 0) | (labels >= classes)][0])
        raise ValueError(f"the {which} split of {name} has the label {wrong}; labels go from 0 to {classes - 1}")
