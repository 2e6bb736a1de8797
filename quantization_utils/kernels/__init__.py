"""Kernels of packed models: a reference that defines the results, and C++ for the CPU that equals it bit for bit.

Backends: "reference" (PyTorch, any device), "cpu" (C++, the best instruction set of this processor) or one of its
instruction sets by name ("cpu-amx", "cpu-avx512vnni", "cpu-avx2", "cpu-portable"), and "auto": "cpu" where the model
lies on the CPU and the kernels can be compiled, else "reference".
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..nodes import Node
from . import build, cpu, reference

NO_KERNEL = (
    "backend {backend!r} has no kernel for a convolution whose inputs are scaled dynamically, but of patches side by "
    "side: calibrate the model before packing (calibrate_), or choose auto"
)


def available_backends() -> tuple[str, ...]:
    """Names that can be requested here. Compiles the C++ kernels if that was not done before."""
    try:
        return ("reference", "cpu", *(f"cpu-{isa}" for isa in cpu.isas()))
    except build.BuildError:
        return ("reference",)


def make_executor(nodes: Sequence[Node], backend: str = "auto") -> Any:
    """A function images float32 (B, C, H, W) → logits float32 (B, classes), with the attribute `backend`.

    Raises:
        ValueError: the backend was asked for by name and cannot run here.
    """
    chosen = _chosen(backend, [n.codes for n in nodes])
    if chosen == "reference":
        return reference.NetworkExecutor(nodes)
    return cpu.NetworkExecutor(nodes, chosen)


def make_linear(
    codes_NK: Tensor, scale_N: Tensor, bias_N: Tensor | None, act_bits: int = 8, backend: str = "auto"
) -> Any:
    """A function x float (…, K) → float32 (…, N) with activations quantized per token, with the attribute `backend`.

    Raises:
        ValueError: the backend was asked for by name and cannot run here.
    """
    chosen = _chosen(backend, [codes_NK])
    if chosen == "reference":
        return reference.Linear(codes_NK, scale_N, bias_N, act_bits)
    return cpu.Linear(codes_NK, scale_N, bias_N, act_bits, chosen)


def make_conv(
    codes: Tensor, scale_N: Tensor, bias_N: Tensor | None, act_bits: int, geometry: dict[str, Any],
    backend: str = "auto",
) -> Any:  # fmt: skip
    """A function images float (B, C, H, W) → float32 (B, N, H', W') with activations quantized per image.

    `geometry`: stride, padding, dilation, groups. The kernels take patches side by side; "auto" leaves others to the
    reference. (Convolutions of a calibrated network have no dynamic scale, and are nodes: see `make_executor`.)

    Raises:
        ValueError: the backend was asked for by name and cannot run here.
    """
    chosen = _chosen(backend, [codes])
    if chosen != "reference" and not has_kernel(codes, geometry):
        if backend != "auto":
            raise ValueError(NO_KERNEL.format(backend=backend))
        chosen = "reference"
    if chosen == "reference":
        return reference.Conv2d(codes, scale_N, bias_N, act_bits, geometry)
    return cpu.Patches(codes, scale_N, bias_N, act_bits, chosen)


def has_kernel(codes: Tensor, geometry: dict[str, Any]) -> bool:
    """Whether the C++ kernels take a convolution with dynamically scaled inputs: of patches side by side."""
    return geometry == {"stride": tuple(codes.shape[2:]), "padding": (0, 0), "dilation": (1, 1), "groups": 1}


def make_encoder(
    layers: Sequence[dict[str, Any]], heads: int, epsilon: float, act_bits: int,
    embedding: dict[str, Any] | None = None, head: dict[str, Any] | None = None, backend: str = "auto",
) -> Any:  # fmt: skip
    """`cpu.Encoder` of a transformer's layers; None where the modules are to run one by one, on the reference.

    `layers`: the fields of `cpu.EncoderLayer`, of each. `embedding`, `head`: those of `cpu.Embedding` and `cpu.Head`,
    if these are part of it.

    Raises:
        ValueError: the backend was asked for by name and cannot run here.
    """
    chosen = _chosen(backend, [layers[0]["qkv"][0]])
    if chosen == "reference":
        return None
    return cpu.Encoder(
        [cpu.EncoderLayer(**layer) for layer in layers], heads, epsilon, act_bits, chosen,
        None if embedding is None else cpu.Embedding(**embedding), None if head is None else cpu.Head(**head),
    )  # fmt: skip


def _chosen(backend: str, tensors: Sequence[Tensor | None]) -> str:
    """The backend that runs for a name, on the device of the first of the tensors that is not None."""
    if torch.compiler.is_compiling():  # kernels are chosen and filled with values, which a tracer does not see
        raise RuntimeError(
            "run the packed model on one image before torch.compile or torch.export: its kernels are made then"
        )
    return resolve(backend, next((t.device.type for t in tensors if t is not None), "cpu"))


def resolve(backend: str, device: str) -> str:
    """The backend that runs for a name: "reference", or "cpu" with or without an instruction set. `device`: its type.

    Raises:
        ValueError: an unknown name, or a backend that cannot run here.
    """
    if backend == "reference":
        return backend
    if backend == "auto":
        return "cpu" if device == "cpu" and not _why_not() else "reference"
    if not (backend == "cpu" or backend.startswith("cpu-")):
        raise ValueError(f"unknown backend {backend!r}: choose one of auto, {', '.join(available_backends())}")
    if device != "cpu":
        raise ValueError(f"backend {backend!r} cannot run on {device}: move the model to the CPU or choose reference")
    try:
        build.load()
    except build.BuildError as error:
        raise ValueError(f"backend {backend!r} cannot run here: {error}") from error
    if backend not in (available := available_backends()):
        raise ValueError(f"backend {backend!r} cannot run here: choose one of auto, {', '.join(available)}")
    return backend


@cache
def _why_not() -> str:
    """Why "auto" is the reference here, warned of once; empty if it is not."""
    try:
        build.load()
    except build.BuildError as error:
        warnings.warn(f"packed models run on the slow reference kernels: {error}", stacklevel=4)
        return str(error)
    return ""
