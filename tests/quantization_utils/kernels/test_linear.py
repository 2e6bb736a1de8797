"""Linear layers and patches in C++ against the reference, bit for bit, with and without their zero blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantization_utils import kernels
from quantization_utils.kernels import reference
from quantization_utils.nodes import Node
from tests.nodes import BACKENDS, assert_equals_reference, codes_of, conv, images_of

pytestmark = pytest.mark.skipif("cpu" not in kernels.available_backends(), reason="no C++ compiler")


def pruned_codes(n: int, k: int, kind: str) -> Tensor:
    """Ternary codes whose zeros are: single, whole blocks, all of some channels' vectors, everything."""
    codes = codes_of((n, k)) | 1
    if kind == "single":
        return codes * torch.rand(n, k).ge(0.95)
    if kind == "blocks":
        return (
            codes * torch.rand(n // 16 + 1, k // 5 + 1).ge(0.7).repeat_interleave(16, 0).repeat_interleave(5, 1)[:n, :k]
        )
    codes[16:48] = 0
    return codes * (kind != "everything")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["single", "blocks", "channels", "everything"])
@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("algorithm", ["skipping", "auto"])
def test_zero_blocks_are_skipped(
    backend: str, kind: str, batch: int, algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly, on saturated 8-bit activations with a border beside them, and a shortcut around the second layer."""
    monkeypatch.setenv("TERNARY_ALGORITHM", algorithm)
    k = 35 * 5 * 3
    nodes = [
        conv(-1, 35, 3, out_max=255),
        conv(0, 8, 35),  # its padding gives the linear layer's input a border
        Node("linear", 0, codes=pruned_codes(97, k, kind), gain=torch.rand(97) / 50, bias=torch.randn(97) * 9,
             relu=True, out_max=255),
        Node("linear", 2, codes=pruned_codes(97, 97, kind), gain=torch.rand(97), bias=torch.randn(97), out_max=63,
             residual=2, residual_gain=0.7),
        Node("linear", 3, codes=codes_of((10, 97)), gain=torch.rand(10), bias=torch.randn(10)),
    ]  # fmt: skip
    nodes[0].gain[:9] = 100.0
    assert_equals_reference(nodes, images_of(batch, 5, 3), backend)
    if algorithm == "skipping":
        executor = kernels.make_executor(nodes, backend)
        executor(images_of(batch, 5, 3))
        assert [step["algorithm"] for step in executor.plan(batch, 5, 3)] == ["direct", "direct", *["skipping"] * 3]


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_pattern_of_bytes_is_gathered(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Channel n reads the inputs whose bit in n is set, of each eight differently rotated."""
    monkeypatch.setenv("TERNARY_ALGORITHM", "skipping")
    columns = torch.arange(136)
    codes = (torch.arange(256)[:, None] >> (columns + columns // 8) % 8 & 1).to(torch.int8)
    # Vectors of channels share what they read: 16 channels apart, the widest reads one pattern.
    codes = codes.repeat_interleave(16, 0)
    nodes = [conv(-1, 136, 3, out_max=255),
             Node("linear", 0, codes=codes, gain=torch.ones(4096), bias=torch.zeros(4096))]  # fmt: skip
    assert_equals_reference(nodes, images_of(2, 1, 1), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", ["ternary", 8])
@pytest.mark.parametrize(("rows", "k", "n"), [(1, 1, 1), (3, 17, 97), (65, 384, 257), (32, 1025, 64), (2, 3072, 10)])
@pytest.mark.parametrize("act_bits", [8, 6])
def test_dynamic_linear(backend: str, bits: int | str, rows: int, k: int, n: int, act_bits: int) -> None:
    x = torch.randn(2, rows, k) * torch.logspace(-8, 3, rows)[:, None]
    x[0, 0] = 0
    scale, bias = torch.rand(n), torch.randn(n)
    codes = codes_of((n, k), bits)
    for b in (bias, None):
        layer = kernels.make_linear(codes, scale, b, act_bits, backend)
        assert torch.equal(layer(x), reference.Linear(codes, scale, b, act_bits)(x))
        assert torch.equal(layer(x.transpose(0, 1)), layer(x).transpose(0, 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_rows_than_before_have_room(backend: str) -> None:
    codes = codes_of((5, 300))
    layer, x = kernels.make_linear(codes, torch.ones(5), None, 8, backend), torch.randn(3000, 300)
    for rows in (1, 3000):
        assert torch.equal(layer(x[:rows]), reference.Linear(codes, torch.ones(5), None, 8)(x[:rows]))


def test_memory_of_many_rows_is_given_back() -> None:
    layer, x = kernels.make_linear(codes_of((1, 4096)), torch.ones(1), None, 8, "cpu"), torch.randn(8200, 4096)
    found = layer(x)  # more than 32 MB of codes
    assert torch.equal(layer(x), found) and torch.equal(layer(x[:9]), found[:9])


@pytest.mark.parametrize("backend", BACKENDS)
def test_codes_far_below_zero_alone_are_not_taken_for_ternary_ones(backend: str) -> None:
    layer, x = (-codes_of((21, 70), 8).abs(), torch.rand(21), None, 8), torch.randn(3, 70)
    assert torch.equal(kernels.make_linear(*layer, backend)(x), reference.Linear(*layer)(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_scales_are_rounded_once(backend: str) -> None:
    """127 / 4.0919943 times the second activation is half-way between two codes; by way of the reciprocal it is not."""
    layer = (torch.eye(2, dtype=torch.int8), torch.ones(2), None, 8)
    x = torch.tensor([[4.091994285583496, -1.047163963317871]])
    expected = torch.tensor([[127, -32]]) * (x[0, 0] / 127)
    assert torch.equal(reference.Linear(*layer)(x), expected)
    assert torch.equal(kernels.make_linear(*layer, backend)(x), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("k", [1, 17, 64])
def test_rows_that_are_not_finite_become_nan(backend: str, bad: float, k: int) -> None:
    """All of their outputs, wherever it stands, as the reference's; no other rows'."""
    layer, x = (codes_of((37, k)), torch.rand(37), torch.randn(37), 8), torch.randn(k + 1, k)
    x[range(k), range(k)] = bad
    found = kernels.make_linear(*layer, backend)(x)
    assert found[:k].isnan().all() and found[k].isfinite().all()
    assert torch.equal(found.nan_to_num(7.0), reference.Linear(*layer)(x).nan_to_num(7.0))
    patches, images = codes_of((37, 1, 1, k)), torch.stack([x, torch.randn(k + 1, k)])[:, None]
    geometry = {"stride": (1, k), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
    found = kernels.make_conv(patches, *layer[1:], geometry, backend)(images)
    assert found[0].isnan().all() and found[1].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("shape", "size", "act_bits"),
    [((9, 3, 4, 4), (32, 32), 8), ((70, 3, 8, 8), (24, 16), 8), ((7, 2, 3, 5), (10, 17), 4), ((5, 1, 1, 1), (1, 3), 8)],
)
def test_patches_equal_the_reference(
    backend: str, shape: tuple[int, ...], size: tuple[int, int], act_bits: int
) -> None:
    """Also patches that leave a border over, whose pixels count for the scale; whatever the threads and the batch."""
    codes, scale, bias = codes_of(shape), torch.rand(shape[0]), torch.randn(shape[0])
    geometry = {"stride": shape[2:], "padding": (0, 0), "dilation": (1, 1), "groups": 1}
    images = torch.randn(5, shape[1], *size)
    images[1, :, -1, -1] = 9.0
    expected = reference.Conv2d(codes, scale, bias, act_bits, geometry)(images)
    patches = kernels.make_conv(codes, scale, bias, act_bits, geometry, backend)
    assert patches.backend == backend
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert torch.equal(patches(images), expected) and torch.equal(patches(images[1:2]), expected[1:2])
    assert patches(images[:0]).shape == (0, *expected.shape[1:])
    padded = geometry | {"padding": (1, 1)}
    assert kernels.make_conv(codes, scale, bias, act_bits, padded).backend == "reference"
    with pytest.raises(ValueError, match=f"backend '{backend}' has no kernel for a convolution .*: calibrate"):
        kernels.make_conv(codes, scale, bias, act_bits, padded, backend)
    with pytest.raises(ValueError, match=f"images must be .batch, {shape[1]}, height, width"):
        patches(torch.randn(1, shape[1] + 1, *size))
    assert torch.equal(patches(images[1]), expected[1])  # without a batch
    with pytest.raises(ValueError, match="images are smaller than a patch"):
        patches(torch.randn(1, shape[1], shape[2] - 1, shape[3]))
    for patch in ([shape[2]], [0, 1]):
        with pytest.raises(ValueError, match="a patch has a height and a width"):
            torch.ops.ternary.patches_run(images, patches._handle, patch, shape[0])


@pytest.mark.parametrize("algorithm", ["direct", "skipping"])
def test_images_of_another_shape_and_as_many_pixels(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose linear layers read their weights in another order."""
    monkeypatch.setenv("TERNARY_ALGORITHM", algorithm)
    nodes = [conv(-1, 7, 3),
             Node("linear", 0, codes=codes_of((9, 7 * 24)), gain=torch.rand(9), bias=torch.randn(9))]  # fmt: skip
    executor = kernels.make_executor(nodes, "cpu")
    for size in ((4, 6), (6, 4), (4, 6)):
        images = images_of(2, *size)
        assert torch.equal(executor(images), reference.NetworkExecutor(nodes)(images))


def test_skipping_does_not_depend_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERNARY_ALGORITHM", "skipping")
    nodes = [conv(-1, 64, 3, out_max=255),
             Node("linear", 0, codes=pruned_codes(321, 64 * 9, "single"), gain=torch.rand(321) / 9,
                  bias=torch.randn(321))]  # fmt: skip
    executor = kernels.make_executor(nodes, "cpu")
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        for batch in (1, 15):
            images = images_of(batch, 3, 3)
            assert torch.equal(executor(images), reference.NetworkExecutor(nodes)(images))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_reference_takes_floats_of_any_width(dtype: torch.dtype) -> None:
    geometry = {"stride": (2, 2), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
    for layer, x in (
        (reference.Linear(codes_of((5, 8)), torch.rand(5), None, 8), torch.randn(4, 8)),
        (reference.Conv2d(codes_of((5, 3, 2, 2)), torch.rand(5), None, 8, geometry), torch.randn(2, 3, 8, 8)),
    ):
        found = layer(x.to(dtype))
        assert found.dtype == torch.float32 and torch.equal(found, layer(x.to(dtype).float()))
