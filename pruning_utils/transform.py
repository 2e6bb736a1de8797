"""`prune_`: hold the least important weights, or whole filters, of a model at exactly zero."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from models.select import Selection, select_layers

from .masks import apply_mask_, choose_kept, effective_weight
from .scores import Score
from .structured import batch_norms_behind, mask_filters_, without_classifier


@torch.inference_mode(False)  # masks that are made there could not take part in training
def prune_(
    model: nn.Module,
    score: Score,
    amount: float,
    granularity: str | None = None,
    scope: str | None = None,
    only: Selection = None,
    seed: int = 0,
) -> nn.Module:
    """Hold the `amount` least important weights or filters at zero, in place; return the model.

    After it, round(amount · n) of the n weights (filters) of each layer are zero, exactly, whatever ties there are;
    with `scope="global"`, of all layers together. Weights that are exactly zero before count, and go first: 30% and
    then 50% makes 50%; pruning less than is pruned already changes nothing. Ties go by |w|, then by position.

    Filters: the bias and, in a model that can be traced, the affine batch norm behind the layer are masked too, so that
    the channel is zero and can be removed (`structured.py` says where it is not). The last layer's filters, which are
    the classes, and at least one of every layer stay.

    Quantized layers (`BitLinear`, `BitConv2d`) are scored by the weights they compute with, codes · scale. A zero code
    is the least of all magnitudes, so `l1` takes those first, in the order of the float weights behind them; `random`
    takes any. `amount` counts the weights that the mask holds at zero; zero codes among the others come on top. The
    layer goes on quantizing: its quantizer sees the weights that are left and fits scale and codes to them, as in
    training. With `mse_optimal`, `l1` changes no code and no scale as long as it finds zero codes to take; the absmean
    family has a threshold that rises with the mean of the weights left, and may set further codes to zero.

    `score`: a function of `scores.py` or your own. `amount`: a fraction in [0, 1). `granularity`: "weight" or "filter",
    `scope`: "layer" or "global"; by default as the score says (`l2_filters`: filters; `l1_global`: global), else single
    weights within their layer. `only`: which layers (`models.select.select_layers`). `seed`: for `random`.

    Raises:
        ValueError: an amount outside [0, 1), an unknown granularity or scope, a score that does not fit them, weights
            or scores that are not finite (the model has diverged), a weight that is no parameter (`weight_norm`) or
            another layer's too, or no layer to prune; the model is as it was.
    """
    granularity, scope = _meaning(score, granularity, scope)
    if not isinstance(amount, Real) or not 0 <= amount < 1:
        raise ValueError(f"the amount to prune is a fraction in [0, 1), 0.3 for 30%, not {amount!r}")
    layers = select_layers(model, only)
    if granularity == "filter":
        layers = without_classifier(model, layers)
    if not layers:
        kept_out = " other than the classifier, whose filters are the classes," if granularity == "filter" else ""
        raise ValueError(f"no linear or convolution layer{kept_out} matches only={only!r}: nothing to prune")
    for name, layer in layers:
        if (weight := _parameter_of(layer)) is None:
            raise ValueError(f"{name} computes its weight anew in every pass (weight_norm, torch.nn.utils.prune): make "
                             "it a parameter first (remove_parametrizations, torch.nn.utils.prune.remove)")  # fmt: skip
        if _holders(model, weight) > 1:
            raise ValueError(f"{name} shares its weight with another layer, which a mask can't tell from it: give it "
                             "a copy, or leave it out (only)")  # fmt: skip

    generator = torch.Generator().manual_seed(seed)
    keys = [_keys(name, layer, score, granularity, generator) for name, layer in layers]
    if scope == "layer":
        kept = [choose_kept(k, _count(amount, [k])) for k in keys]
    else:
        joined = tuple(torch.cat([k[i].flatten() for k in keys]) for i in range(2))
        parts = choose_kept(joined, _count(amount, keys)).split([k[0].numel() for k in keys])
        kept = [part.view_as(k[0]) for part, k in zip(parts, keys, strict=True)]

    batch_norms = batch_norms_behind(model) if granularity == "filter" else {}
    for (name, layer), mask in zip(layers, kept, strict=True):
        if granularity == "filter":
            mask_filters_(layer, mask, batch_norms.get(name, []))
        else:
            apply_mask_(layer, "weight", mask)
    return model


def _meaning(score: Any, granularity: str | None, scope: str | None) -> tuple[str, str]:
    if not callable(score):
        raise ValueError(f"a score is a function such as pruning_utils.l1, not {score!r}")
    made_for = getattr(score, "granularity", "weight")
    granularity = granularity or made_for
    scope = scope or getattr(score, "scope", "layer")
    if granularity not in ("weight", "filter"):
        raise ValueError(f"unknown granularity {granularity!r}: choose weight or filter")
    if scope not in ("layer", "global"):
        raise ValueError(f"unknown scope {scope!r}: choose layer or global")
    if made_for == "filter" and granularity == "weight":
        raise ValueError(f"{score.__name__} scores filters: leave granularity out, or take another score")
    return granularity, scope


def _parameter_of(layer: nn.Module) -> nn.Parameter | None:
    """The parameter that is a layer's weight, masked or not, or None: a weight that is computed from several."""
    own = dict(layer.named_parameters())
    return own.get("weight", own.get("parametrizations.weight.original"))


def _holders(model: nn.Module, weight: nn.Parameter) -> int:
    """How many modules have a parameter."""
    return sum(any(p is weight for p in module.parameters(recurse=False)) for module in model.modules())


def _keys(
    name: str, layer: nn.Module, score: Score, granularity: str, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(importance, |w|) of each weight or filter of a layer, by which `choose_kept` orders them.

    The importance of what is zero already is -∞, and that of what must stay is +∞.
    """
    weight: Tensor = layer.weight.detach()  # type: ignore[assignment, operator]
    arguments = (generator,) if getattr(score, "seeded", False) else ()
    importance = score(effective_weight(layer), *arguments)
    if not isinstance(importance, Tensor):
        raise ValueError(f"the score of {name} is a {type(importance).__name__}: it should be a tensor")
    importance = importance.to(weight.device).float()
    magnitude = weight.abs().float()
    pruned = weight == 0
    if granularity == "filter":
        importance = importance.flatten(1).sum(1) if importance.shape == weight.shape else importance
        magnitude, pruned = magnitude.flatten(1).sum(1), pruned.flatten(1).all(1)
    if importance.shape != magnitude.shape:
        is_of_filters = importance.shape == weight.shape[:1]
        raise ValueError(
            f"the score of {name} has shape {tuple(importance.shape)}: it should be {tuple(magnitude.shape)}"
            + is_of_filters * ", or be marked as one of filters: @scoring(granularity='filter')"
        )
    if not (weight.isfinite().all() and importance.isfinite().all()):
        raise ValueError(f"{name} has weights or importances that are not finite: was it trained to the end?")
    importance = importance.masked_fill(pruned, -torch.inf)
    if granularity == "filter":
        importance[importance.argmax()] = torch.inf  # a layer without a filter would cut the network
    return importance, magnitude


def _count(amount: float, keys: list[tuple[Tensor, Tensor]]) -> int:
    """How many entries go: round(amount · n), at least those that are gone already, at most those that may go."""
    total = sum(importance.numel() for importance, _ in keys)
    gone = sum(int((importance == -torch.inf).count_nonzero()) for importance, _ in keys)
    protected = sum(int((importance == torch.inf).count_nonzero()) for importance, _ in keys)
    return min(max(round(amount * total), gone), total - protected)
