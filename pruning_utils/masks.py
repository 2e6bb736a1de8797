"""Masks: what holds a pruned weight at exactly zero, and what decides which entries it holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from models.graph import remove_parametrization
from models.select import Selection, select_layers

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of an element
BLOCK = 2**17  # entries at a time, so that they stay in the cache


class _Masked(torch.autograd.Function):
    """where(mask, x, +0.0), for x and for its gradient. A product would leave -0.0, and NaN where x is NaN or infinite.

    On a CPU by blocks, as a bitwise and: PyTorch's `where` takes more than twice as long, and a training step does this
    twice to every weight.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        if x.device.type != "cpu" or x.itemsize not in INTEGERS or x.dim() == 0:
            return torch.where(mask, x, 0.0)
        out, bits = torch.empty_like(x), INTEGERS[x.itemsize]
        length = max(1, BLOCK * len(x) // max(1, x.numel()))
        for x_B, mask_B, out_B in zip(*(t.split(length) for t in (x, mask, out)), strict=True):
            torch.bitwise_and(x_B.view(bits), mask_B.to(bits).neg_(), out=out_B.view(bits))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _Masked.apply(grad, *ctx.saved_tensors), None


class Mask(nn.Module):
    """A parametrization (`torch.nn.utils.parametrize`) that keeps the entries where `mask` is true; the rest is 0.0.

    The optimizer steps the parameter behind the mask. Pruned entries get no gradient, and whatever momentum and weight
    decay make of them, the tensor that the layer sees stays zero there. The mask is a buffer: it is saved with the
    model, moves with it, and is copied by `deepcopy`.
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        """`mask`: bool, the shape of the tensor it is put on."""
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, tensor: Tensor) -> Tensor:
        return _Masked.apply(tensor, self.mask)

    def right_inverse(self, tensor: Tensor) -> Tensor:
        """What the parameter becomes when the tensor is assigned: pruned entries are zero behind the mask as well."""
        return self.forward(tensor)

    def extra_repr(self) -> str:
        return f"{int((~self.mask).sum())} of {self.mask.numel()} pruned"


def choose_kept(keys: tuple[Tensor, ...], removed: int) -> Tensor:
    """Return a bool mask, shape of the keys, with exactly `removed` entries false: the smallest.

    Entries are ordered by the first key; equal ones by the second, and so on; those equal in all keys by position, the
    first goes first. So the choice is exact and the same everywhere, however many ties there are (ternary weights have
    only two magnitudes). Selection, not sorting: linear in the number of entries.
    """
    flat_keys = [key.flatten() for key in keys]
    gone = torch.zeros_like(flat_keys[0], dtype=torch.bool)
    tied = torch.ones_like(gone)
    left = removed
    candidates = len(gone)
    for key in flat_keys:
        if left == 0 or left == candidates:
            break
        values = key if candidates == len(gone) else key[tied]
        threshold = values.kthvalue(left).values
        below = tied & (key < threshold)
        gone |= below
        tied &= key == threshold
        left, candidates = left - int(below.count_nonzero()), int(tied.count_nonzero())
    gone[tied.nonzero().flatten()[:left]] = True
    return ~gone.view_as(keys[0])


def apply_mask_(module: nn.Module, tensor_name: str, mask: Tensor) -> None:
    """Hold a module's tensor at zero where `mask` (bool, its shape) is false, besides where a mask already does."""
    existing = mask_of(module, tensor_name)
    if existing is None:
        parametrize.register_parametrization(module, tensor_name, Mask(mask.clone()))
        return
    existing.mask &= mask
    if all(hasattr(p, "right_inverse") for p in module.parametrizations[tensor_name]):  # type: ignore[index, union-attr]
        setattr(module, tensor_name, getattr(module, tensor_name))  # zero behind the mask too


def mask_of(module: nn.Module, tensor_name: str = "weight") -> Mask | None:
    """The mask on a module's tensor, or None."""
    if not parametrize.is_parametrized(module, tensor_name):
        return None
    parametrizations = module.parametrizations[tensor_name]  # type: ignore[index, union-attr]
    return next((p for p in parametrizations if isinstance(p, Mask)), None)


def strip_masks_(model: nn.Module) -> nn.Module:
    """Take all masks off, in place; return the model. Pruned entries stay zero, until something trains them.

    Tensors that have parametrizations of other kinds, too, keep all of them, masks included.
    """
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            for name, parametrizations in list(module.parametrizations.items()):  # type: ignore[union-attr, operator]
                if all(isinstance(p, Mask) for p in parametrizations):
                    remove_parametrization(module, name)
    return model


def effective_weight(layer: nn.Module) -> Tensor:
    """The weight a layer computes with, detached: of a ternary layer codes · scale, of any other its weight."""
    weight = layer.effective_weight() if hasattr(layer, "effective_weight") else layer.weight  # type: ignore[operator]
    return weight.detach()  # type: ignore[union-attr, operator, return-value]


def zero_fraction(model: nn.Module, only: Selection = None) -> float:
    """The fraction of exact zeros among the weights of linear and convolution layers; a zero code is one.

    `only`: which layers (`models.select.select_layers`).

    Raises:
        ValueError: no layer is chosen.
    """
    weights = [effective_weight(layer) for _, layer in select_layers(model, only)]
    if not weights:
        raise ValueError(f"no linear or convolution layer matches only={only!r}")
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
