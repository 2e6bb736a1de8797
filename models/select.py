"""Which layers a transformation touches: one meaning of `only` and `keep` for quantization and pruning."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

Selection = type | str | Sequence[type | str] | None


def select_layers(
    model: nn.Module, only: Selection = None, keep: str | Sequence[str] = ()
) -> list[tuple[str, nn.Module]]:
    """Return (name, module) of the linear and convolution layers chosen, in the order of `model.named_modules()`.

    `only`: a module type, a name pattern (`"stages.*.conv1"`, as a shell matches names), several of them, or None for
    all. `keep`: name patterns of layers to leave out.

    Raises:
        ValueError: a name pattern that matches no layer (a typing mistake would silently change the result), or a
            packed model, whose layers are no linear or convolution layers any more.
    """
    if any(getattr(module, "is_packed", False) for module in model.modules()):
        raise ValueError("the model is packed, and its codes are fixed: do this before pack_")
    wanted = (only,) if only is None or isinstance(only, (type, str)) else tuple(only)
    keep = (keep,) if isinstance(keep, str) else keep
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

    return [(name, module) for name, module in layers if chosen(name, module)]
