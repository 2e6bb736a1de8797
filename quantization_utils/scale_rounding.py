"""Scales in half the bytes, where hardly a class changes."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from .bit_layers import PackedConv2d, PackedLinear
from .network import PackedNetwork

MAX_CHANGED = 0.0005  # share of images whose class may change
STRETCH = 32  # a thousand images are too few to see that share, so logits are moved this much further
MAX_RELATIVE_ERROR = 2**-10  # float16 rounds by at most 2^-11 unless a value is too small or too large for it


@torch.no_grad()
def with_float16_scales(model: nn.Module, images: Tensor, batch_size: int = 256) -> nn.Module:
    """Return a copy of a packed model whose scales, gains and biases are float16 numbers, in float32 tensors.

    All are tried at once, then scales alone and biases alone. What changes the classes of too many `images`
    (B, 3, H, W) stays as it was: near zero their number grows in proportion to how far logits move, so `MAX_CHANGED`
    is held if at most `STRETCH` times that share changes when logits move `STRETCH` times as far. Codes are shared with
    the model, which is not changed. A model without packed layers is returned as it is.
    """
    logits = _logits(model, images, batch_size)
    for names in (("scale", "gain", "bias"), ("scale", "gain"), ("bias",)):
        candidate, rounded = _rounded(model, names)
        if rounded:
            moved = logits + STRETCH * (_logits(candidate, images, batch_size) - logits)
            changed = (moved.argmax(1) != logits.argmax(1)).double().mean().item()
            if changed <= STRETCH * MAX_CHANGED:
                return candidate
    return model


def _logits(model: nn.Module, images: Tensor, batch_size: int) -> Tensor:
    was_training = model.training
    model.eval()
    logits = torch.cat([model(batch) for batch in images.split(batch_size)])
    model.train(was_training)
    return logits


def _rounded(model: nn.Module, names: tuple[str, ...]) -> tuple[nn.Module, bool]:
    """A copy with the named tensors of its packed layers rounded, and whether anything was."""
    if isinstance(model, PackedNetwork):
        nodes = [replace(node) for node in model.nodes]
        for node in nodes:
            for name in set(names) - {"scale"}:
                setattr(node, name, _round(getattr(node, name), name))
        return PackedNetwork(nodes, model.constructor, model.backend, model.image_shape), True
    layers = [m for m in model.modules() if isinstance(m, (PackedLinear, PackedConv2d))]
    if not layers:
        return model, False
    memo = {id(tensor): tensor for layer in layers for tensor in [layer.codes]}  # the large part is shared, not copied
    new = copy.deepcopy(model, memo)
    for layer in new.modules():
        if isinstance(layer, (PackedLinear, PackedConv2d)):
            for name in names:
                if name != "gain":
                    setattr(layer, name, _round(getattr(layer, name), name))
    return new, True


def _round(tensor: Tensor | None, name: str) -> Tensor | None:
    if tensor is None:
        return None
    rounded = tensor.half().float()
    good = bool(rounded.isfinite().all())
    if name != "bias":  # a bias near zero may lose its last digits; a scale may not
        good = good and bool(((rounded - tensor).abs() <= MAX_RELATIVE_ERROR * tensor.abs()).all())
    return rounded if good else tensor
