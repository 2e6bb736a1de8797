"""The C++ kernels against the reference, bit for bit: every instruction set here, odd shapes, every option."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from quantization_utils import kernels
from quantization_utils.kernels import reference
from quantization_utils.nodes import Node
from tests.nodes import BACKENDS, assert_equals_reference, codes_of, conv, encoder_of, images_of

pytestmark = pytest.mark.skipif("cpu" not in kernels.available_backends(), reason="no C++ compiler")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [(1, 1, 0), (1, 2, 0), (3, 1, 1), (3, 2, 1), (3, 1, 0), (5, 1, 2), (5, 3, 1), (7, 2, 3), (3, 1, 2)],
)
@pytest.mark.parametrize(
    ("n", "c", "size", "batch"), [(64, 64, 8, 1), (97, 17, 9, 3), (1, 3, 33, 1), (257, 97, 7, 2), (16, 33, 12, 5)]
)
def test_convolution(
    backend: str, kernel: int, stride: int, padding: int, n: int, c: int, size: int, batch: int
) -> None:
    stem = conv(-1, c, 3, pad_values=torch.tensor([125, 3, 255], dtype=torch.uint8))
    assert_equals_reference(
        [stem, conv(0, n, c, kernel, stride, padding, out_max=None, relu=False)], images_of(batch, size, size), backend
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kernel", "stride", "padding"), [
    ((3, 5), (2, 1), (1, 2)), ((1, 7), (1, 3), (0, 3)), ((3, 3), (1, 2), (1, 1)), ((3, 3), (1, 1), (0, 2)),
    ((2, 4), (2, 4), (0, 0)),
])  # fmt: skip
@pytest.mark.parametrize("batch", [1, 4])
def test_kernels_that_are_not_square(
    backend: str, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], batch: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    codes = codes_of((33, 19, *kernel))
    node = replace(conv(0, 33, 19), codes=codes, kernel=kernel, stride=stride, padding=padding, out_max=None)
    for algorithm in ("direct", "winograd"):  # which takes one of them, and not one of the others
        monkeypatch.setenv("TERNARY_ALGORITHM", algorithm)
        assert_equals_reference([conv(-1, 19, 3), node], images_of(batch, 11, 14), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_surrounds_a_value_is_its_own(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes beyond those of the value itself, for which Winograd's bytes have no room; zeros around the value that is
    alike and comes after it in the same memory."""
    monkeypatch.setenv("TERNARY_ALGORITHM", "winograd")
    around = torch.full((16,), 255, dtype=torch.uint8)
    nodes = [conv(-1, 16, 3), conv(0, 16, 16, pad_values=around), conv(1, 16, 16), conv(2, 16, 16, out_max=None)]
    assert_equals_reference(nodes, images_of(2, 8, 6), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("out_max", [255, 63, 15])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("shortcut", [True, False])
def test_residuals_and_output_codes(backend: str, out_max: int, relu: bool, shortcut: bool) -> None:
    nodes = [conv(-1, 37, 3), conv(0, 37, 37, out_max=255)]
    if shortcut:
        nodes.append(conv(0, 37, 37, 1, 1, 0, out_max=None, relu=False))
    last = len(nodes) - 1
    nodes.append(conv(1, 37, 37, out_max=out_max, relu=relu, residual=last, residual_gain=0.37))
    nodes.append(conv(last + 1, 5, 37, out_max=None, relu=False))
    assert_equals_reference(nodes, images_of(2, 11, 6), backend)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("terms", [(1 + 2**-23, -255.0, 0.0), (1.0, 0.0, -1 - 2**-23)], ids=["bias", "residual"])
def test_products_are_rounded_with_their_sums(backend: str, terms: tuple[float, float, float]) -> None:
    """255 · (1 + 2^-23) - 255: what is left is what rounding the product alone would have changed."""
    gain, bias, residual_gain = terms
    one = Node("conv", -1, codes=torch.ones(1, 3, 1, 1, dtype=torch.int8), gain=torch.tensor([1 / 3]),
               bias=torch.zeros(1), out_max=255)  # fmt: skip
    last = Node("conv", 0, codes=torch.ones(1, 1, 1, 1, dtype=torch.int8), gain=torch.tensor([gain]),
                bias=torch.tensor([bias]), residual=0, residual_gain=residual_gain)  # fmt: skip
    found = kernels.make_executor([one, last], backend)(torch.ones(1, 3, 2, 2))
    assert found.abs().unique().tolist() == [255 * 2**-23]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [2, 3, 4, 5, 8, 17, 32])
@pytest.mark.parametrize("channels", [16, 64, 100, 130])
@pytest.mark.parametrize("top", [63, 255])  # tiles of 2x2 outputs in 8 bits, and of 4x4 in 16
def test_winograd_equals_direct(
    backend: str, size: int, channels: int, top: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Extreme activations and weights: the largest and 0, filters of equal signs.
    nodes = [
        conv(-1, channels, 3, out_max=top),
        conv(0, channels, channels, out_max=top),
        conv(1, channels, channels, out_max=None, residual=0, residual_gain=1.5),
    ]
    nodes[1].codes[0], nodes[1].codes[1], nodes[0].gain[:5] = 1, -1, 100.0
    for batch in (1, 7):
        for algorithm in ("winograd", "direct"):
            monkeypatch.setenv("TERNARY_ALGORITHM", algorithm)
            assert_equals_reference(nodes, images_of(batch, size, size + size % 3), backend)
    executor = kernels.make_executor(nodes, backend)
    monkeypatch.setenv("TERNARY_ALGORITHM", "winograd")
    executor = kernels.make_executor(nodes, backend)
    executor(images_of(1, size, size))
    whole_tiles = (size + 3) // 4 * 4
    algorithm = "winograd" if top == 63 or whole_tiles**2 < 2 * size**2 else "direct"
    assert [step["algorithm"] for step in executor.plan(1, size, size)] == ["direct", algorithm, algorithm]


def test_large_winograd_tiles_are_left_out_where_they_are_few() -> None:
    """One of 4x4 outputs is not worth its weights' memory, and is not even measured; four are."""
    executor = kernels.make_executor([conv(-1, 16, 3, out_max=255), conv(0, 16, 16)], "cpu")
    for size in (4, 8):
        executor(images_of(1, size, size))
        assert (executor.plan(1, size, size)[1]["winograd_us"] is None) == (size == 4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pixels_between_codes_and_out_of_range(backend: str) -> None:
    images = torch.linspace(-0.5, 1.5, 3 * 9 * 37).reshape(1, 3, 9, 37)
    images[0, 0, 0, :4] = torch.tensor([0.5, 1.5, 2.5, 254.5]) / 255  # halves go to the even code
    assert_equals_reference([conv(-1, 7, 3)], images, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("last", ["linear", "avg_pool"])
@pytest.mark.parametrize("batch", [2, 32])
def test_pixels_that_are_no_numbers_make_logits_nan(backend: str, last: str, batch: int) -> None:
    """Of their image and no other; infinite ones are the largest and the smallest code."""
    nodes = [conv(-1, 17, 3), Node("max_pool", 0, kernel=(2, 2), stride=(2, 2))]
    nodes.append(
        Node("avg_pool", 1, gain=torch.tensor([0.1])) if last == "avg_pool"
        else Node("linear", 1, codes=codes_of((5, 17 * 12)), gain=torch.rand(5), bias=torch.randn(5))
    )  # fmt: skip
    images = images_of(batch, 9, 6)
    images[0, 1, 3, 2], images[-1, 0, 0, 0], images[-1, 2, 2, 1] = float("nan"), float("inf"), -float("inf")
    expected = reference.NetworkExecutor(nodes)(images)
    assert expected[0].isnan().all() and expected[1:].isfinite().all()
    executor = kernels.make_executor(nodes, backend)
    assert torch.equal(executor(images).nan_to_num(7.0), expected.nan_to_num(7.0))
    assert torch.equal(executor(images.flip(0)).nan_to_num(7.0), expected.flip(0).nan_to_num(7.0))


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (5, 3, 4), (1, 2, 3)])
def test_multiply_adds_leave_padding_out(kernel: int, stride: int, padding: int) -> None:
    node = conv(-1, 5, 3, kernel, stride, padding)
    executor = kernels.make_executor([node], "cpu")
    executor(images_of(2, 9, 6))
    ones, taps = torch.ones(2, 3, 9, 6), torch.ones(5, 3, kernel, kernel)
    products = int(torch.nn.functional.conv2d(ones, taps, stride=stride, padding=padding).sum())
    assert [step["multiply_adds"] for step in executor.plan(2, 9, 6)] == [products]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", ["ternary", 8])
@pytest.mark.parametrize("batch", [1, 3, 31, 32])  # 31: parts of images of which the last is smaller
def test_a_whole_network(backend: str, bits: int | str, batch: int) -> None:
    """Convolutions, pools, flattening in NCHW order, linear layers, saturated 8-bit activations."""
    k = 35 * 3 * 2
    nodes = [
        conv(-1, 35, 3, out_max=255, weight_bits=bits),
        Node("max_pool", 0, kernel=(3, 3), stride=(2, 2), padding=(1, 1)),
        Node("max_pool", 1, kernel=(2, 2), stride=(1, 1)),
        Node("linear", 2, codes=codes_of((97, k), bits), weight_bits=bits, gain=torch.rand(97) / 50,
             bias=torch.randn(97), relu=True, out_max=255),
        Node("linear", 3, codes=codes_of((10, 97), bits), weight_bits=bits, gain=torch.rand(10), bias=torch.randn(10)),
    ]  # fmt: skip
    nodes[0].gain[:9] = 100.0
    assert_equals_reference(nodes, images_of(batch, 8, 5), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pools_end_where_their_input_ends(backend: str) -> None:
    """Also where a window reaches beyond the last row or column, into what surrounds the value for another reader."""
    for size in ((7, 6), (6, 7)):
        nodes = [conv(-1, 17, 3), conv(0, 1, 17, pad_values=torch.full((17,), 255, dtype=torch.uint8)),
                 Node("max_pool", 0, kernel=(3, 3), stride=(2, 2), padding=(1, 1))]  # fmt: skip
        assert_equals_reference(nodes, images_of(3, *size), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stride", [1, 2])
def test_pools_hand_on_codes_as_large_as_those_they_read(
    backend: str, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For which Winograd's bytes have no room."""
    monkeypatch.setenv("TERNARY_ALGORITHM", "winograd")
    nodes = [conv(-1, 16, 3, out_max=255), Node("max_pool", 0, kernel=(2, 2), stride=(2, 2)),
             conv(1, 9, 16, 3, stride, out_max=None)]  # fmt: skip
    nodes[0].gain[:9] = 100.0
    assert_equals_reference(nodes, images_of(2, 16, 16), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("out_max", [None, 255])
def test_average_pool(backend: str, out_max: int | None) -> None:
    nodes = [conv(-1, 21, 3, 3, 2), Node("avg_pool", 0, gain=torch.tensor([0.11]), out_max=out_max)]
    assert_equals_reference(nodes, images_of(3, 9, 13), backend)
    nodes.append(Node("linear", 1, codes=codes_of((7, 21)), gain=torch.rand(7), bias=torch.randn(7)))
    if out_max:
        assert_equals_reference(nodes, images_of(3, 9, 13), backend)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_tensors_are_floats_of_any_width_and_lie_in_any_order(dtype: torch.dtype) -> None:
    """What is run and, of what runs it, the codes."""

    def turned(x: Tensor) -> Tensor:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)

    convolution, patches, scale = conv(-1, 6, 3, out_max=None), codes_of((5, 3, 4, 2)), torch.ones(5)
    geometry = {"stride": (4, 2), "padding": (0, 0), "dilation": (1, 1), "groups": 1}

    def runs_of(laid_out: Callable[[Tensor], Tensor]) -> list[Callable[[Tensor], Tensor]]:
        return [
            kernels.make_executor([replace(convolution, codes=laid_out(convolution.codes))], "cpu"),
            kernels.make_linear(laid_out(patches.flatten(1)), scale, None, 8, "cpu"),
            kernels.make_conv(laid_out(patches), scale, None, 8, geometry, "cpu"),
            partial(encoder_of(laid_out), kept=2),
        ]

    inputs = images_of(2, 8, 6), torch.randn(7, 24), torch.rand(2, 3, 8, 6), torch.randn(2, 3, 32)
    for run, same, x in zip(runs_of(torch.clone), runs_of(turned), inputs, strict=True):
        x = x.to(dtype)
        assert torch.equal(run(turned(x)), run(x.float())) and torch.equal(same(x), run(x.float()))


def test_what_is_freed_is_forgotten() -> None:
    operators, images, x = torch.ops.ternary, images_of(1, 8, 8), torch.rand(2, 12)
    executor = kernels.make_executor([conv(-1, 8, 3)], "cpu")
    layer = kernels.make_linear(codes_of((5, 12)), torch.ones(5), None, 8, "cpu")
    for run, free, some in ((executor, operators.network_free, images), (layer, operators.linear_free, x)):
        run(some)
        free(run._handle)
        with pytest.raises(ValueError, match="no packed network or layer has the number"):
            run(some)


def test_operators_pass_opcheck_and_compile() -> None:
    nodes = [conv(-1, 16, 3), Node("avg_pool", 0, gain=torch.tensor([0.1]))]
    executor, images = kernels.make_executor(nodes, "cpu"), images_of(2, 8, 8)
    torch.library.opcheck(torch.ops.ternary.network_run, (images, executor._handle, [16]))
    layer, x = kernels.make_linear(codes_of((5, 7)), torch.rand(5), None, 8, "cpu"), torch.randn(3, 7)
    torch.library.opcheck(torch.ops.ternary.linear_run, (x, layer._handle, 5))
    compiled = torch.compile(lambda i: executor(i) * 2, backend="eager", fullgraph=True)
    assert torch.equal(compiled(images), executor(images) * 2)


def test_gradients_are_refused() -> None:
    layer, x = kernels.make_linear(codes_of((5, 7)), torch.rand(5), None, 8, "cpu"), torch.randn(3, 7)
    with pytest.raises(RuntimeError, match="derivative for ternary::linear_run is not implemented"):
        layer(x.requires_grad_()).sum().backward()


def test_what_makes_no_network_is_refused() -> None:
    with pytest.raises(ValueError, match="node 0 puts out codes that no byte holds"):
        kernels.make_executor([replace(conv(-1, 4, 3), out_max=300)], "cpu")
    layer = Node("linear", 0, codes=codes_of((5, 256)), gain=torch.ones(5), bias=torch.zeros(5))
    padded = replace(layer, kernel=(9, 1), padding=(8, 0))
    with pytest.raises(ValueError, match="node 1 has a kernel, stride or padding, and takes its whole input"):
        kernels.make_executor([conv(-1, 4, 3), padded], "cpu")
    shifted = Node("avg_pool", 0, gain=torch.ones(1), bias=torch.ones(1))
    with pytest.raises(ValueError, match="node 1 adds something to a pool"):
        kernels.make_executor([conv(-1, 4, 3), shifted], "cpu")
    for nodes in ([], [Node("max_pool", -1)], [conv(-1, 4, 3), Node("max_pool", -1)], [conv(0, 4, 3)]):
        with pytest.raises(ValueError, match="what reads the image must be a convolution"):
            kernels.make_executor(nodes, "cpu")
    with pytest.raises(ValueError, match="node 0 puts out codes that no byte holds"):
        kernels.make_executor([replace(conv(-1, 4, 3), out_max=0)], "cpu")
    for wrong in ({"padding": ()}, {"kernel": (3, 3, 7)}, {"stride": (2**32 + 1, 1)}):
        with pytest.raises(ValueError, match="a kernel, a stride and a padding are two numbers each"):
            kernels.make_executor([replace(conv(-1, 4, 3), **wrong)], "cpu")
    for other in (-1, 0):
        with pytest.raises(ValueError, match="node 0 adds what is no earlier node"):
            kernels.make_executor([replace(conv(-1, 3, 3), residual=other)], "cpu")
    with pytest.raises(ValueError, match="node 1 pads more than half of its kernel"):
        kernels.make_executor([conv(-1, 4, 3), Node("max_pool", 0, kernel=(3, 3), padding=(1, 2))], "cpu")


def test_a_network_that_is_refused_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    made, freed = [], []
    operators = torch.ops.ternary
    create, free = operators.network_create, operators.network_free
    monkeypatch.setattr(operators, "network_create", lambda *args: made.append(create(*args)) or made[-1])
    monkeypatch.setattr(operators, "network_free", lambda handle: freed.append(handle) or free(handle))
    with pytest.raises(ValueError, match="node 1 has not one gain"):
        kernels.make_executor([conv(-1, 4, 3), Node("avg_pool", 0, gain=torch.ones(2))], "cpu")
    gc.collect()
    assert made and made == freed


def test_zeros_around_an_image_are_zeros_however_they_are_given() -> None:
    nodes = [conv(-1, 4, 3), conv(0, 5, 4), replace(conv(0, 5, 4), pad_values=torch.zeros(4, dtype=torch.uint8)),
             replace(conv(2, 5, 5), residual=1, residual_gain=0.5)]  # fmt: skip
    assert_equals_reference(nodes, images_of(3, 8, 8), BACKENDS[0])


def test_a_network_takes_its_nodes_before_it_runs() -> None:
    executor, images = kernels.make_executor([conv(-1, 4, 3)], "cpu"), images_of(1, 8, 8)
    pool: dict[str, Any] = {
        "residual": None, "residual_gain": 0.0, "relu": False, "out_max": None, "kernel": (2, 2), "stride": (2, 2),
        "padding": (0, 0), "is_ternary": False, "codes": None, "gain": None, "bias": None, "pad_values": None,
    }  # fmt: skip
    with pytest.raises(ValueError, match="there is no operation min_pool"):
        torch.ops.ternary.network_add(executor._handle, op="min_pool", input=0, **pool)
    with pytest.raises(ValueError, match="node 1 reads no earlier node"):
        torch.ops.ternary.network_add(executor._handle, op="max_pool", input=1, **pool)
    executor(images)
    with pytest.raises(ValueError, match="a network that has run takes no more nodes"):
        torch.ops.ternary.network_add(executor._handle, op="max_pool", input=0, **pool)
    empty = torch.ops.ternary.network_create("portable", "auto", 3)
    with pytest.raises(ValueError, match="a network without nodes"):
        torch.ops.ternary.network_run(images, empty, [3, 8, 8])


def test_environment_and_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERNARY_ISA", "portable")
    assert kernels.make_executor([conv(-1, 4, 3)], "auto").backend == "cpu-portable"
    monkeypatch.setenv("TERNARY_ISA", "sse9")
    with pytest.raises(ValueError, match="cannot run here"):
        kernels.make_executor([conv(-1, 4, 3)], "cpu")
    assert kernels.make_executor([conv(-1, 4, 3)], "cpu-portable").backend == "cpu-portable"  # what is asked for counts
    with pytest.raises(ValueError, match="unknown backend"):
        kernels.make_executor([conv(-1, 4, 3)], "gpu")
    assert kernels.make_executor([conv(-1, 4, 3)], "reference").backend == "reference"
    monkeypatch.setenv("TERNARY_ALGORITHM", "fast")
    with pytest.raises(ValueError, match="TERNARY_ALGORITHM is 'fast': choose one of auto, direct, winograd, skipping"):
        kernels.make_executor([conv(-1, 4, 3)], "cpu-portable")
