"""Transformations that need more than the weights: they look at calibration images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from models.select import Selection
from quantization_utils import absmean_fitted, calibrate_, quantize_
from quantization_utils.bit_layers import BitConv2d, BitLinear, fixed_weights
from quantization_utils.post_training import DEFAULT, Settings, ternarize_
from quantization_utils.post_training.reconstruction import DEFAULT as DEFAULT_RECONSTRUCTION
from quantization_utils.post_training.reconstruction import Reconstruction
from quantization_utils.quantizers import Quantizer, as_is

from .rows import CALIBRATION_IMAGES, Ternary, selected

BATCH = 128  # images in a batch, where batch norm's statistics are estimated


@dataclass(frozen=True)
class TernaryStart(Ternary):
    """`Ternary` as the place where quantization-aware training starts.

    Before activations get their scales, batch norm's statistics are estimated anew, under the ternary weights. With the
    float network's statistics activations shrink from layer to layer, and get scales that are too small: training
    normalizes by its batches' own statistics, so most of what it sees in the last layers would be clipped, without a
    gradient.
    """

    def __call__(self, model: nn.Module, images: Tensor, seed: int) -> nn.Module:
        quantize_(model, self.quantizer, self.act_bits, self.only, self.keep)
        torch.manual_seed(seed)  # dropout
        with fixed_weights(model):
            update_bn(images.tensor_split(max(1, len(images) // BATCH)), model)
        return model if self.act_bits is None else calibrate_(model, images)

    def structure(self, model: nn.Module, images: Tensor, seed: int) -> nn.Module:
        """The modules that a call makes, with other values: for weights that will be loaded."""
        return super().__call__(model, images[:2], seed)

    def __str__(self) -> str:
        return f"{super().__str__()}, batch norm estimated anew"


@dataclass(frozen=True)
class CalibratedTernary:
    """Make layers ternary without training, from unlabelled images; see `ternarize_`."""

    settings: Settings = DEFAULT
    act_bits: int | None = None
    only: Selection = None
    keep: Sequence[str] = ()
    images: int = CALIBRATION_IMAGES

    def __call__(self, model: nn.Module, images: Tensor, seed: int) -> nn.Module:
        return ternarize_(model, images, self.settings, self.act_bits, self.only, self.keep)

    def structure(self, model: nn.Module, images: Tensor, seed: int) -> nn.Module:
        """The modules that a call makes, with other values: for weights that will be loaded."""
        quantize_(model, as_is, self.act_bits, self.only, self.keep)
        return model if self.act_bits is None else calibrate_(model, images[:2])

    def __str__(self) -> str:
        acts = "float activations" if self.act_bits is None else f"{self.act_bits}-bit activations"
        which = "" if self.only is None and not self.keep else f"{selected(self.only, self.keep)}, "
        more = f"from {self.images:,} images, " if self.images != CALIBRATION_IMAGES else ""
        return f"ternary by {self.settings} ({which}{more}{acts})"


@dataclass(frozen=True)
class ReconstructedTernary(CalibratedTernary):
    """`CalibratedTernary`, and the rounding of every block learned further: minutes more, still without labels."""

    reconstruction: Reconstruction = DEFAULT_RECONSTRUCTION

    def __call__(self, model: nn.Module, images: Tensor, seed: int) -> nn.Module:
        return ternarize_(
            model, images, self.settings, self.act_bits, self.only, self.keep, reconstruction=self.reconstruction
        )

    def __str__(self) -> str:
        return super().__str__().replace(" (", ", blocks reconstructed (", 1)


@dataclass(frozen=True)
class CalibratedStart(CalibratedTernary):
    """`CalibratedTernary` as the place where quantization-aware training starts, instead of the nearest codes.

    The float weights that are trained begin as the ternary ones, scale · code; `quantizer` maps them to the same codes.
    """

    quantizer: Quantizer = absmean_fitted

    def __call__(self, model: nn.Module, images: Tensor, seed: int) -> nn.Module:
        return self._trainable(super().__call__(model, images, seed))

    def structure(self, model: nn.Module, images: Tensor, seed: int) -> nn.Module:
        return self._trainable(super().structure(model, images, seed))

    def _trainable(self, model: nn.Module) -> nn.Module:
        for layer in model.modules():
            if isinstance(layer, (BitLinear, BitConv2d)) and layer.quantizer is as_is:
                layer.quantizer = self.quantizer
        return model

    def __str__(self) -> str:
        return f"{super().__str__()}, then {self.quantizer.__name__}"
