"""What a model costs: time, multiply-adds, zeros, bits. Sizes of files are `os.path.getsize`, nothing here.

Times are of the whole model on the CPU, on as many threads as PyTorch has: no loader, `torch.inference_mode`, warm-up
first. The model and the float model beside it take turns within the same seconds, so that when the processor's clock
or the load of the machine changes, both are affected alike.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.state import device_of, evaluating
from quantization_utils.bit_layers import BitConv2d, BitLinear, PackedConv2d, PackedLinear
from quantization_utils.network import PackedNetwork
from quantization_utils.nodes import IMAGE
from quantization_utils.packing import Bits, entropy_bits
from quantization_utils.storage import is_float16

LOG2_3 = math.log2(3)
BATCH_MACS = 2e10  # of the large batch: a few tenths of a second a call


# Time


def latency_beside(
    float_model: nn.Module, packed_model: nn.Module, image_size: int = 32, batch: int | None = None,
    seconds: float = 6.0,
) -> dict[str, Any]:  # fmt: skip
    """The two models' times on the CPU in one interleaved run, as fields of a row.

    latency_ms_p50_batch1, latency_ms_p90_batch1, throughput_images_per_s, throughput_batch and the first three again
    with `float_` before them. `batch`: None takes the power of two from 4 to 256 that comes to about 2·10^10
    multiply-adds, so that it depends on the model alone. Warm-up and measurement together take about `seconds`; each
    model is called at least three times, so a slow one takes longer.
    """
    models = [float_model, packed_model]
    if batch is None:
        limit = BATCH_MACS / max(count_macs(float_model, image_size), 1)
        batch = 2 ** int(math.log2(min(max(limit, 4), 256)))
    single = _times(models, _images(1, image_size), 0.4 * seconds, 400)
    many = _times(models, _images(batch, image_size), 0.6 * seconds, 50)
    fields: dict[str, Any] = {"throughput_batch": batch}
    for prefix, times_1, times_n in zip(("float_", ""), single, many, strict=True):
        fields[f"{prefix}latency_ms_p50_batch1"] = round(1e3 * _quantile(times_1, 0.5), 4)
        fields[f"{prefix}latency_ms_p90_batch1"] = round(1e3 * _quantile(times_1, 0.9), 4)
        fields[f"{prefix}throughput_images_per_s"] = round(batch / _quantile(times_n, 0.5), 2)
    return fields


@torch.inference_mode()
def _times(models: Sequence[nn.Module], images: Tensor, seconds: float, repeats: int) -> list[list[float]]:
    """Seconds of each call of each model. The models take turns in short blocks; the first call of a block is dropped,
    because it finds the other model's weights in the caches."""
    times: list[list[float]] = [[] for _ in models]

    def call(model: nn.Module) -> float:
        began = time.perf_counter()
        model(images)
        return time.perf_counter() - began

    began = time.monotonic()
    first = [min(call(model.eval()) for _ in range(2)) for model in models]  # kernels are built, memory is mapped
    while time.monotonic() - began < 0.1 * seconds:
        for model in models:
            call(model)
    began = time.monotonic()
    while min(map(len, times)) < 3 or (len(times[-1]) < repeats and time.monotonic() - began < 0.9 * seconds):
        for model, own, estimate in zip(models, times, first, strict=True):
            block = max(1, min(10, round(seconds / 40 / estimate)))
            if estimate < seconds / 20:
                call(model)
            own.extend(call(model) for _ in range(block))
    return times


def _images(batch: int, image_size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, 3, image_size, image_size), generator=generator).float() / 255


def _quantile(times: Sequence[float], q: float) -> float:
    return float(torch.tensor(times, dtype=torch.float64).quantile(q))


# Multiply-adds


def count_macs(model: nn.Module, image_size: int = 32) -> int:
    """Multiply-adds of the linear and convolution layers for one image of `image_size` pixels a side.

    Nominal: products with zero weights and with padding count. Attention's two products of activations, batch norms and
    additions do not (for ViT-B/16, attention's would add 4%).
    """
    if isinstance(model, PackedNetwork):
        return _macs_of_nodes(model, image_size)
    total = 0

    def add(module: Any, inputs: Any, output: Tensor) -> None:
        nonlocal total
        weight_shape = module.codes.shape if hasattr(module, "codes") else module.weight.shape
        # Each output number is a sum over one output channel's weights: (C / groups, kh, kw) or (K,).
        total += output.numel() * math.prod(weight_shape[1:])

    handles = [m.register_forward_hook(add) for m in model.modules() if isinstance(m, _LAYERS)]
    try:
        with torch.inference_mode(), evaluating(model):
            model(torch.zeros(1, 3, image_size, image_size, device=device_of(model)))
    finally:
        for handle in handles:
            handle.remove()
    return total


_LAYERS = (nn.Linear, nn.Conv2d, PackedLinear, PackedConv2d)


def _macs_of_nodes(network: PackedNetwork, image_size: int) -> int:
    side_of = {IMAGE: (image_size, image_size)}
    total = 0
    for index, node in enumerate(network.nodes):
        height, width = side_of[node.input]
        if node.op in ("conv", "max_pool"):
            height, width = (
                (size + 2 * pad - kernel) // stride + 1
                for size, pad, kernel, stride in zip(
                    (height, width), node.padding, node.kernel, node.stride, strict=True
                )
            )
        else:
            height = width = 1
        side_of[index] = (height, width)
        if node.codes is not None:
            total += node.codes.numel() * height * width
    return total


# Bits


def code_zero_fraction(model: nn.Module) -> float:
    """The fraction of zeros among the weights of linear and convolution layers; a zero code is one. Packed or not."""
    zeros = total = 0
    for weight, _ in _weights(model):
        zeros += weight.numel() - int(torch.count_nonzero(weight))
        total += weight.numel()
    return zeros / total


def weight_bits(model: nn.Module) -> float:
    """Nominal bits of a weight of linear and convolution layers, on average: log2(3) ternary, 8, or 32 if float."""
    sizes = [(w.numel(), {"ternary": LOG2_3, 8: 8.0, None: 32.0}[bits]) for w, bits in _weights(model)]
    return round(sum(n * bits for n, bits in sizes) / sum(n for n, _ in sizes), 4)


def ideal_bytes(model: nn.Module) -> int:
    """Entropy of each layer's codes as independent draws, and the other tensors' bytes as a file holds them.

    As `quantization_utils.inspection.FileReport.ideal_bytes`; a float32 tensor that is stored as float16 counts half.
    """
    bits = 0.0
    for tensor in _tensors(model):
        if tensor.dtype == torch.int8:
            bits += entropy_bits(tensor)
        else:
            bits += 8 * tensor.nbytes / (2 if is_float16(tensor.contiguous()) else 1)
    return math.ceil(bits / 8)


def _weights(model: nn.Module) -> Iterator[tuple[Tensor, Bits | None]]:
    """(codes, bits) of quantized layers and (weight, None) of float ones."""
    if isinstance(model, PackedNetwork):
        for node in model.nodes:
            if node.codes is not None:
                yield node.codes, node.weight_bits
        return
    for module in model.modules():
        if isinstance(module, (BitLinear, BitConv2d)):
            yield module.quantized_weight()[0], module.weight_bits
        elif isinstance(module, (PackedLinear, PackedConv2d)):
            yield module.codes, module.weight_bits
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            yield module.weight.detach(), None


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """What a packed model's file stores: int8 tensors are codes."""
    if isinstance(model, PackedNetwork):
        for node in model.nodes:
            yield from (t for t in (node.codes, node.gain, node.bias, node.pad_values) if t is not None)
    else:
        yield from (t.detach() for t in model.state_dict().values())
