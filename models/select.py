"""Which layers a transformation touches: one meaning of `only` and `keep` for quantization and pruning."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

Selection = type | str | Sequence[type | str] | None


def select_layers(
    model: nn.Module, only: Selection = None, keep: str | Sequence[str] = ()
) -> list[tuple[str, nn.Module]]:
    """Return (name, module) of the chosen linear and convolution layers, in the order of `model.named_modules()`.

    `only`: a module type, a name pattern (`"stages.*.conv1"`, as a shell matches names), several of them, or None for
    all. `keep`: name patterns of layers to leave out.

    Raises:
        ValueError: a name pattern that matches no layer (a typing mistake would silently change the result), something
            else than types and patterns, or a model that is packed, compiled, or without values.
    """
    refuse_compiled(model)
    if any(getattr(module, "is_packed", False) for module in model.modules()):
        raise ValueError("the model is packed, and its codes are fixed: do this before pack_")
    wanted = _several(only, (type, str), "only", "layer types or name patterns") if only is not None else (None,)
    keep = _several(keep, (str,), "keep", "name patterns")
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    for kind, patterns in (("only", [w for w in wanted if isinstance(w, str)]), ("keep", keep)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name, _ in layers):
                raise ValueError(f"{kind}={pattern!r} matches no layer: choose from {', '.join(n for n, _ in layers)}")

    def chosen(name: str, module: nn.Module) -> bool:
        if any(fnmatchcase(name, pattern) for pattern in keep):
            return False
        return any(
            w is None or (isinstance(module, w) if isinstance(w, type) else fnmatchcase(name, w)) for w in wanted
        )

    for name, module in layers:
        if chosen(name, module) and module.weight.is_meta:
            raise ValueError(f"{name} has no values, it is on the device meta: load or initialise the model first")
    return [(name, module) for name, module in layers if chosen(name, module)]


def refuse_compiled(model: nn.Module) -> None:
    """Raise a ValueError for a model from torch.compile: its compiled code would not see a change."""
    if hasattr(model, "_orig_mod"):
        raise ValueError("the model is compiled: give what was compiled (model._orig_mod), and compile it at the end")


def _several(given: Any, kinds: tuple[type, ...], option: str, of_what: str) -> tuple[Any, ...]:
    items = (given,) if isinstance(given, kinds) else tuple(given) if isinstance(given, Iterable) else (given,)
    if not all(isinstance(item, kinds) for item in items):
        raise ValueError(f"{option} takes {of_what}, not {given!r}")
    return items
