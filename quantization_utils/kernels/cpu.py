"""Packed networks and layers on the C++ kernels: a whole network is one operator call and one parallel region.

Threads follow torch.get_num_threads(). Environment: TERNARY_ISA (amx, avx512vnni, avx2 or portable) forces an
instruction set; TERNARY_ALGORITHM forces how nodes are computed that have a choice (winograd: 3×3 convolutions;
skipping: linear layers, without their zero blocks; direct: none), which else is measured for each node and batch size
at the first call. Neither changes a result: all are exact.

C++ keeps what was made of a model under a number, which torch.export writes into the program: an exported program lives
as long as the packed model that it was made of, and in its process; anywhere else it raises a ValueError.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..nodes import IMAGE, Node
from . import build

ISAS = ("amx", "avx512vnni", "avx2", "portable")  # best first
ALGORITHMS = ("auto", "direct", "winograd", "skipping")

Dense = tuple[Tensor, Tensor, Tensor | None]  # codes int8 (N, K), scale (N,), bias (N,)


def isas() -> tuple[str, ...]:
    """The instruction sets that this processor runs, best first.

    Raises:
        build.BuildError: the kernels cannot be compiled here.
    """
    build.load()
    return tuple(isa for isa in ISAS if torch.ops.ternary.has_isa(isa))


def choose_isa(backend: str) -> str:
    """The instruction set of a backend name, "cpu" or "cpu-<isa>"; TERNARY_ISA decides for "cpu".

    Raises:
        ValueError: this processor does not have it.
    """
    wanted = backend.removeprefix("cpu").removeprefix("-") or os.environ.get("TERNARY_ISA", "")
    runnable = isas()
    if wanted and wanted not in runnable:
        raise ValueError(f"instruction set {wanted!r} cannot run here: choose one of {', '.join(runnable)}")
    return wanted or runnable[0]


class NetworkExecutor:
    """Runs packed nodes: images float32 (B, C, H, W) in [0, 1] on the CPU → logits float32 (B, classes).

    Pixels outside of [0, 1] count as the nearer end; one that is NaN makes all logits of its image NaN.
    """

    def __init__(self, nodes: Sequence[Node], backend: str = "cpu") -> None:
        isa = choose_isa(backend)
        algorithm = os.environ.get("TERNARY_ALGORITHM", "auto")
        if algorithm not in ALGORITHMS:
            raise ValueError(f"TERNARY_ALGORITHM is {algorithm!r}: choose one of {', '.join(ALGORITHMS)}")
        self.backend = f"cpu-{isa}"
        first = nodes[0].codes if nodes and nodes[0].input == IMAGE else None
        if first is None or any(node.op != "conv" for node in nodes if node.input == IMAGE):
            raise ValueError("what reads the image must be a convolution; use backend='reference' for other networks")
        self._handle = torch.ops.ternary.network_create(isa, algorithm, first.shape[1])
        weakref.finalize(self, torch.ops.ternary.network_free, self._handle).atexit = False
        for node in nodes:
            torch.ops.ternary.network_add(
                self._handle, op=node.op, input=node.input, residual=node.residual, residual_gain=node.residual_gain,
                relu=node.relu, out_max=node.out_max, kernel=node.kernel, stride=node.stride, padding=node.padding,
                is_ternary=node.codes is not None and _is_ternary(node.codes), codes=node.codes, gain=node.gain,
                bias=node.bias, pad_values=node.pad_values,
            )  # fmt: skip
        self._last_is_flat = nodes[-1].op in ("linear", "avg_pool")
        self._channels = _channels_out(nodes)[-1]

    def __call__(self, images: Tensor) -> Tensor:
        tail = [self._channels] if self._last_is_flat else self._spatial_tail(images)
        return torch.ops.ternary.network_run(images, self._handle, tail)

    def _spatial_tail(self, images: Tensor) -> list[int]:
        batch, _, height, width = images.shape
        return torch.ops.ternary.network_shape(self._handle, batch, height, width)[1:]

    def plan(self, batch: int, height: int = 32, width: int = 32) -> list[dict[str, Any]]:
        """One dict a node for a batch size that has run: op, algorithm, microseconds of each candidate, multiply-adds.

        Microseconds are None where an algorithm was not measured or cannot be used. Products with padding do not count.
        "images": how many a thread takes through a node at a time by itself; 0: all threads share the batch.
        """
        lines = torch.ops.ternary.network_describe(self._handle, batch, height, width).splitlines()
        names = ("node", "op", "algorithm", "direct_us", "winograd_us", "skipping_us", "multiply_adds", "images")
        types: tuple[Callable[[str], Any], ...] = (int, str, str, _micros, _micros, _micros, int, int)
        return [
            dict(zip(names, (t(v) for t, v in zip(types, line.split(), strict=True)), strict=True)) for line in lines
        ]


def _micros(text: str) -> float | None:
    return float(text) or None


class Linear:
    """Dynamic integer linear layer, as reference.Linear: x float32 (…, K) on the CPU → float32 (…, N)."""

    def __init__(
        self, codes_NK: Tensor, scale_N: Tensor, bias_N: Tensor | None, act_bits: int, backend: str = "cpu"
    ) -> None:
        isa = choose_isa(backend)
        if not 2 <= act_bits <= 8:
            raise ValueError(f"activations of {act_bits} bits are not supported: choose 2 to 8")
        self.backend, self._n = f"cpu-{isa}", codes_NK.shape[0]
        self._handle = torch.ops.ternary.linear_create(isa, codes_NK, scale_N, bias_N, _is_ternary(codes_NK), act_bits)
        weakref.finalize(self, torch.ops.ternary.linear_free, self._handle).atexit = False

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.ternary.linear_run(x, self._handle, self._n)


class Patches(Linear):
    """Dynamic integer convolution whose kernel is its stride, as reference.Conv2d: (B, C, H, W) → (B, N, H', W')."""

    def __init__(
        self, codes_NCHW: Tensor, scale_N: Tensor, bias_N: Tensor | None, act_bits: int, backend: str = "cpu"
    ) -> None:
        super().__init__(codes_NCHW.flatten(1), scale_N, bias_N, act_bits, backend)
        self._patch = list(codes_NCHW.shape[2:])

    def __call__(self, images: Tensor) -> Tensor:
        batch = images if images.dim() == 4 else images[None]
        out = torch.ops.ternary.patches_run(batch, self._handle, self._patch, self._n).permute(0, 3, 1, 2)
        return out if images.dim() == 4 else out[0]


@dataclass(frozen=True)
class EncoderLayer:
    """What `Encoder` needs of one transformer layer: its linear layers and the values of its LayerNorms."""

    qkv: Dense  # of width 3·D: queries, keys, values
    out: Dense
    fc1: Dense
    fc2: Dense
    norms: Sequence[Tensor]  # weight and bias, before attention, then before fc1; (D,) each


@dataclass(frozen=True)
class Embedding:
    """How images become an encoder's hidden states: normalised, quantized per image, and as patches of a linear layer.

    `positions` (1 + patches, D) are added, and have the class token in their first row. `mean`, `std`: (C,) of pixels.
    """

    patches: Dense  # codes (D, C, h, w)
    size: tuple[int, int]  # of images
    mean: Tensor
    std: Tensor
    positions: Tensor


@dataclass(frozen=True)
class Head:
    """How a class token becomes logits: weight and bias (D,) of the last LayerNorm, and the classifier."""

    norm: Sequence[Tensor]
    classifier: Dense


class Encoder:
    """A pre-norm transformer encoder with GELU: hidden states float32 (B, T, D) on the CPU, kept → (B, kept, D).

    What is returned are the hidden states of the first tokens; the last layer computes no others. With an `embedding`
    it takes images (B, C, H, W) in their place, and with a `head` it also gives logits of the first token (`classify`).

    Linear layers as `Linear`, exact integers; norms, GELU, softmax and attention in float32, whose sums are taken in
    another order than PyTorch's.
    """

    def __init__(
        self, layers: Sequence[EncoderLayer], heads: int, epsilon: float, act_bits: int, backend: str = "cpu",
        embedding: Embedding | None = None, head: Head | None = None,
    ) -> None:  # fmt: skip
        isa = choose_isa(backend)
        self.backend, self.embeds = f"cpu-{isa}", embedding is not None
        self.classes = len(head.classifier[0]) if head else 0

        def made(dense: Dense) -> Linear:  # kept here until C++, which gets its number, keeps it too
            return Linear(dense[0].flatten(1), *dense[1:], act_bits, backend)

        linears = [made(dense) for layer in layers for dense in (layer.qkv, layer.out, layer.fc1, layer.fc2)]
        patches = [made(embedding.patches)] if embedding else []
        classifier = [made(head.classifier)] if head else []
        self._handle = torch.ops.ternary.encoder_create(
            isa, heads, epsilon, [t for layer in layers for t in layer.norms], [linear._handle for linear in linears],
            [embedding.positions, embedding.mean, embedding.std] if embedding else [],
            [*embedding.size, *embedding.patches[0].shape[2:], patches[0]._handle] if embedding else [],
            head.norm if head else [], [linear._handle for linear in classifier],
        )  # fmt: skip
        self._width = layers[0].out[0].shape[0]
        weakref.finalize(self, torch.ops.ternary.encoder_free, self._handle).atexit = False

    def __call__(self, x: Tensor, kept: int) -> Tensor:
        return torch.ops.ternary.encoder_run(x, self._handle, [kept, self._width])

    def classify(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of images, with an `embedding`, or else of hidden states; needs a `head`."""
        return torch.ops.ternary.encoder_run(x, self._handle, [self.classes])


def _is_ternary(codes: Tensor) -> bool:
    """Whether all codes are in {-1, 0, 1}.

    Raises:
        ValueError: one is -128, which no quantizer makes and for which the kernels' 32-bit sums have no room.
    """
    if codes.numel() == 0:
        return True
    low, high = (int(value) for value in codes.aminmax())
    if low < -127:
        raise ValueError("a weight's code is -128: the kernels take codes from -127 to 127")
    return low >= -1 and high <= 1


def _channels_out(nodes: Sequence[Node]) -> list[int]:
    channels: list[int] = []
    for node in nodes:
        channels.append(channels[node.input] if node.codes is None else node.codes.shape[0])
    return channels
