"""What goes into the layers of a network: order of execution, blocks, and inputs replayed a block at a time.

Post-training methods look at two networks side by side, the float one and the one being quantized: a `Stream` each.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from models.graph import ADDITIONS, BATCH_NORMS, module_of, trace


class _Reached(Exception):
    """Ends a forward pass at the module of interest."""


def _read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a layer or batch norm is given, by place or by name."""
    return args[0] if args else kwargs["input"]


@torch.inference_mode(False)  # tensors made in inference mode have no `_version`
@torch.no_grad()
def execution_order(model: nn.Module, image_1CHW: Tensor) -> dict[str, str | None]:
    """Name of layer → name of the batch norm that takes its output, or None; layers in the order in which they run.

    Of a layer that runs more than once the first run counts, as in `Stream.input_of`.
    """
    order: dict[str, str | None] = {}
    outputs: dict[str, tuple[Tensor, int]] = {}  # (output, its `_version`, which a ReLU in place would raise)

    def layer_ran(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if name not in order and (isinstance(module, nn.Conv2d) or output.dim() == 2):
                outputs[name] = output, output._version  # a batch norm's channels are in dimension 1
            order.setdefault(name, None)

        return hook

    def norm_runs(norm: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            read = _read(args, kwargs)
            for name, (output, version) in outputs.items():
                if output is read and output._version == version:
                    order[name] = norm

        return hook

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            handles.append(module.register_forward_hook(layer_ran(name)))
        elif isinstance(module, BATCH_NORMS):
            handles.append(module.register_forward_pre_hook(norm_runs(name), with_kwargs=True))
    try:
        model(image_1CHW)
    finally:
        for handle in handles:
            handle.remove()
    return order


@torch.no_grad()
def positions_of(model: nn.Module, image_1CHW: Tensor) -> dict[str, int]:
    """Name of layer → at how many positions of an image its weights are used (pixels of its output, tokens)."""
    found: dict[str, int] = {}

    def ran(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            inside = output.shape[2:] if isinstance(module, nn.Conv2d) else output.shape[1:-1]
            found.setdefault(name, inside.numel())

        return hook

    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    handles = [module.register_forward_hook(ran(name)) for name, module in layers]
    try:
        model(image_1CHW)
    finally:
        for handle in handles:
            handle.remove()
    return found


@dataclass(frozen=True)
class ResidualSum:
    """What a layer's output is added to. Names of modules."""

    reader: str  # which reads the sum
    norm: str | None  # the batch norm between the layer and the sum, if any
    layers: tuple[str, ...]  # all whose outputs are added up: a residual branch's, a shortcut's


def residual_sums(model: nn.Module) -> dict[str, ResidualSum]:
    """Name of layer → the sum that it ends in. Of several layers in a sum, the one with the most weights.

    Empty where the data flow can't be traced (`models.graph`).
    """
    found: dict[str, ResidualSum] = {}
    graph = trace(model)
    for node in graph.nodes if graph else ():
        source = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(source, fx.Node) or source.target not in ADDITIONS or source.kwargs or len(source.users) != 1:
            continue
        terms = {name: term for term in source.args if (name := _layer_behind(model, term))}
        if terms:
            largest = max(terms, key=lambda name: model.get_submodule(name).weight.numel())  # type: ignore[union-attr, operator]
            term: Any = terms[largest]
            norm = str(term.target) if isinstance(module_of(model, term), BATCH_NORMS) else None
            found[largest] = ResidualSum(str(node.target), norm, tuple(terms))
    return found


def sums_last(names: list[str], sums: dict[str, ResidualSum]) -> list[str]:
    """The layers in the order in which they run, but those of `sums` come after the other layers of their sum."""
    order = list(names)
    for name in [name for name in names if name in sums]:
        place = max(order.index(other) for other in sums[name].layers if other in order)
        order.remove(name)
        order.insert(place, name)
    return order


def _layer_behind(model: nn.Module, node: Any) -> str | None:
    """The name of the layer whose output, with or without batch norm, `node` is."""
    if isinstance(module_of(model, node), BATCH_NORMS):
        node = node.all_input_nodes[0]  # given by place or by name
    return str(node.target) if isinstance(module_of(model, node), (nn.Linear, nn.Conv2d)) else None


def blocks(model: nn.Module, layers: list[str]) -> list[tuple[str, list[str]]]:
    """(name of block, its layers) in the order of `layers`.

    A block is an outermost module of a class, not PyTorch's own, that the model has more than once (a residual block, a
    transformer layer); a layer outside of those is a block of its own.
    """
    counts = Counter(type(m) for m in model.modules())

    def block_of(layer: str) -> str:
        parts = layer.split(".")
        for depth in range(1, len(parts)):
            name = ".".join(parts[:depth])
            kind = type(model.get_submodule(name))
            if counts[kind] > 1 and not kind.__module__.startswith("torch."):
                return name
        return layer

    found: dict[str, list[str]] = {}
    for layer in layers:
        found.setdefault(block_of(layer), []).append(layer)
    return list(found.items())


@torch.no_grad()
def replayable_blocks(model: nn.Module, layers: list[str], images: Tensor) -> list[tuple[str, list[str]]]:
    """`blocks`, or, if a `Stream` can't replay these, the whole model (named "") as the only one.

    A `Stream` can if each block runs once and reads only the output of the block before it.
    """
    found = blocks(model, layers)
    true_inputs: dict[str, Any] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            true_inputs.setdefault(name, args[0] if args else None)

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name, _ in found]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    stream = Stream(model, images, len(images))
    for name, _ in found:
        stream.enter(name)
        replayed, wanted = stream.calls[0].args[:1] if stream.calls else (), true_inputs.get(name)
        if not replayed or not isinstance(wanted, Tensor) or not torch.allclose(replayed[0], wanted, equal_nan=True):
            return [("", layers)]
        stream.leave()
        if not isinstance(stream.outputs[0], Tensor):
            return [("", layers)]
    return found


@dataclass
class Call:
    """The arguments of one call of a module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


class Stream:
    """A network that runs on the same images block by block, without computing earlier blocks again.

    `enter` a block to get its inputs in `calls`, one for each batch. `leave` it when its weights are final: its outputs
    go to `outputs`, and are what it returns from then on. Blocks are entered in the order in which they run.
    """

    def __init__(self, model: nn.Module, images: Tensor, batch_size: int) -> None:
        self.model, self.batch_size = model.eval(), batch_size
        self.block: nn.Module | None = None
        self.calls: list[Call] = []
        self._passed: list[tuple[nn.Module, torch.Size]] = []
        self.restart(images)

    def restart(self, images: Tensor) -> None:
        """Go on with these images: they run through all blocks before the next one that is entered."""
        self.images, self.batches = images, images.split(self.batch_size)
        self.outputs: list[Tensor] = []

    @torch.no_grad()
    def enter(self, name: str) -> None:
        """Run the network from the block left last up to the block `name`, and keep the `calls` of the latter."""
        self.block = self.model.get_submodule(name)
        previous, self.calls = self.outputs, []

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.calls.append(Call(args, kwargs))
            raise _Reached

        handle = self.block.register_forward_pre_hook(hook, with_kwargs=True)
        own = [(block, vars(block).get("forward")) for block, _ in self._passed]  # a wrapper may have set one
        try:
            for k, batch in enumerate(self.batches):
                if previous:
                    self._stand_in(previous[k], len(batch))
                with contextlib.suppress(_Reached):
                    self.model(batch)
        finally:
            handle.remove()
            for block, forward in own:
                vars(block).pop("forward", None)
                if forward is not None:
                    block.forward = forward

    @torch.no_grad()
    def leave(self) -> None:
        """Run the entered block on its `calls`, with its weights as they are now, and keep its `outputs`."""
        assert self.block is not None
        self.outputs = [self.block(*call.args, **call.kwargs) for call in self.calls]
        if isinstance(self.outputs[0], Tensor):
            self._passed.append((self.block, self.outputs[0].shape[1:]))

    def _stand_in(self, output: Tensor, count: int) -> None:
        """Let the block left last return `output`, and those before it zeros of the right shape for `count` images."""
        for block, shape in self._passed[:-1]:
            # New ones every time: what reads them may write to them (a ReLU in place).
            zeros = partial(self.batches[0].new_zeros, (count, *shape))
            block.forward = lambda *args, zeros=zeros, **kwargs: zeros()  # type: ignore[method-assign]
        if self._passed:
            self._passed[-1][0].forward = lambda *args, **kwargs: output  # type: ignore[method-assign]

    def input_of(self, layer: nn.Module, call: Call) -> Tensor:
        """What a layer in the entered block reads when the block is called with `call`."""

        def register(stop: Callable[[Tensor], None]) -> Any:
            return layer.register_forward_pre_hook(lambda m, *given: stop(_read(*given)), with_kwargs=True)

        return self._until(call, register)

    def output_of(self, layer: nn.Module, call: Call) -> Tensor:
        """What a layer in the entered block returns when the block is called with `call`."""
        return self._until(call, lambda stop: layer.register_forward_hook(lambda module, args, output: stop(output)))

    @torch.no_grad()
    def _until(self, call: Call, register: Callable[[Callable[[Tensor], None]], Any]) -> Tensor:
        """Run the block until the hook that `register` sets calls `stop`; return the tensor that `stop` was given."""
        assert self.block is not None
        seen: list[Tensor] = []

        def stop(tensor: Tensor) -> None:
            seen.append(tensor)
            raise _Reached

        handle = register(stop)
        try:
            with contextlib.suppress(_Reached):
                self.block(*call.args, **call.kwargs)
        finally:
            handle.remove()
        return seen[0]
