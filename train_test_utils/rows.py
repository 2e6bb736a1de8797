"""What a table is made of: rows, and the transformations that a row applies to its parent."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from os.path import isdir
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models import build
from models.select import Selection
from pruning_utils import prune_
from quantization_utils import absmean_fitted, calibrate_, quantize_
from quantization_utils.quantizers import Quantizer, int8_absmax

from .data import to_float
from .recipe import Recipe, sgd

CALIBRATION_IMAGES = 1024
QUICK_BATCH = 64  # images: of the digits 1,438 are for training
Transform = Callable[[nn.Module, Tensor, int], nn.Module]  # (model, unlabelled images float (B, 3, H, W), seed)


@dataclass(frozen=True)
class Ternary:
    """Make layers ternary, or with `int8_absmax` 8-bit; see `quantize_`. Layers quantized before stay as they are."""

    quantizer: Quantizer = absmean_fitted
    act_bits: int | None = None
    only: Selection = None
    keep: Sequence[str] = ()

    def __call__(self, model: nn.Module, images: Tensor, seed: int) -> nn.Module:
        quantize_(model, self.quantizer, self.act_bits, self.only, self.keep)
        return model if self.act_bits is None else calibrate_(model, images)

    def __str__(self) -> str:
        which = selected(self.only, self.keep)
        acts = "float activations" if self.act_bits is None else f"{self.act_bits}-bit activations"
        kind = "8-bit" if self.quantizer is int8_absmax else "ternary"
        return f"{kind} {self.quantizer.__name__} ({which}, {acts})"


@dataclass(frozen=True)
class Prune:
    """Prune layers; see `prune_`. The score says whether single weights or filters go."""

    score: Any
    amount: float
    only: Selection = None

    def __call__(self, model: nn.Module, images: Tensor, seed: int) -> nn.Module:
        return prune_(model, self.score, self.amount, only=self.only, seed=seed)

    def __str__(self) -> str:
        what = "filters" if getattr(self.score, "granularity", "weight") == "filter" else "single weights"
        where = selected(self.only)
        return f"{100 * self.amount:g}% of {what} of {where} by {self.score.__name__}"


@dataclass(frozen=True)
class Reinitialize:
    """Forget the parent's weights, to see what starting from them is worth."""

    def __call__(self, model: nn.Module, images: Tensor, seed: int) -> nn.Module:
        constructor: Any = model.constructor
        torch.manual_seed(seed)
        fresh = build(constructor["name"], constructor["num_classes"], **constructor["options"])
        return fresh.to(images.device).eval()

    def __str__(self) -> str:
        return "weights drawn anew"


@dataclass(frozen=True)
class Row:
    """One line of a table: where it starts, what is done to it, how it is trained then (None: not at all)."""

    name: str
    parent: str | None
    transforms: Sequence[Transform]
    recipe: Recipe | None


def choose(rows: Sequence[Row], patterns: Sequence[str] | None) -> list[Row]:
    """The rows whose names match any of the patterns (as a shell matches names), with the parents they need, in order.

    Raises:
        ValueError: a pattern that matches no row, two rows of one name, a row that starts from none that stands before
            it, or one that transforms what was never trained.
    """
    for index, row in enumerate(rows):
        if any(row.name == before.name for before in rows[:index]):
            raise ValueError(f"two rows are called {row.name}: give each a name of its own")
        if row.parent is None and row.transforms:  # the float model that it would be held against is itself
            raise ValueError(f"{row.name} has transformations and starts from no row: name the float row that it "
                             "starts from (with Reinitialize() first, for weights that are drawn anew)")  # fmt: skip
        if row.parent is not None and all(row.parent != before.name for before in rows[:index]):
            raise ValueError(f"{row.name} starts from {row.parent!r}, which is no row before it")
    if not patterns:
        return list(rows)
    for pattern in patterns:
        if not any(is_named(row, [pattern]) for row in rows):
            raise ValueError(f"no row matches {pattern!r}: --list shows the rows")
    wanted = {row.name for row in rows if is_named(row, patterns)}
    for row in reversed(rows):  # parents stand before their children
        if row.name in wanted and row.parent is not None:
            wanted.add(row.parent)
    return [row for row in rows if row.name in wanted]


def in_small_batches(row: Row) -> Row:
    """The row with batches of `QUICK_BATCH`, so that a small data set makes more steps, and a learning rate to match.

    It is proportional to the batch for SGD (P. Goyal et al., arXiv 1706.02677), to its square root for
    Adam (S. Malladi et al., arXiv 2205.10287).
    """
    if row.recipe is None or row.recipe.batch_size <= QUICK_BATCH:
        return row
    smaller = QUICK_BATCH / row.recipe.batch_size
    lr = row.recipe.lr * (smaller if row.recipe.optimizer is sgd else smaller**0.5)
    return replace(row, recipe=replace(row.recipe, batch_size=QUICK_BATCH, lr=lr))


def is_named(row: Row, patterns: Sequence[str] | None) -> bool:
    """Whether a pattern matches the row's own name, or there are no patterns; not as the parent of another."""
    return not patterns or any(fnmatchcase(row.name, pattern) for pattern in patterns)


def describe(value: Any) -> Any:
    """A JSON value for a row, recipe or transformation: functions and classes by name, dataclasses by field.

    Raises:
        ValueError: a function without a name of its own (a lambda, or one made by another function), so that another
            could not be told from it.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {"kind": type(value).__name__} | {f.name: describe(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, (list, tuple)):
        return [describe(v) for v in value]
    if isinstance(value, dict):
        return {k: describe(v) for k, v in value.items()}
    if callable(value):
        if getattr(value, "__name__", "<lambda>") == "<lambda>" or "<locals>" in value.__qualname__:
            raise ValueError(f"{value} has no name of its own to tell it by in a row's configuration: define it at the "
                             "top of a file, or make it a frozen dataclass with __call__")  # fmt: skip
        return value.__name__
    return value


def config_hash(config: dict[str, Any]) -> str:
    """16 hexadecimal digits that change when anything in a row's configuration does."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def folder_hashes(options: dict[str, Any]) -> dict[str, str]:
    """Of a checkpoint that is a folder: a hash over its files' names and contents."""
    folder = options.get("checkpoint")
    return {"checkpoint": _hash_of_folder(folder)} if isinstance(folder, str) and isdir(folder) else {}


@cache
def _hash_of_folder(folder: str) -> str:
    digest = hashlib.sha256()
    for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder)}\n".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def transformed(
    row: Row, model: nn.Module, train_images: Tensor, seed: int, structure_only: bool = False
) -> nn.Module:
    """What the row's transformations make of its parent's model, on the device of the training images (uint8).

    `structure_only`: the weights will be loaded or do not matter, so transformations that have a `structure` method do
    only that.
    """
    model = model.to(train_images.device).eval()
    for transform in row.transforms:
        images = calibration_images(train_images, seed, getattr(transform, "images", CALIBRATION_IMAGES))
        transform = getattr(transform, "structure", transform) if structure_only else transform
        model = transform(model, images, seed)
    return model


def pruned_text(row: Row) -> str:
    """What a row prunes, in words; empty if nothing."""
    return "; ".join(str(t) for t in row.transforms if isinstance(t, Prune))


def format_rows(model_name: str, rows: Sequence[Row], budget: float = 1.0) -> str:
    """The table of rows for `--list`."""
    lines = [f"{model_name}: {len(rows)} rows", f"{'row':<34} {'starts from':<15} {'trained':<31} transformed by"]
    for row in rows:
        transforms = " → ".join(str(t) for t in row.transforms) or "-"
        lines.append(f"{row.name:<34} {row.parent or '-':<15} {row.recipe or '-'!s:<31} {transforms}")
    epochs = budget * sum(row.recipe.epochs for row in rows if row.recipe)
    of_budget = f" of budget {budget:g}" if budget != 1 else ""
    lines.append(f"{epochs:g} epochs in all{of_budget}, for a data set and a seed")
    return "\n".join(lines)


def selected(only: Selection, keep: Sequence[str] = ()) -> str:
    """Which layers, in words: "all layers", "convolutions without 0 and 3"."""
    chosen = (only,) if isinstance(only, (type, str)) or only is None else tuple(only)
    words = {None: "all layers", nn.Linear: "linear layers", nn.Conv2d: "convolutions"}
    which = " and ".join(words.get(c, getattr(c, "__name__", str(c))) for c in chosen)  # type: ignore[call-overload]
    return f"{which} without {' and '.join(keep)}" if keep else which


def calibration_images(images_u8: Tensor, seed: int, count: int = CALIBRATION_IMAGES) -> Tensor:
    """`count` unlabelled images of the training split, float32 in [0, 1], the same for a given seed."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(images_u8), generator=generator)[:count]
    return to_float(images_u8[chosen.to(images_u8.device)])
