"""Small trainings: a data set that is learned in seconds, a model with every kind of state, recipes."""

from __future__ import annotations

import torch
from torch import nn

from pruning_utils import l1, prune_
from quantization_utils import absmean_fitted, calibrate_, quantize_
from tests.networks import images, make
from train_test_utils.dataset import ImageDataset, Split
from train_test_utils.recipe import Recipe, adamw

CPU = torch.device("cpu")
PLAIN = Recipe(epochs=3, lr=0.05, batch_size=16)
RECIPES = {
    "sgd": PLAIN,
    "everything": Recipe(
        epochs=3, lr=1e-3, optimizer=adamw, batch_size=16, ema=0.8, cutout=8, label_smoothing=0.1, ramp=0.5,
        clip_norm=1.0, statistics_images=40,
    ),
}  # fmt: skip


def dataset(test_seed: int = 1) -> ImageDataset:
    """80 images of four classes that differ in brightness."""
    torch.manual_seed(4)
    labels = torch.arange(80) % 4
    pixels = (torch.rand(80, 3, 32, 32) * 60 + labels.view(-1, 1, 1, 1) * 60).to(torch.uint8)
    test = torch.randint(0, 256, (8, 3, 32, 32), generator=torch.Generator().manual_seed(test_seed), dtype=torch.uint8)
    return ImageDataset("bright", ("a", "b", "c", "d"), Split(pixels, labels), Split(test, torch.arange(8) % 4))


def model() -> nn.Module:
    """Quantized, calibrated and pruned: everything that has a state."""
    torch.manual_seed(5)
    return calibrate_(quantize_(prune_(make("alexnet_like"), l1, 0.3), absmean_fitted), images(16))


def linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 4))


def same(left: nn.Module, right: nn.Module) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
