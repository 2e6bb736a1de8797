"""The C++ kernels against the reference, bit for bit: every instruction set here, odd shapes, every option."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quantization_utils import kernels
from quantization_utils.kernels import reference
from quantization_utils.nodes import Node
from quantization_utils.storage_checks import MAX_NODES

pytestmark = pytest.mark.skipif("cpu" not in kernels.available_backends(), reason="no C++ compiler")
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


def check(nodes: list[Node], images: Tensor, backend: str) -> Tensor:
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


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


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
    check(
        [stem, conv(0, n, c, kernel, stride, padding, out_max=None, relu=False)], images_of(batch, size, size), backend
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kernel", "stride", "padding"), [
    ((3, 5), (2, 1), (1, 2)), ((1, 7), (1, 3), (0, 3)), ((3, 3), (1, 2), (1, 1)), ((3, 3), (1, 1), (0, 2)),
    ((2, 4), (2, 4), (0, 0)),
])  # fmt: skip
@pytest.mark.parametrize("batch", [1, 4])
def test_kernels_that_are_not_square(
    backend: str, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], batch: int
) -> None:
    codes = codes_of((33, 19, *kernel))
    node = replace(conv(0, 33, 19), codes=codes, kernel=kernel, stride=stride, padding=padding, out_max=None)
    check([conv(-1, 19, 3), node], images_of(batch, 11, 14), backend)


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
    check(nodes, images_of(2, 11, 6), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [2, 3, 4, 5, 8, 17, 32])
@pytest.mark.parametrize("channels", [16, 64, 100, 130])
def test_winograd_equals_direct(backend: str, size: int, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Extreme activations and weights: all 63 or all 0, filters of equal signs.
    nodes = [
        conv(-1, channels, 3),
        conv(0, channels, channels),
        conv(1, channels, channels, out_max=None, residual=0, residual_gain=1.5),
    ]
    nodes[1].codes[0], nodes[1].codes[1], nodes[0].gain[:5] = 1, -1, 100.0
    for batch in (1, 7):
        for algorithm in ("winograd", "direct"):
            monkeypatch.setenv("TERNARY_ALGORITHM", algorithm)
            check(nodes, images_of(batch, size, size + size % 3), backend)
    executor = kernels.make_executor(nodes, backend)
    monkeypatch.setenv("TERNARY_ALGORITHM", "winograd")
    executor = kernels.make_executor(nodes, backend)
    executor(images_of(1, size, size))
    assert [step["algorithm"] for step in executor.plan(1, size, size)] == ["direct", "winograd", "winograd"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_pixels_between_codes_and_out_of_range(backend: str) -> None:
    images = torch.linspace(-0.5, 1.5, 3 * 9 * 37).reshape(1, 3, 9, 37)
    images[0, 0, 0, :4] = torch.tensor([0.5, 1.5, 2.5, 254.5]) / 255  # halves go to the even code
    check([conv(-1, 7, 3)], images, backend)


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
    found = kernels.make_executor(nodes, backend)(images)
    assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))


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
    check(nodes, images_of(batch, 8, 5), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("out_max", [None, 255])
def test_average_pool(backend: str, out_max: int | None) -> None:
    nodes = [conv(-1, 21, 3, 3, 2), Node("avg_pool", 0, gain=torch.tensor([0.11]), out_max=out_max)]
    check(nodes, images_of(3, 9, 13), backend)
    nodes.append(Node("linear", 1, codes=codes_of((7, 21)), gain=torch.rand(7), bias=torch.randn(7)))
    if out_max:
        check(nodes, images_of(3, 9, 13), backend)


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
def test_largest_accumulators_do_not_overflow(backend: str, bits: int | str, pixels: int) -> None:
    """As many inputs as two bits hold, signed bytes (515: the first that two bits do not), 8-bit weights."""
    nodes, image = extremes(bits, pixels)
    top = (1 if bits == "ternary" else 127) * 255 * 256 * pixels
    assert check(nodes, image, backend).tolist() == [torch.tensor([top, -top]).float().tolist()]
    linear = kernels.make_linear(nodes[1].codes, torch.ones(2), None, 8, backend)
    assert linear(image.expand(1, 256, 1, pixels).reshape(1, -1)).tolist() == (
        reference.Linear(nodes[1].codes, torch.ones(2), None, 8)(torch.ones(1, 256 * pixels)).tolist()
    )


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
    check(nodes, images_of(batch, 5, 3), backend)
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
    check(nodes, images_of(2, 1, 1), backend)


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


def test_results_do_not_depend_on_threads() -> None:
    nodes = [conv(-1, 64, 3), conv(0, 128, 64, 3, 2), conv(1, 128, 128, out_max=None)]
    images, before, results = images_of(15, 15, 15), torch.get_num_threads(), []
    reused = kernels.make_executor(nodes, "cpu")
    try:
        for threads in (1, 2, 5, 7):  # 7: layer by layer; the others share out images
            torch.set_num_threads(threads)
            executor = kernels.make_executor(nodes, "cpu")
            results.append(executor(images))
            assert torch.equal(executor(images), results[0]) and torch.equal(reused(images), results[0])
            for batch in (1, 2, 11):
                assert torch.equal(executor(images[:batch]), results[0][:batch])
    finally:
        torch.set_num_threads(before)


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
    images, before = torch.randn(5, shape[1], *size), torch.get_num_threads()
    images[1, :, -1, -1] = 9.0
    expected = reference.Conv2d(codes, scale, bias, act_bits, geometry)(images)
    patches = kernels.make_conv(codes, scale, bias, act_bits, geometry, backend)
    assert patches.backend == backend
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert torch.equal(patches(images), expected) and torch.equal(patches(images[1:2]), expected[1:2])
    finally:
        torch.set_num_threads(before)
    assert patches(images[:0]).shape == (0, *expected.shape[1:])
    padded = geometry | {"padding": (1, 1)}
    assert kernels.make_conv(codes, scale, bias, act_bits, padded).backend == "reference"
    with pytest.raises(ValueError, match=f"backend '{backend}' has no kernel for a convolution .*: calibrate"):
        kernels.make_conv(codes, scale, bias, act_bits, padded, backend)
    with pytest.raises(ValueError, match=f"images must be .batch, {shape[1]}, height, width"):
        patches(torch.randn(1, shape[1] + 1, *size))


def test_skipping_does_not_depend_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERNARY_ALGORITHM", "skipping")
    nodes = [conv(-1, 64, 3, out_max=255),
             Node("linear", 0, codes=pruned_codes(321, 64 * 9, "single"), gain=torch.rand(321) / 9,
                  bias=torch.randn(321))]  # fmt: skip
    executor, before = kernels.make_executor(nodes, "cpu"), torch.get_num_threads()
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            for batch in (1, 15):
                images = images_of(batch, 3, 3)
                assert torch.equal(executor(images), reference.NetworkExecutor(nodes)(images))
    finally:
        torch.set_num_threads(before)


def test_operators_pass_opcheck_and_compile() -> None:
    nodes = [conv(-1, 16, 3), Node("avg_pool", 0, gain=torch.tensor([0.1]))]
    executor, images = kernels.make_executor(nodes, "cpu"), images_of(2, 8, 8)
    torch.library.opcheck(torch.ops.ternary.network_run, (images, executor._handle, [16]))
    layer, x = kernels.make_linear(codes_of((5, 7)), torch.rand(5), None, 8, "cpu"), torch.randn(3, 7)
    torch.library.opcheck(torch.ops.ternary.linear_run, (x, layer._handle, 5))
    compiled = torch.compile(lambda i: executor(i) * 2, backend="eager", fullgraph=True)
    assert torch.equal(compiled(images), executor(images) * 2)


def test_environment_and_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERNARY_ISA", "portable")
    assert kernels.make_executor([conv(-1, 4, 3)], "auto").backend == "cpu-portable"
    monkeypatch.setenv("TERNARY_ISA", "sse9")
    with pytest.raises(ValueError, match="cannot run here"):
        kernels.make_executor([conv(-1, 4, 3)], "cpu")
    with pytest.raises(ValueError, match="unknown backend"):
        kernels.make_executor([conv(-1, 4, 3)], "gpu")
    assert kernels.make_executor([conv(-1, 4, 3)], "reference").backend == "reference"


def test_networks_longer_than_a_parallel_region_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest that fit, on two threads, and one node more; a model file's limit is below."""
    before, images = torch.get_num_threads(), images_of(1, 2, 2)
    pool = Node("max_pool", 0)
    monkeypatch.setenv("TERNARY_ALGORITHM", "direct")  # measures nothing
    nodes = [conv(-1, 4, 3), *(replace(pool, input=i) for i in range(1022))]
    try:
        torch.set_num_threads(2)
        check(nodes, images, "cpu-portable")
    finally:
        torch.set_num_threads(before)
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


def test_wrong_shapes_are_named() -> None:
    executor = kernels.make_executor([conv(-1, 8, 3), conv(0, 8, 9)], "cpu")
    with pytest.raises(ValueError, match="expects 9 channels and reads 8"):
        executor(images_of(1, 8, 8))
    with pytest.raises(ValueError, match="expects 9 channels and reads 8"):
        executor.plan(1, 8, 8)
    with pytest.raises(ValueError, match="images must be"):
        kernels.make_executor([conv(-1, 8, 3)], "cpu")(images_of(1, 8, 8, channels=4))
    assert kernels.make_executor([conv(-1, 8, 3)], "cpu")(images_of(0, 8, 8)[:0].reshape(0, 3, 8, 8)).shape[0] == 0
