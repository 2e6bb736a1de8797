"""What is just within and just beyond the limits of the C++ kernels, and what they refuse."""

from __future__ import annotations

import platform
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantization_utils import kernels
from quantization_utils.kernels import cpu, reference
from quantization_utils.nodes import Node
from quantization_utils.storage_checks import MAX_NODES
from tests.nodes import BACKENDS, assert_equals_reference, codes_of, conv, images_of

pytestmark = pytest.mark.skipif("cpu" not in kernels.available_backends(), reason="no C++ compiler")


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists() or platform.machine() != "x86_64", reason="Linux on x86 only")
def test_every_instruction_set_that_the_processor_has_can_be_chosen() -> None:
    """One that got lost in compiling would be missed by nobody: the next best runs."""
    flags = set(Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split())
    needed = {"amx": {"amx_int8", "avx512_vnni"}, "avx512vnni": {"avx512_vnni"}, "avx2": {"avx2"}, "portable": set()}
    assert cpu.isas() == tuple(isa for isa in cpu.ISAS if needed[isa] <= flags)


def extremes(bits: int | str, pixels: int) -> tuple[list[Node], Tensor]:
    """A linear layer that reads 256 channels of so many pixels, all 255, with weights that are all equal; the image."""
    top = 1 if bits == "ternary" else 127
    weight = torch.tensor([top, -top], dtype=torch.int8)[:, None].expand(2, 256 * pixels).contiguous()
    stem = Node("conv", -1, codes=torch.ones(256, 1, 1, 1, dtype=torch.int8), gain=torch.ones(256),
                bias=torch.zeros(256), out_max=255)  # fmt: skip
    linear = Node("linear", 0, codes=weight, weight_bits=bits, gain=torch.ones(2), bias=torch.zeros(2))
    return [stem, linear], torch.ones(1, 1, 1, pixels)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("bits", "pixels"), [("ternary", 514), ("ternary", 515), ("ternary", 32896), (8, 259)])
@pytest.mark.parametrize("rows", [1, 5])  # few rows go another way than many
def test_largest_accumulators_do_not_overflow(backend: str, bits: int | str, pixels: int, rows: int) -> None:
    """As many inputs as two bits hold, signed bytes (515: the first that two bits do not), 8-bit weights."""
    nodes, image = extremes(bits, pixels)
    top = (1 if bits == "ternary" else 127) * 255 * 256 * pixels
    images = image.expand(rows, 1, 1, pixels)
    logits = assert_equals_reference(nodes, images, backend)
    assert logits.tolist() == [torch.tensor([top, -top]).float().tolist()] * rows
    linear = kernels.make_linear(nodes[1].codes, torch.ones(2), None, 8, backend)
    x = torch.ones(rows, 256 * pixels)
    assert torch.equal(linear(x), reference.Linear(nodes[1].codes, torch.ones(2), None, 8)(x))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("top", "stride"), [(63, 1), (63, 2), (255, 1)])
def test_largest_products_of_winograd_do_not_overflow(
    backend: str, top: int, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kernel of +-1 on activations of 0 and the largest, all 64 channels alike: 16-bit sums of pairs too."""
    monkeypatch.setenv("TERNARY_ALGORITHM", "winograd")
    signs = 1 - 2 * (torch.arange(512)[:, None] >> torch.arange(9) & 1).to(torch.int8)
    stem = Node("conv", -1, codes=torch.ones(64, 1, 1, 1, dtype=torch.int8), gain=torch.full((64,), top / 255),
                bias=torch.zeros(64), out_max=top)  # fmt: skip
    codes = signs.view(512, 1, 3, 3).expand(512, 64, 3, 3).contiguous()
    every = Node("conv", 0, codes=codes, gain=torch.ones(512), bias=torch.zeros(512), kernel=(3, 3),
                 stride=(stride, stride), padding=(1, 1))  # fmt: skip
    images = torch.randint(0, 2, (4, 1, 12, 12)).float()
    images[0] = 0
    blocks = torch.arange(12) // 2 % 2
    images[1, 0] = (blocks[:, None] == blocks).float()  # the largest values of 4x4 outputs' transform
    outputs = assert_equals_reference([stem, every], images, backend)
    assert outputs[:, 0].max() == top * 64 * 9


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels", [13999, 14700])  # the most that it takes, and so many that it would be wrong
def test_sums_of_winograd_may_wrap_around(backend: str, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile of 4x4 outputs adds up to 576 times its result, beyond 32 bits."""
    monkeypatch.setenv("TERNARY_ALGORITHM", "winograd")
    stem = Node("conv", -1, codes=torch.ones(channels, 1, 1, 1, dtype=torch.int8), gain=torch.ones(channels),
                bias=torch.zeros(channels), out_max=255)  # fmt: skip
    codes = torch.tensor([1, -1], dtype=torch.int8)[:, None, None, None].expand(2, channels, 3, 3).contiguous()
    sums = Node("conv", 0, codes=codes, gain=torch.ones(2), bias=torch.zeros(2), kernel=(3, 3), padding=(1, 1))
    outputs = assert_equals_reference([stem, sums], torch.ones(1, 1, 4, 4), backend)
    largest = float(torch.tensor(255 * 9 * channels, dtype=torch.float32))
    assert outputs[0, :, 1, 1].tolist() == [largest, -largest]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("bits", "pixels"), [("ternary", 32897), (8, 260)])
def test_more_inputs_than_32_bits_can_sum_are_refused(backend: str, bits: int | str, pixels: int) -> None:
    nodes, image = extremes(bits, pixels)
    with pytest.raises(ValueError, match="too many inputs for 32-bit accumulators"):
        kernels.make_executor(nodes, backend)(image)
    with pytest.raises(ValueError, match="too many inputs for 32-bit accumulators"):
        kernels.make_linear(nodes[1].codes, torch.ones(2), None, 8, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_average_of_a_large_plane_is_exact(backend: str) -> None:
    """Its sum is beyond 2^24, where float32 has no odd integers."""
    stem = Node("conv", -1, codes=torch.ones(1, 1, 1, 1, dtype=torch.int8), gain=torch.ones(1), bias=torch.zeros(1),
                out_max=255)  # fmt: skip
    image = torch.ones(1, 1, 300, 301)
    image[0, 0, 0, :8] = 0
    nodes = [stem, Node("avg_pool", 0, gain=torch.ones(1))]
    assert kernels.make_executor(nodes, backend)(image).item() == 255 * (300 * 301 - 8)
    assert reference.NetworkExecutor(nodes)(image).item() == 255 * (300 * 301 - 8)


def test_a_plane_whose_sum_is_beyond_32_bits_is_refused() -> None:
    executor = kernels.make_executor([conv(-1, 4, 3), Node("avg_pool", 0, gain=torch.ones(1))], "cpu")
    shape = torch.ops.ternary.network_shape
    assert shape(executor._handle, 1, 8421504, 1) == [1, 4]
    with pytest.raises(ValueError, match="node 1 averages too many pixels for 32-bit sums"):
        shape(executor._handle, 1, 8421505, 1)


def test_networks_longer_than_a_parallel_region_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest that fit, on two threads, and one node more; a model file's limit is below."""
    images = images_of(1, 2, 2)
    pool = Node("max_pool", 0)
    monkeypatch.setenv("TERNARY_ALGORITHM", "direct")  # measures nothing
    nodes = [conv(-1, 4, 3), *(replace(pool, input=i) for i in range(1022))]
    torch.set_num_threads(2)
    assert_equals_reference(nodes, images, "cpu-portable")
    with pytest.raises(ValueError, match="more than 1023 nodes"):
        kernels.make_executor([*nodes, replace(pool, input=1022)], "cpu")
    assert len(nodes) >= MAX_NODES


def test_codes_that_no_layer_has_are_refused() -> None:
    """-128, whose magnitude int8 does not hold; no inputs at all."""
    codes = torch.tensor([[-128, 0, 1]], dtype=torch.int8)
    with pytest.raises(ValueError, match="code is -128"):
        kernels.make_linear(codes, torch.ones(1), None, 8, "cpu")
    node = Node("conv", -1, codes=codes.view(1, 3, 1, 1), gain=torch.ones(1), bias=torch.ones(1))
    with pytest.raises(ValueError, match="code is -128"):
        kernels.make_executor([node], "cpu")
    with pytest.raises(ValueError, match="without inputs"):
        kernels.make_linear(codes[:, :0], torch.ones(1), None, 8, "cpu")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"gain": torch.ones(1)}, "one gain and one bias for each channel"),
        ({"bias": torch.ones(9)}, "one gain and one bias for each channel"),
        ({"kernel": (5, 5)}, "codes of another shape"),
        ({"stride": (0, 1)}, "no such kernel, stride or padding"),
        ({"pad_values": torch.zeros(1, dtype=torch.uint8)}, "pads other channels than it reads"),
    ],
)
def test_nodes_whose_tensors_do_not_fit_are_refused(changes: dict[str, object], sentence: str) -> None:
    """Nothing is read beyond the end of a tensor."""
    with pytest.raises(ValueError, match=sentence):
        kernels.make_executor([replace(conv(-1, 8, 3), **changes)], "cpu")


@pytest.mark.parametrize(
    ("second", "sentence"),
    [
        (replace(conv(0, 4, 8), residual=0), "node 1 adds a value of another shape"),
        (replace(conv(0, 8, 8, stride=2), residual=0), "node 1 adds a value of another shape"),
        (conv(0, 4, 8, 11), "node 1 has a kernel larger than its input"),
        (Node("linear", 0, codes=codes_of((5, 511)), gain=torch.ones(5), bias=torch.ones(5)),
         "node 1 expects 511 inputs and reads 512"),
    ],
)  # fmt: skip
def test_nodes_that_do_not_fit_what_they_read_are_refused(second: Node, sentence: str) -> None:
    executor = kernels.make_executor([conv(-1, 8, 3), second], "cpu")
    for _ in range(2):
        with pytest.raises(ValueError, match=sentence):
            executor(images_of(1, 8, 8))


def test_linear_layers_whose_tensors_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="one scale and one bias for each channel"):
        kernels.make_linear(codes_of((9, 37)), torch.ones(1), None, 8, "cpu")
    for bits in (1, 9):
        with pytest.raises(ValueError, match=f"activations of {bits} bits are not supported: choose 2 to 8"):
            kernels.make_linear(codes_of((9, 37)), torch.ones(9), None, bits, "cpu")


def test_wrong_shapes_are_named() -> None:
    executor = kernels.make_executor([conv(-1, 8, 3), conv(0, 8, 9)], "cpu")
    with pytest.raises(ValueError, match="expects 9 channels and reads 8"):
        executor(images_of(1, 8, 8))
    with pytest.raises(ValueError, match="node 1 reads a float32 value"):
        kernels.make_executor([conv(-1, 8, 3, out_max=None), conv(0, 5, 8)], "cpu")(images_of(1, 8, 8))
    with pytest.raises(ValueError, match="no batch of 1 images of 8 x 8 has run lately"):
        executor.plan(1, 8, 8)
    with pytest.raises(ValueError, match="images must be"):
        kernels.make_executor([conv(-1, 8, 3)], "cpu")(images_of(1, 8, 8, channels=4))
    assert kernels.make_executor([conv(-1, 8, 3)], "cpu")(images_of(0, 8, 8)[:0].reshape(0, 3, 8, 8)).shape[0] == 0


def test_operators_that_are_called_with_other_shapes_refuse_them() -> None:
    """Nothing is read or written beyond the end of a tensor, whoever calls them."""
    ops, codes = torch.ops.ternary, codes_of((5, 12))
    with pytest.raises(ValueError, match="codes are .channels, inputs. or"):
        kernels.make_executor([conv(-1, 8, 3), replace(conv(0, 8, 8), codes=torch.ones(8, dtype=torch.int8))], "cpu")
    executor = kernels.make_executor([conv(-1, 8, 3)], "cpu")
    with pytest.raises(ValueError, match="images must be .batch, 3, height, width."):
        ops.network_run(torch.rand(1, 3, 8), executor._handle, [8, 8, 8])
    with pytest.raises(ValueError, match="another size than the network was prepared for"):
        ops.network_run(torch.rand(1, 3, 8, 8), executor._handle, [8, 8, 7])
    with pytest.raises(ValueError, match="codes .channels, inputs. and one scale and one bias"):
        kernels.make_linear(codes, torch.ones(5), torch.ones(4), 8, "cpu")
    with pytest.raises(ValueError, match="codes .channels, inputs. and one scale and one bias"):
        kernels.make_linear(codes.view(5, 3, 4), torch.ones(5), None, 8, "cpu")
    layer = kernels.make_linear(codes, torch.ones(5), None, 8, "cpu")
    for x, n in ((torch.rand(2, 11), 5), (torch.rand(2, 12), 6)):
        with pytest.raises(ValueError, match="the layer expects rows of 12 numbers"):
            ops.linear_run(x, layer._handle, n)
    with pytest.raises(ValueError, match="images must be .batch, 3, height, width."):
        ops.patches_run(torch.rand(1, 3, 2, 2), layer._handle, [2, 2], 6)
    with pytest.raises(ValueError, match="this processor has no sse9"):
        ops.network_create("sse9", "auto", 3)


@pytest.mark.parametrize("other", [None, torch.tensor([7, 7, 8], dtype=torch.uint8)])
def test_two_paddings_of_one_value_are_refused(other: Tensor | None) -> None:
    mean = torch.tensor([7, 7, 7], dtype=torch.uint8)
    nodes = [conv(-1, 4, 3, pad_values=mean), conv(-1, 4, 3, pad_values=other, residual=0, residual_gain=1.0)]
    with pytest.raises(ValueError, match="pad one value differently"):
        kernels.make_executor(nodes, BACKENDS[0])(images_of(1, 8, 8))
