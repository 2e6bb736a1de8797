"""The graph of a chain network: which module feeds which, found by torch.fx."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from .state import evaluating

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
ADDITIONS = (operator.add, operator.iadd, torch.add)
PASSES = (nn.Identity, nn.Dropout, nn.Dropout2d)  # in evaluation they put out what they read


class _Traced(fx.Proxy):
    """Tells `a += b`, which changes what `a` is under all its names, from the `a + b` that torch.fx takes it for."""

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


class ChainTracer(fx.Tracer):
    """Makes one node of a module without children (a parametrization is no child) or with `fx_leaf = True`."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Traced(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        children = [name for name, _ in m.named_children() if name != "parametrizations"]
        return not children or bool(getattr(m, "fx_leaf", False))

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Trace a call with images alone: the model's other arguments keep their defaults."""
        return root_fn, [self.root, self.create_proxy("placeholder", "images", (), {})]


def trace(model: nn.Module) -> fx.Graph | None:
    """The data flow of a chain network in evaluation; every `call_module` target is in `model.named_modules()`.

    None for a model that is no chain: one whose non-linearities are not ReLU modules (a transformer), or whose own
    Python can't be traced.
    """
    kinds = {type(m) for m in model.modules()}
    if nn.ReLU not in kinds or nn.LayerNorm in kinds:
        return None
    try:
        with evaluating(model):  # in training a model may run other layers, for other outputs
            return ChainTracer().trace(model)
    except Exception:  # it runs on proxies, on which it may fail in any way
        return None


def module_of(model: nn.Module, node: Any) -> nn.Module | None:
    """The module that an fx node calls, or None for anything else."""
    if isinstance(node, fx.Node) and node.op == "call_module":
        return model.get_submodule(str(node.target))
    return None


def remove_parametrization(module: nn.Module, name: str) -> None:
    """Make a parametrized tensor the plain parameter that it is now, in this module alone.

    PyTorch keeps the parametrization as a property of the module's class, which copies of the module share: without a
    class of its own, removing it from one would remove it from all.
    """
    shared = type(module)
    members = {key: value for key, value in vars(shared).items() if key not in ("__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, members)
    parametrize.remove_parametrizations(module, name, leave_parametrized=True)


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the place of the submodule `name`, carrying over its parametrizations (pruning masks) of weight."""
    old = model.get_submodule(name)
    if parametrize.is_parametrized(old):
        for tensor_name, parametrizations in old.parametrizations.items():  # type: ignore[union-attr, operator]
            if hasattr(new, tensor_name):
                # The identity first, then the old list in its place: registering those in the list again would change
                # the tensor, where one of them (`orthogonal`) has a `right_inverse`.
                parametrize.register_parametrization(new, tensor_name, nn.Identity())
                new.parametrizations[tensor_name] = parametrizations  # type: ignore[operator, index]
    put_module(model, old, new)


def put_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` in the place of the submodule `old`, under all names by which the model holds it."""
    for name in [n for n, module in model.named_modules(remove_duplicate=False) if module is old]:
        model.set_submodule(name, new)
