"""How a model is trained: plain values, one frozen dataclass a recipe."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quantization_utils.bit_layers import StaticQuantizer

ParameterGroups = list[dict[str, Any]]


def sgd(groups: ParameterGroups, lr: float) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum 0.9."""
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True, fused=True)
    for parameter in (p for group in groups for p in group["params"]):
        # As the first step would make it, but for a first step that loss scaling skips: that leaves it uninitialised.
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def adamw(groups: ParameterGroups, lr: float) -> torch.optim.Optimizer:
    """AdamW, betas (0.9, 0.999). Reference: I. Loshchilov, F. Hutter, arXiv 1711.05101."""
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), fused=True)


@dataclass(frozen=True)
class Recipe:
    """A fixed schedule; the model of the last step is the result (never the best on anything).

    Learning rate: linear warm-up over the fraction `warmup` of the steps, then a half cosine to 0.
    """

    epochs: float  # with `--budget 1`
    lr: float  # peak, for the whole batch
    optimizer: Callable[[ParameterGroups, float], torch.optim.Optimizer] = sgd
    batch_size: int = 128
    weight_decay: float = 5e-4  # on matrices, kernels and embeddings; never on biases, norms and activation steps
    warmup: float = 0.1  # fraction of the steps
    label_smoothing: float = 0.0
    ema: float | None = None  # decay per step of the averaged weights that are the result; None: the last weights
    crop_padding: int = 4  # pixels of a random crop
    cutout: int = 0  # side in pixels of the square that is blanked, with budget 1 (see `cutout_at`)
    distill: float = 0.0  # share of the loss taken from the row's float parent
    temperature: float = 1.0  # of the distillation
    ramp: float = 0.0  # fraction of the steps over which weights go from float to quantized
    clip_norm: float | None = None  # largest gradient norm
    statistics_images: int = 0  # training images that batch norm's statistics are taken from at the end

    def __str__(self) -> str:
        ramped = f", {self.ramp:.0%} ramp" if self.ramp else ""
        distilled = f", {self.distill:.0%} distilled at T={self.temperature:g}" if self.distill else ""
        return f"{self.epochs:g} epochs{ramped}{distilled}"

    def steps(self, images: int, budget: float = 1.0) -> int:
        """Optimizer steps for a training split of `images`, scaled by `budget`; at least one."""
        return max(1, round(self.epochs * self.steps_per_epoch(images) * budget))

    def steps_per_epoch(self, images: int) -> int:
        """Whole batches in an epoch; the incomplete last one is left out (one batch if there are fewer images)."""
        return max(1, images // self.batch_size)

    def lr_at(self, step: int, steps: int) -> float:
        """Learning rate of optimizer step `step` = 0 … steps - 1."""
        warm = self.warmup * steps
        if step < warm:
            return self.lr * (step + 1) / (warm + 1)
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))

    def quantized_part_at(self, step: int, steps: int) -> float:
        """The ramp from float (0) to quantized (1) weights, in quarters, so that few compiled steps are built."""
        position = step / (self.ramp * steps) if self.ramp else 1.0
        return min(1.0, math.floor(4 * position) / 4)

    def cutout_at(self, budget: float) -> int:
        """Side of the blanked square, in pixels: with a `budget` below 1 its area shrinks in proportion.

        A blanked square keeps a long training from learning its images by heart, but a short one from learning them at
        all.
        """
        return round(self.cutout * min(1.0, budget) ** 0.5)

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer, with weight decay on tensors of two and more dimensions only."""
        decayed = [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]
        steps = [m.step for m in model.modules() if isinstance(m, StaticQuantizer)]  # of activations
        plain = [p for p in model.parameters() if p.requires_grad and p.dim() < 2 and all(p is not s for s in steps)]
        groups: ParameterGroups = [
            {"params": decayed, "weight_decay": self.weight_decay, "lr_factor": 1.0},
            {"params": plain, "weight_decay": 0.0, "lr_factor": 1.0},
            # A step is a scale of order 0.01: with the weights' learning rate it would jump.
            {"params": steps, "weight_decay": 0.0, "lr_factor": 0.01},
        ]
        return self.optimizer([g for g in groups if g["params"]], self.lr)
