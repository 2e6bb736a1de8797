"""Data sets by name, and what training does with their images on the device: order, augmentation, float."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from . import cifar, image_folder
from .dataset import IMAGE_SIZE, ImageDataset, Split, every_fifth_of_a_class

GREY = 128  # what a cut-out square is filled with


def load_dataset(name: str, data_dir: str | Path = "data") -> ImageDataset:
    """The data set `name`: "cifar10", "cifar100", "digits", or the path of a folder with a folder of images for each
    class.

    CIFAR is read from `data_dir` where it lies there and else downloaded to it; see `cifar.load_cifar`.

    Raises:
        ValueError, FileNotFoundError: an unknown name, or data that are missing, incomplete or corrupt.
    """
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
