"""The two states of a quantized layer: trainable (BitLinear, BitConv2d) and packed (PackedLinear, PackedConv2d).

Trainable layers keep a float weight and quantize it in every forward pass; the gradient passes straight through (Y.
Bengio, N. Léonard, A. Courville, "Estimating or Propagating Gradients Through Stochastic Neurons", arXiv 1308.3432). In
evaluation they equal a dense layer with the ternary values exactly. Packed layers hold the codes alone.

Activations are quantized by a layer's own `DynamicQuantizer` (signed, scale from the data: per token for linear layers
as in BitNet b1.58, per image for convolutions), or, in a calibrated chain network, by a `StaticQuantizer` where a node
ends.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import kernels
from .kernels import reference
from .quantizers import TERNARY, Quantizer, as_is, dequantize, in_blocks, int8_absmax


class DynamicQuantizer(nn.Module):
    """Signed activations with a scale from the data: q = round(x · Q / a), a = max |x|, Q = 2^(bits-1) - 1.

    The maximum is over the last dimension (`per="token"`) or over all but the first (`per="image"`). Straight-through.

    Reference: S. Ma et al., arXiv 2402.17764 (per token absmax, 8 bits).
    """

    def __init__(self, bits: int, per: str) -> None:
        super().__init__()
        self.bits, self.per = bits, per

    def forward(self, x: Tensor) -> Tensor:
        codes, scale = reference.quantize_dynamic(reference.wide(x.detach()), self.bits, self.per)
        return x + ((codes * scale).to(x.dtype) - x.detach())

    def extra_repr(self) -> str:
        return f"bits={self.bits}, per={self.per}"


class _LearnedStep(torch.autograd.Function):
    """step · clip(round(x / step), 0, Q); gradients of LSQ (S. Esser et al., arXiv 1902.08153, eq. 1-3)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, code_max: int) -> Tensor:
        ctx.save_for_backward(x, step)
        ctx.code_max = code_max
        x, step = x.detach(), step.detach()  # torch.export wants views of what has no gradient here
        out = torch.empty_like(x)
        for x_B, out_B in in_blocks(x, out):
            out_B.copy_((reference.wide(x_B) / step).round_().clamp_(0, code_max).mul_(step))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, step = ctx.saved_tensors
        grad_x, grad_step = torch.empty_like(x), torch.zeros_like(step)
        for x_B, grad_B, grad_x_B in in_blocks(x, grad, grad_x):
            ratio, grad_out = x_B.float() / step, grad_B.float()
            clipped = ratio.clamp(0, ctx.code_max)
            inside = (clipped == ratio).float()
            grad_x_B.copy_(inside * grad_out)
            # d out / d step is round(r) - r inside, 0 below and Q above.
            grad_step += (clipped.round_() - ratio.mul_(inside)).mul_(grad_out).sum()
        return grad_x, grad_step / (max(1, x.numel()) * ctx.code_max) ** 0.5, None  # 1 / sqrt(number · Q), of a batch


class StaticQuantizer(nn.Module):
    """Unsigned activations (after a ReLU) with one learned step: codes 0 … 2^bits - 1."""

    def __init__(self, bits: int, step: float) -> None:
        super().__init__()
        self.bits = bits
        self.step = nn.Parameter(torch.tensor(float(step)))

    @property
    def code_max(self) -> int:
        return 2**self.bits - 1

    def forward(self, x: Tensor) -> Tensor:
        return _LearnedStep.apply(x, self.step.clamp_min(1e-8), self.code_max)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class Quantized(nn.Module):
    """A module (ReLU, average pool) whose output ends a node and is quantized there: quantizer(module(x))."""

    fx_leaf = True  # `models.graph.trace` takes it for one node

    def __init__(self, module: nn.Module, quantizer: StaticQuantizer) -> None:
        super().__init__()
        self.module, self.quantizer = module, quantizer

    def forward(self, input: Tensor) -> Tensor:  # named as those of its modules, for callers by name
        return self.quantizer(self.module(input))


class _BitLayer(nn.Module):
    """What BitLinear and BitConv2d share."""

    weight: nn.Parameter
    quantizer: Quantizer
    input_quantizer: nn.Module | None
    fx_leaf = True  # `models.graph.trace` takes it for one node
    quantized_part = 1.0  # ramp: 0 = the float weight, 1 = the quantized one; a recipe may raise it during training
    fixed: Tensor | None = None  # the dequantized weight inside `fixed_weights`

    def _adopt(self, layer: nn.Module, quantizer: Quantizer, input_quantizer: nn.Module | None) -> None:
        parametrizations = getattr(layer, "parametrizations", {})
        for name in ("weight", "bias"):
            tensor = parametrizations[name].original if name in parametrizations else getattr(layer, name)
            setattr(self, name, tensor)
        self.quantizer, self.input_quantizer = quantizer, input_quantizer
        self.train(layer.training)

    @property
    def weight_bits(self) -> int | str:
        if self.quantizer is int8_absmax:
            return 8
        if self.quantizer in (*TERNARY, as_is):
            return "ternary"
        codes, _ = self.quantized_weight()  # a partial of one of these, or another function: its codes tell
        return 8 if bool((codes.abs() > 1).any()) else "ternary"

    def quantized_weight(self) -> tuple[Tensor, Tensor]:
        """codes int8 (shape of weight), scale float32 (N,)."""
        return self.quantizer(self.weight.detach())

    def effective_weight(self) -> Tensor:
        """The dequantized weight, with the gradient of the float weight (straight-through).

        Where autocast is on, it has autocast's type, which the product would round it to anyway.
        """
        if self.fixed is not None:
            return self.fixed
        weight = self.weight  # once: a pruned weight is masked anew at every access
        device, dtype = weight.device.type, weight.dtype
        if self.quantized_part == 1.0 and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            quantized = dequantize(*self.quantizer(weight.detach()), dtype)
        if self.quantized_part == 1.0:
            # Not weight + (quantized - weight): that rounds, and evaluation must equal the dense ternary layer exactly.
            return _StraightThrough.apply(weight, quantized)
        return weight + self.quantized_part * (quantized - weight).detach()

    def quantized_input(self, x: Tensor) -> Tensor:
        return x if self.input_quantizer is None else self.input_quantizer(x)


@contextmanager
def fixed_weights(
    model: nn.Module, weight_of: Callable[[_BitLayer], Tensor] = _BitLayer.effective_weight
) -> Iterator[None]:
    """Quantize every weight once, on entry, and not in every forward pass: for passes between which no weight changes.

    `weight_of`: what a layer computes with meanwhile; where only shapes matter, one that costs less.
    """
    before = {module: module.fixed for module in model.modules() if isinstance(module, _BitLayer)}
    try:
        for layer in before:
            layer.fixed = weight_of(layer).detach()
        yield
    finally:
        for layer, fixed in before.items():
            layer.fixed = fixed


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, quantized: Tensor) -> Tensor:
        ctx.dtype = weight.dtype
        return quantized.view_as(quantized)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad.to(ctx.dtype), None


class BitLinear(_BitLayer, nn.Linear):  # type: ignore[misc]
    """A linear layer with quantized weight and, unless `input_quantizer` is None, quantized input; (…, K) → (…, N)."""

    @classmethod
    def from_float(cls, layer: nn.Linear, quantizer: Quantizer, act_bits: int | None) -> BitLinear:
        """A layer with the same parameters, no copies. `act_bits`: of its inputs, scaled per token; None: float."""
        new = cls(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        new._adopt(layer, quantizer, None if act_bits is None else DynamicQuantizer(act_bits, "token"))
        return new

    def forward(self, input: Tensor) -> Tensor:  # named as nn.Linear's, for callers by name
        return F.linear(self.quantized_input(input), self.effective_weight(), self.bias)


class BitConv2d(_BitLayer, nn.Conv2d):  # type: ignore[misc]
    """A convolution with quantized weight and, unless `input_quantizer` is None, quantized input; (B, C, H, W)."""

    @classmethod
    def from_float(cls, layer: nn.Conv2d, quantizer: Quantizer, act_bits: int | None) -> BitConv2d:
        """A layer with the same parameters, no copies. `act_bits`: of its inputs, scaled per image; None: float."""
        new = cls(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding,  # type: ignore[arg-type]
            layer.dilation, layer.groups, layer.bias is not None, layer.padding_mode, device="meta",  # type: ignore[arg-type]
        )  # fmt: skip
        new._adopt(layer, quantizer, None if act_bits is None else DynamicQuantizer(act_bits, "image"))
        return new

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(self.quantized_input(input), self.effective_weight(), self.bias)


class _PackedLayer(nn.Module):
    """Codes, scale, bias; no float weight. `act_bits` None: weight only, float arithmetic; else integer arithmetic."""

    is_packed = True
    codes: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(
        self, codes: Tensor, scale_N: Tensor, bias_N: Tensor | None, weight_bits: int | str, act_bits: int | None
    ) -> None:
        super().__init__()
        self.weight_bits, self.act_bits = weight_bits, act_bits
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale_N)
        self.register_buffer("bias", bias_N)
        self.backend = "auto"
        self._runner: Any = None
        self._made_of: tuple[Any, ...] = ()

    def forward(self, input: Tensor) -> Tensor:
        if self._runner is None or not (torch.compiler.is_compiling() or self._is_as_it_was()):
            with torch.inference_mode(False):  # what is kept for later calls has to take part in gradients there
                self._runner, self._made_of = self._make_runner(), self._parts()
        return self._runner(input)

    def _parts(self) -> tuple[Any, ...]:
        """What a runner depends on: the tensors, their versions (how often each was written to) and the backend."""
        tensors = (self.codes, self.scale, self.bias)
        versions = tuple(0 if t is None or t.is_inference() else t._version for t in tensors)
        return (*tensors, versions, self.backend)

    def _is_as_it_was(self) -> bool:
        now = self._parts()
        return all(map(operator.is_, now[:3], self._made_of[:3])) and now[3:] == self._made_of[3:]

    def _make_runner(self) -> Callable[[Tensor], Tensor]:
        """The function that runs the layer, made from its tensors; each of the two classes has its own."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The dense weight in the scale's type, for code that asks a layer for it (transformers reads its dtype)."""
        return dequantize(self.codes, self.scale, self.scale.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        self._runner = None  # built from the tensors, so it goes when they move or change
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._runner = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_runner": None, "_made_of": ()}


class PackedLinear(_PackedLayer):
    """The packed form of BitLinear: x float (…, K) → float (…, N)."""

    @classmethod
    def from_bit_layer(cls, layer: BitLinear, act_bits: int | None) -> PackedLinear:
        """The codes and scales that the layer has now. `act_bits`: of its inputs, per token; None: float."""
        bias = None if layer.bias is None else layer.bias.detach().clone()
        return cls(*layer.quantized_weight(), bias, layer.weight_bits, act_bits)

    def _make_runner(self) -> Callable[[Tensor], Tensor]:
        if self.act_bits is not None:
            return kernels.make_linear(self.codes, self.scale, self.bias, self.act_bits, self.backend)
        dense_NK = self.weight
        return lambda x: F.linear(x, dense_NK, self.bias)

    def extra_repr(self) -> str:
        return f"{tuple(self.codes.shape)}, weight_bits={self.weight_bits}, act_bits={self.act_bits}"


class PackedConv2d(_PackedLayer):
    """The packed form of BitConv2d: x float (B, C, H, W) → float (B, N, H', W')."""

    def __init__(self, *args: Any, geometry: dict[str, Any]) -> None:
        """`geometry`: stride, padding, dilation, groups of the convolution (zero padding)."""
        super().__init__(*args)
        self.geometry = geometry

    @property
    def has_kernel(self) -> bool:
        """Whether `backend="cpu"` is possible: C++ can run it, or its activations are float and PyTorch always does."""
        return self.act_bits is None or kernels.has_kernel(self.codes, self.geometry)

    @classmethod
    def from_bit_layer(cls, layer: BitConv2d, act_bits: int | None) -> PackedConv2d:
        """The codes and scales that the layer has now. `act_bits`: of its inputs, per image; None: float."""
        bias = None if layer.bias is None else layer.bias.detach().clone()
        geometry = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
        return cls(*layer.quantized_weight(), bias, layer.weight_bits, act_bits, geometry=geometry)

    def _make_runner(self) -> Callable[[Tensor], Tensor]:
        if self.act_bits is not None:
            return kernels.make_conv(self.codes, self.scale, self.bias, self.act_bits, self.geometry, self.backend)
        dense = self.weight
        return lambda x: F.conv2d(x, dense, self.bias, **self.geometry)

    def extra_repr(self) -> str:
        return f"{tuple(self.codes.shape)}, weight_bits={self.weight_bits}, act_bits={self.act_bits}, {self.geometry}"
