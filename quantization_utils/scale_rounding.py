"""Scales and biases rounded to float16, half the bytes, where that changes the class of next to no image."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from models.state import device_of, evaluating

from .bit_layers import PackedConv2d, PackedLinear

PACKED = (PackedLinear, PackedConv2d)
MAX_CHANGED = 0.0002  # share of images whose class may change; of images not trained on, up to twice as many do
IMAGES = 512  # looked at, at most
BATCH = 256  # images in one call of the model
STRETCH = 32  # so many images are too few to see that share, so logits are moved this many times as far
WORTH_HALVING = 32  # numbers: with fewer, the note in the file that they were float32 takes more bytes than are saved
MAX_RELATIVE_ERROR = 2**-10  # float16 rounds by at most 2^-11 unless a value is too small or too large for it


@torch.no_grad()
def with_float16_scales(model: nn.Module, images: Tensor) -> nn.Module:
    """Return a copy of a packed model whose scales and biases are float16 numbers, in float32 tensors.

    Both are tried at once, then scales alone, then biases alone; what changes the class of too many `images`
    (B, 3, H, W) stays as it was. For small moves of the logits the share of changed classes is proportional to the
    move. So at most `MAX_CHANGED` change if at most `STRETCH` times that share does when logits move `STRETCH` times as
    far. Codes are shared with the model, which is not changed. A model without packed layers is returned as it is, and
    so is a `PackedNetwork`: there a gain that differs in its last digits rounds activations to other codes.
    """
    if not any(isinstance(m, PACKED) for m in model.modules()):
        return model
    images = images[:IMAGES]
    logits = _logits(model, images)
    for names in (("scale", "bias"), ("scale",), ("bias",)):
        candidate = _rounded(model, names)
        moved = logits + STRETCH * (_logits(candidate, images) - logits)
        changed = (moved.argmax(1) != logits.argmax(1)).double().mean().item()
        if changed <= STRETCH * MAX_CHANGED:
            return candidate
    return model


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    with evaluating(model):
        return torch.cat([model(batch.to(device_of(model))) for batch in images.split(BATCH)])


def _rounded(model: nn.Module, names: tuple[str, ...]) -> nn.Module:
    """A copy with the named tensors of its packed layers rounded."""
    layers = [m for m in model.modules() if isinstance(m, PACKED)]
    new = copy.deepcopy(model, {id(layer.codes): layer.codes for layer in layers})  # the large part is shared
    for layer in new.modules():
        if isinstance(layer, PACKED):
            for name in names:
                setattr(layer, name, _round(getattr(layer, name), name))
    return new


def _round(tensor: Tensor | None, name: str) -> Tensor | None:
    if tensor is None or tensor.numel() < WORTH_HALVING:
        return tensor
    rounded = tensor.half().float()
    good = bool(rounded.isfinite().all())
    if name != "bias":  # a bias near zero may lose its last digits; a scale may not
        good = good and bool(((rounded - tensor).abs() <= MAX_RELATIVE_ERROR * tensor.abs()).all())
    return rounded if good else tensor
