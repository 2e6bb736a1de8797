"""The reference kernels: they define what a packed network computes, run on any device, and are exact.

Integers travel in float32 containers. That is exact arithmetic, not an approximation: a float32 holds every integer up
to 2^24, and an accumulator is at most K · |code| · |activation| (9216 · 1 · 255 < 2^22 for the largest ternary layer of
the study); where that bound reaches 2^24 (8-bit weights, long rows) the containers are float64, exact to 2^53. On CUDA,
TF32 products of 8-bit integers are exact too, but a library may choose a Winograd convolution there, which is not: its
error is far below 1/2, so rounding restores the integer.

Autocast is off in here: a 16-bit float does not hold these integers.

After the accumulator come float32 operations in the order written here, each rounded once, a product together with the
sum that it goes into (`multiply_add`); other kernels do the same and so agree bit for bit. Layers outside of a packed
network that are in float64 compute in it: so a ViT can run without the rounding that moves codes of activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..nodes import Node

SMALLEST_ABSMAX = 1e-5  # as BitNet b1.58's reference code: an all-zero token has a scale too
EXACT_FLOAT32 = 2**24
ONEDNN = torch.backends.mkldnn.is_available()


def wide(x: Tensor, like: Tensor | None = None) -> Tensor:
    """x in float32, or in float64 if it (or `like`) is: then a model is evaluated without rounding of its own."""
    return x.double() if (x if like is None else like).dtype == torch.float64 else x.float()


def quantize_dynamic(x: Tensor, bits: int, per: str) -> tuple[Tensor, Tensor]:
    """Signed codes (float container) and the scale that belongs to each token or image, by the largest magnitude.

    `per`: "token" (absmax over the last dimension) or "image" (over the last three). codes · scale ≈ x.
    """
    code_max = 2 ** (bits - 1) - 1
    dims = (-1,) if per == "token" else (-3, -2, -1)
    absmax = x.abs().amax(dims, keepdim=True).clamp_min(SMALLEST_ABSMAX)
    inverse = torch.full_like(absmax, code_max) / absmax  # of a number PyTorch would take the reciprocal first
    return (x * inverse).round(), absmax / code_max


def multiply_add(a: Tensor, b: Tensor | float, c: Tensor) -> Tensor:
    """a · b + c in the type of a, rounded once, as the instruction of that name (IEEE 754's fusedMultiplyAdd) does.

    float64 holds a product of float32 numbers exactly, and most sums; of the others, which are rounded twice, one in
    some 2^29 is off by its last bit.
    """
    return (a.double() * b + c).to(a.dtype)


class Linear:
    """Dynamic integer linear layer: x float (…, K) → float32, or float64 if the scales are, (…, N).

    y = acc · (scale_n · token scale) + bias_n.
    """

    backend = "reference"

    def __init__(self, codes_NK: Tensor, scale_N: Tensor, bias_N: Tensor | None, act_bits: int) -> None:
        self.weight_NK = codes_NK.to(_container(codes_NK, 2 ** (act_bits - 1)))
        self.scale_N, self.bias_N, self.act_bits = scale_N, bias_N, act_bits

    def __call__(self, x: Tensor) -> Tensor:
        codes, token_scale = quantize_dynamic(wide(x, self.scale_N), self.act_bits, "token")
        accumulator = _integers(_linear(codes.to(self.weight_NK.dtype), self.weight_NK), codes.dtype)
        gain = self.scale_N * token_scale
        return accumulator * gain if self.bias_N is None else multiply_add(accumulator, gain, self.bias_N)


class Conv2d:
    """Dynamic integer convolution: x float (B, C, H, W) → (B, N, H', W') as `Linear`; a scale an image."""

    backend = "reference"

    def __init__(
        self, codes: Tensor, scale_N: Tensor, bias_N: Tensor | None, act_bits: int, geometry: dict[str, Any]
    ) -> None:
        self.weight = codes.to(_container(codes, 2 ** (act_bits - 1)))
        self.scale_N11 = scale_N.view(-1, 1, 1)
        self.bias_N11 = None if bias_N is None else bias_N.view(-1, 1, 1)
        self.act_bits, self.geometry = act_bits, geometry

    def __call__(self, x: Tensor) -> Tensor:
        codes, image_scale = quantize_dynamic(wide(x, self.scale_N11), self.act_bits, "image")
        accumulator = _integers(_conv2d(codes.to(self.weight.dtype), self.weight, **self.geometry), codes.dtype)
        gain = self.scale_N11 * image_scale
        return accumulator * gain if self.bias_N11 is None else multiply_add(accumulator, gain, self.bias_N11)


class NetworkExecutor:
    """Runs the nodes of a packed network one after the other: images float32 (B, C, H, W) → logits (B, classes)."""

    backend = "reference"

    def __init__(self, nodes: Sequence[Node]) -> None:
        # Gains as the float32 numbers that all kernels compute with.
        self.nodes = [replace(n, residual_gain=torch.tensor(n.residual_gain).float().item()) for n in nodes]
        self.weights = [None if n.codes is None else n.codes.to(_container(n.codes, 255)) for n in self.nodes]
        # The last reader of each value, so that it can be dropped as soon as nobody needs it.
        self.last_reader = {i: k for k, n in enumerate(self.nodes) for i in (n.input, n.residual) if i is not None}

    def __call__(self, images: Tensor) -> Tensor:
        values: dict[int, Tensor] = {-1: (images.float() * 255).round().clamp(0, 255)}
        if images.device.type == "cpu":
            values[-1] = values[-1].contiguous(memory_format=torch.channels_last)
        for index, (node, weight) in enumerate(zip(self.nodes, self.weights, strict=True)):
            residual = None if node.residual is None else values[node.residual]
            values[index] = _run(node, weight, values[node.input], residual)
            for used in {node.input, node.residual}:
                if used is not None and self.last_reader[used] == index:
                    del values[used]
        return values[len(self.nodes) - 1]


def _run(node: Node, weight: Tensor | None, x: Tensor, residual: Tensor | None) -> Tensor:
    if node.op == "max_pool":
        return F.max_pool2d(x, node.kernel, node.stride, node.padding)
    if node.op == "avg_pool":
        assert node.gain is not None
        return _finish(node, x.sum((2, 3), dtype=torch.float64).float() * node.gain)  # exact for any image
    assert weight is not None and node.gain is not None and node.bias is not None
    if node.op == "conv":
        y = _integers(_conv2d(_padded(node, x).to(weight.dtype), weight, stride=node.stride))
        y = multiply_add(y, node.gain.view(-1, 1, 1), node.bias.view(-1, 1, 1))
    else:
        y = multiply_add(_integers(_linear(x.flatten(1).to(weight.dtype), weight)), node.gain, node.bias)
    if residual is not None:
        y = multiply_add(residual, node.residual_gain, y)
    return _finish(node, y)


def _linear(x: Tensor, weight_NK: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x, weight_NK)


def _conv2d(x: Tensor, weight: Tensor, **geometry: Any) -> Tensor:
    """A convolution that is exact: not by NNPACK, which PyTorch turns to on a CPU for which it has no oneDNN."""
    with torch.autocast(x.device.type, enabled=False):
        if ONEDNN or x.device.type != "cpu":
            return F.conv2d(x, weight, **geometry)
        with torch.backends.nnpack.flags(enabled=False):
            return F.conv2d(x, weight, **geometry)


def _finish(node: Node, y: Tensor) -> Tensor:
    if node.relu:
        y = y.clamp_min(0)
    return y if node.out_max is None else y.round().clamp(0, node.out_max)


def _padded(node: Node, x: Tensor) -> Tensor:
    """x with its border, of zeros or of each channel's pad value (the mean pixel, before the first convolution)."""
    (top, left) = node.padding
    if not (top or left):
        return x
    if node.pad_values is None:
        return F.pad(x, (left, left, top, top))
    offset_C11 = node.pad_values.to(x.dtype).view(-1, 1, 1)
    return F.pad(x - offset_C11, (left, left, top, top)) + offset_C11


def _container(codes: Tensor, activation_max: int) -> torch.dtype:
    """The float type in which every accumulator over one output channel is an exact integer."""
    rows = codes.flatten(1).to(torch.int32).abs().sum(1)
    return torch.float32 if int(rows.max()) * activation_max < EXACT_FLOAT32 else torch.float64


def _integers(accumulator: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """An accumulator that is integer by meaning (see the head of this file), in the type that is computed in next."""
    return (accumulator.round() if accumulator.is_cuda else accumulator).to(dtype)
