"""Scales in half the bytes, where hardly a class changes."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from models.state import device_of, evaluating

from .bit_layers import PackedConv2d, PackedLinear

PACKED = (PackedLinear, PackedConv2d)
MAX_CHANGED = 0.0005  # share of images whose class may change
IMAGES = 512  # that many are looked at
BATCH = 256  # images in one call of the model
STRETCH = 32  # they are too few to see that share, so logits are moved this much further
WORTH_HALVING = 32  # numbers: for fewer, the note in the file that they are float32 takes more than half of them saves
MAX_RELATIVE_ERROR = 2**-10  # float16 rounds by at most 2^-11 unless a value is too small or too large for it


@torch.no_grad()
def with_float16_scales(model: nn.Module, images: Tensor) -> nn.Module:
    """Return a copy of a packed model whose scales and biases are float16 numbers, in float32 tensors.

    Both are tried at once, then scales alone and biases alone. What changes the classes of too many `images`
    (B, 3, H, W), of which the first `IMAGES` are looked at, stays as it was: near zero their number grows in proportion
    to how far logits move, so `MAX_CHANGED` is held if at most `STRETCH` times that share changes when logits move
    `STRETCH` times as far. Codes are shared with the model, which is not changed. A model without packed layers is
    returned as it is; a `PackedNetwork`, too, whose next activations are rounded at other places if a gain is another
    by a hair.
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
