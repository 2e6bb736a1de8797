"""A packed convolution network: a short list of nodes, made from a calibrated chain network by torch.fx.

Batch norm and every scale fold into one gain and one bias per output channel, in units of the output's step; the
ternary codes do not change.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from models.graph import ADDITIONS, BATCH_NORMS, PASSES, module_of, trace
from models.normalize import Normalize, require_pixels
from models.state import device_of

from . import kernels
from .bit_layers import BitConv2d, BitLinear, Quantized, fixed_weights
from .nodes import IMAGE, IMAGE_SHAPE, Node

KNOWN = {BitConv2d, BitLinear, Normalize, Quantized, nn.ReLU, nn.AdaptiveAvgPool2d, nn.MaxPool2d, nn.Flatten}
KNOWN |= {*BATCH_NORMS, *PASSES}


class PackedNetwork(nn.Module):
    """The integer form of a chain network: images float32 in [0, 1] (B, 3, H, W) → logits float32 (B, classes)."""

    is_packed = True

    def __init__(
        self, nodes: list[Node], constructor: dict[str, Any] | None = None, image_shape: tuple[int, ...] = IMAGE_SHAPE
    ) -> None:
        """`image_shape`: (C, H, W) of the images that the nodes are made for, which an average pool depends on."""
        super().__init__()
        self.nodes, self.constructor, self.image_shape = nodes, constructor, image_shape
        self.backend = self._made_for = "auto"
        self._executor: Any = None
        self.eval()

    @property
    def executor(self) -> Any:
        """What runs the nodes; its `backend` names the kernels. Made at first use, and anew for another `self.backend`.

        Nodes that are changed after that are not noticed.
        """
        if self._executor is None or self._made_for != self.backend:
            with torch.inference_mode(False):  # what is kept for later calls has to take part in gradients there
                self._executor, self._made_for = kernels.make_executor(self.nodes, self.backend), self.backend
        return self._executor

    def forward(self, images_BCHW: Tensor) -> Tensor:
        if images_BCHW.shape[1:] != self.image_shape:
            made_for, given = ("×".join(map(str, shape)) for shape in (self.image_shape, images_BCHW.shape[1:]))
            raise ValueError(f"this network is packed for batches of images of {made_for}, not {given}")
        require_pixels(images_BCHW)
        return self.executor(images_BCHW)

    def _apply(self, fn: Any, recurse: bool = True) -> PackedNetwork:
        for node in self.nodes:
            for field in fields(node):
                value = getattr(node, field.name)
                if isinstance(value, Tensor):
                    # A network is moved, never cast: its integers and its float32 scales are its meaning.
                    setattr(node, field.name, value.to(fn(value).device))
        self._executor = None
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # An empty one would lose the network without a word.
        raise ValueError("a packed network has no state dict: use save_model and load_model")

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._save_to_state_dict()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_executor": None}

    def extra_repr(self) -> str:
        return f"{len(self.nodes)} nodes"


@dataclass
class _Value:
    """What an fx node stands for: finished (codes of `index` · `step`), or open to batch norm, addition, ReLU."""

    index: int | None = None
    step: float = 1.0
    normalize: Normalize | None = None  # of the image, to be folded into the layer that reads it
    open: Node | None = None  # gain and bias in float64, in real units


class NotANetwork(Exception):
    """The model cannot be a list of nodes (a float layer, dynamic activations); it is packed layer by layer."""


def to_nodes(model: nn.Module, image_shape: tuple[int, ...] = IMAGE_SHAPE) -> list[Node]:
    """Return the nodes of a calibrated chain network in evaluation mode, for images of `image_shape` (C, H, W).

    Convolutions that can't be packed at all are refused before (`transform.pack_`).

    Raises:
        NotANetwork: some layer is not quantized, or its input has no static scale.
    """
    graph = trace(model)
    if graph is None:
        has_relus = any(isinstance(module, nn.ReLU) for module in model.modules())
        raise NotANetwork(f"not a chain of convolutions, batch norms and {'ReLUs' if has_relus else 'nn.ReLU modules'}")
    for node in graph.nodes:  # first: without a quantizer before it, another layer would take the blame
        if node.op in ("call_function", "call_method") and node.target not in ADDITIONS:
            raise NotANetwork(f"{node} is no module, such as nn.Flatten or nn.ReLU, but a function")
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        raise NotANetwork("it has hooks, which may change what its modules put out")
    try:
        image = torch.zeros(1, *image_shape, dtype=torch.float32, device=device_of(model))
        with fixed_weights(model, lambda layer: layer.weight):
            _ShapeProp(fx.GraphModule(model, graph)).run(image)
    except Exception as error:  # whatever its layers raise for images that are not theirs
        size = "×".join(map(str, image_shape))
        raise NotANetwork(f"it does not take images of {size}, and was not calibrated with others") from error
    return _Builder(model).build(graph)


class _ShapeProp(fx.Interpreter):
    """Notes the shapes of all values. That of torch.fx prints a traceback of what it raises."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        n.meta["shape"] = getattr(value, "shape", None)
        return value


class _Builder:
    """Takes the classes of `KNOWN` for what PyTorch makes of them: a subclass may compute something else."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.nodes = model, list[Node]()
        self.values: dict[fx.Node, _Value] = {}

    def build(self, graph: fx.Graph) -> list[Node]:
        for fx_node in graph.nodes:
            if fx_node.op == "placeholder":
                self.values[fx_node] = _Value(IMAGE, 1 / 255)
            elif fx_node.op == "output":
                self.close(self.value(fx_node.args[0]))
            else:
                self.values[fx_node] = self.step(fx_node)
        return [replace(n, gain=_float32(n.gain), bias=_float32(n.bias)) for n in self.nodes]

    def value(self, operand: Any) -> _Value:
        if not isinstance(operand, fx.Node):
            raise NotANetwork(f"{operand} is no value that a layer puts out")
        return self.values[operand]

    def step(self, fx_node: fx.Node) -> _Value:
        if fx_node.kwargs or not fx_node.args:
            raise NotANetwork(f"{fx_node.target} is not called with values alone")
        module, source = module_of(self.model, fx_node), fx_node.args[0]
        if fx_node.target is operator.iadd or getattr(getattr(module, "module", None), "inplace", False):
            self.refuse_if_read_again(source)
        if fx_node.target in ADDITIONS:
            if len({operand.meta["shape"] for operand in fx_node.args if isinstance(operand, fx.Node)}) > 1:
                raise NotANetwork("an addition of tensors of two shapes")
            return self.add(*map(self.value, fx_node.args))
        for part in (module, getattr(module, "module", None)):
            if part is not None and (kind := type_before_parametrizations(part)) not in KNOWN:
                raise NotANetwork(f"{fx_node.target} is or holds a {kind.__name__}")
        value = self.value(source)
        one_row = (fx_node.meta["shape"] or ())[:-1] == (1,)  # of the one image traced; None: no tensor
        if isinstance(module, (nn.Flatten, BitLinear)) and not one_row:
            raise NotANetwork("a linear layer or a flattening that leaves more than one dimension of an image")
        if isinstance(module, nn.Flatten) and value.open is not None and value.open.op == "conv":
            raise NotANetwork("a flattening of a convolution's outputs before they are quantized")
        if isinstance(module, Normalize):
            if value.index != IMAGE or value.normalize is not None:
                raise NotANetwork("a normalisation that does not read the image")
            return replace(value, normalize=module)
        if isinstance(module, (BitConv2d, BitLinear)):
            return self.layer(str(fx_node.target), module, value)
        if isinstance(module, BATCH_NORMS):
            return self.batch_norm(module, value)
        if isinstance(module, (nn.Flatten, *PASSES)):
            return value
        if isinstance(module, nn.MaxPool2d) and value.index is not None:
            if module.ceil_mode or _pair(module.dilation) != (1, 1):
                raise NotANetwork("a max-pool with dilation or with part of a window at its end")
            node = Node("max_pool", value.index, kernel=_pair(module.kernel_size), stride=_pair(module.stride),
                        padding=_pair(module.padding))  # fmt: skip
            return self.emit(node, value.step)
        if isinstance(module, Quantized):
            return self.requantize(module, value, source.meta["shape"])  # type: ignore[union-attr]
        raise NotANetwork(f"{fx_node.target} has a float output inside the network")

    def refuse_if_read_again(self, fx_node: Any) -> None:
        """What is changed in place is another tensor for its later readers; a node's value never changes."""
        while isinstance(fx_node, fx.Node):
            before = [u for u in fx_node.users if u in self.values and not self.passes_on(u)]  # have read it already
            if len(fx_node.users) > len(before) + 1:
                raise NotANetwork(f"{fx_node} is changed in place and read again")
            fx_node = fx_node.args[0] if self.passes_on(fx_node) else None

    def passes_on(self, fx_node: fx.Node) -> bool:
        """Whether a node puts out the tensor that it reads."""
        return isinstance(module_of(self.model, fx_node), (nn.Flatten, *PASSES))

    def layer(self, name: str, module: BitConv2d | BitLinear, value: _Value) -> _Value:
        if value.index is None or module.input_quantizer is not None:
            if value.index == IMAGE and value.normalize is None:
                raise NotANetwork(f"{name} reads the image without a Normalize before it")
            raise NotANetwork(f"the input of {name} has no static scale: call calibrate_(model, images)")
        codes, scale_N = module.quantized_weight()
        gain_N = scale_N.double() * value.step
        bias_N = torch.zeros_like(gain_N) if module.bias is None else module.bias.detach().double()
        node = Node("linear", value.index, codes=codes, weight_bits=module.weight_bits)
        if isinstance(module, BitConv2d):
            if module.groups != 1 or _pair(module.dilation) != (1, 1):
                raise NotANetwork("a grouped or dilated convolution")
            if any(p >= k for p, k in zip(_pair(module.padding), _pair(module.kernel_size), strict=True)):
                raise NotANetwork("a convolution with places that see nothing but padding")
            node = replace(node, op="conv", kernel=_pair(module.kernel_size), stride=_pair(module.stride),
                           padding=_pair(module.padding))  # fmt: skip
            if value.index == IMAGE:
                gain_N, bias_N, node.pad_values = _fold_normalization(value.normalize, codes, scale_N, bias_N)
        return _Value(open=replace(node, gain=gain_N, bias=bias_N))

    def batch_norm(self, module: nn.BatchNorm1d | nn.BatchNorm2d, value: _Value) -> _Value:
        if value.open is None or not module.affine or module.running_mean is None or module.running_var is None:
            raise NotANetwork("a batch norm that does not follow a layer, or has no weight or no statistics")
        if value.open.residual is not None:  # whose gain is one number, where a batch norm has one a channel
            raise NotANetwork("a batch norm behind an addition")
        assert value.open.gain is not None and value.open.bias is not None
        if module.num_features != len(value.open.gain):  # flattened pixels, say
            raise NotANetwork("a batch norm of other channels than its layer's")
        # Weight and bias may be parametrized (a pruned filter's are masked): attribute access sees the masked values.
        factor_N = module.weight.detach().double() / (module.running_var.double() + module.eps).sqrt()
        bias_N = (value.open.bias - module.running_mean.double()) * factor_N + module.bias.detach().double()
        return _Value(open=replace(value.open, gain=value.open.gain * factor_N, bias=bias_N))

    def add(self, left: _Value, right: _Value) -> _Value:
        # The main path is the operand still open; if both are (a projection shortcut), the right one becomes a node of
        # its own with float32 output.
        main, shortcut = (left, right) if left.open is not None else (right, left)
        if main.open is None or main.open.residual is not None:
            raise NotANetwork("an addition that does not end a layer")
        if shortcut.open is not None:
            shortcut = self.close(shortcut)
        return _Value(open=replace(main.open, residual=shortcut.index, residual_gain=shortcut.step))

    def requantize(self, module: Quantized, value: _Value, shape: torch.Size) -> _Value:
        step = float(module.quantizer.step.detach().clamp_min(1e-8))
        if isinstance(module.module, nn.ReLU) and value.open is not None:
            node = replace(value.open, relu=True)
        elif isinstance(module.module, nn.AdaptiveAvgPool2d) and value.index is not None:
            if _pair(module.module.output_size) != (1, 1):
                raise NotANetwork("an average pool to more than one pixel")
            gain = value.step / (shape[-1] * shape[-2])
            gain_1 = torch.tensor([gain], dtype=torch.float64, device=module.quantizer.step.device)
            node = Node("avg_pool", value.index, gain=gain_1)
        else:
            raise NotANetwork(f"a quantized {type(module.module).__name__}")
        assert node.gain is not None
        node.gain = node.gain / step
        node.bias = None if node.bias is None else node.bias / step
        node.residual_gain, node.out_max = node.residual_gain / step, module.quantizer.code_max
        return self.emit(node, step)

    def close(self, value: _Value) -> _Value:
        """End an open node with float32 output (logits, projection shortcut)."""
        if value.open is None:
            raise NotANetwork("the network does not end in a layer")
        return self.emit(value.open, 1.0)

    def emit(self, node: Node, step: float) -> _Value:
        if (node.op != "conv" and node.input == IMAGE) or node.residual == IMAGE:
            raise NotANetwork("something else than a convolution, which takes in the normalisation, reads the image")
        if node.op != "linear" and self.is_flat(node.input):
            raise NotANetwork("something else than a linear layer reads what an average pool puts out")
        if node.residual is not None and self.is_flat(node.residual) != (node.op == "linear"):
            raise NotANetwork("an addition of one value a channel and of an image")
        self.nodes.append(node)
        return _Value(len(self.nodes) - 1, step)

    def is_flat(self, index: int) -> bool:
        """Whether a node puts out one value a channel, and no image of them."""
        return index != IMAGE and self.nodes[index].op in ("linear", "avg_pool")


def _fold_normalization(
    normalize: Normalize | None, codes: Tensor, scale_N: Tensor, bias_N: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gain and bias of the first convolution for raw pixels p = 0 … 255, where its input was (p - mean_c) / std."""
    if normalize is None:
        return scale_N.double() / 255, bias_N, None
    mean = normalize.mean
    if len(set(normalize.std)) > 1 or any(m != int(m) or not 0 <= m <= 255 for m in mean):
        raise NotANetwork("a normalisation that is not in whole pixels with one standard deviation")
    gain_N = scale_N.double() / normalize.std[0]
    mean_C = torch.tensor(mean, dtype=torch.float64, device=codes.device).expand(codes.shape[1])
    offset_N = (codes.double().sum((2, 3)) * mean_C).sum(1)
    return gain_N, bias_N - gain_N * offset_N, mean_C.to(torch.uint8)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _float32(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float()
