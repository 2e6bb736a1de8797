"""The graph of a chain network: which module feeds which, found by torch.fx."""

from __future__ import annotations

from typing import Any

from torch import fx, nn
from torch.nn.utils import parametrize


class ChainTracer(fx.Tracer):
    """Stops at modules without children (a parametrization is no child) and at those that say `fx_leaf = True`."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        children = [name for name, _ in m.named_children() if name != "parametrizations"]
        return not children or bool(getattr(m, "fx_leaf", False))


def is_chain(model: nn.Module) -> bool:
    """Whether `model` is a chain network: its non-linearities are ReLU modules, so that its data flow can be traced.

    Transformers (layer norm, data-dependent Python in the attention) are not.
    """
    kinds = {type(m) for m in model.modules()}
    return nn.ReLU in kinds and nn.LayerNorm not in kinds


def trace(model: nn.Module) -> fx.Graph:
    """Return the data flow of a chain network; every `call_module` target is a name in `model.named_modules()`."""
    return ChainTracer().trace(model)


def module_of(model: nn.Module, node: Any) -> nn.Module | None:
    """The module that an fx node calls, or None for anything else."""
    if isinstance(node, fx.Node) and node.op == "call_module":
        return model.get_submodule(str(node.target))
    return None


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the place of the submodule `name`, carrying over its parametrizations (pruning masks) of weight."""
    old = model.get_submodule(name)
    if parametrize.is_parametrized(old):
        for tensor_name, parametrizations in old.parametrizations.items():  # type: ignore[union-attr, operator]
            if hasattr(new, tensor_name):
                for parametrization in parametrizations:
                    parametrize.register_parametrization(new, tensor_name, parametrization)
    model.set_submodule(name, new)
