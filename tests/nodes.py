"""Small nodes of packed networks and a small encoder; C++ kernels held against the reference, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quantization_utils import kernels
from quantization_utils.kernels import cpu, reference
from quantization_utils.nodes import Node

BACKENDS = [b for b in kernels.available_backends() if b.startswith("cpu-")]


def codes_of(shape: tuple[int, ...], bits: int | str = "ternary") -> Tensor:
    top = 1 if bits == "ternary" else 127
    codes = torch.randint(-top, top + 1, shape, dtype=torch.int8)
    codes.view(-1)[0] = top  # also a single code says something
    return codes


def conv(source: int, n: int, c: int, kernel: int = 3, stride: int = 1, padding: int = 1, **options: object) -> Node:
    """A convolution whose outputs use the whole range of its output codes."""
    bits = options.pop("weight_bits", "ternary")
    out_max = options.get("out_max", 63)
    spread = (c * kernel * kernel) ** 0.5 * (60 if bits == "ternary" else 5000)
    gain = (torch.rand(n) - 0.3) * (out_max or 1) / spread
    return Node(
        "conv", source, codes=codes_of((n, c, kernel, kernel), bits), weight_bits=bits, gain=gain,
        bias=torch.randn(n) * 10,
        kernel=(kernel, kernel), stride=(stride, stride), padding=(padding, padding),
        **{"out_max": 63, "relu": True, **options},
    )  # fmt: skip


def encoder_of(laid_out: Callable[[Tensor], Tensor] = lambda codes: codes) -> cpu.Encoder:
    """One layer, whose codes are laid out in some way; the same at every call."""
    torch.manual_seed(0)
    codes = [laid_out(codes_of(shape)) for shape in ((96, 32), (32, 32), (64, 32), (32, 64))]
    layer = cpu.EncoderLayer(*((c, torch.ones(len(c)), None) for c in codes), norms=[torch.ones(32)] * 4)
    return cpu.Encoder([layer], 2, 1e-6, 8)


def assert_equals_reference(nodes: list[Node], images: Tensor, backend: str) -> Tensor:
    """The outputs of nodes on a backend, which are those of the reference bit for bit."""
    expected = reference.NetworkExecutor(nodes)(images)
    executor = kernels.make_executor(nodes, backend)
    assert executor.backend == backend
    for _ in range(2):  # the first call also measures; the second finds used buffers
        got = executor(images)
        assert got.shape == expected.shape and got.dtype == torch.float32
        assert torch.equal(got, expected)
    assert expected.unique().numel() > 1  # the case says something
    return got


def images_of(batch: int, height: int, width: int, channels: int = 3) -> Tensor:
    return torch.randint(0, 256, (batch, channels, height, width)).float() / 255
