"""The study's models on the C++ kernels: equal to the reference, compiled, exported, and without a compiler."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import models
from models.normalize import Normalize
from quantization_utils import calibrate_, int8_absmax, kernels, pack_, quantize_
from quantization_utils.bit_layers import PackedLinear
from quantization_utils.kernels import reference

pytestmark = pytest.mark.skipif("cpu" not in kernels.available_backends(), reason="no C++ compiler")
BACKENDS = [b for b in kernels.available_backends() if b.startswith("cpu-")]
ROOT = Path(__file__).resolve().parents[3]


def packed(name: str, act_bits: int, **options: object) -> nn.Module:
    model = quantize_(models.build(name, 10, **options).eval(), act_bits=act_bits)
    return pack_(calibrate_(model, torch.rand(4, 3, 32, 32)))


@pytest.mark.parametrize(
    ("name", "options", "act_bits"),
    [("alexnet", {}, 6), ("resnet_18", {}, 6), *(("resnet_18", {"stem": "maxpool"}, bits) for bits in (8, 6, 4))],
)
def test_networks_equal_the_reference(
    name: str, options: dict[str, object], act_bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = packed(name, act_bits, **options)
    images = torch.rand(2 if options else 1, 3, 32, 32)  # the larger networks take long in portable code
    expected = reference.NetworkExecutor(model.nodes)(images)
    assert expected.unique().numel() >= 10
    for backend in BACKENDS:
        monkeypatch.setenv("TERNARY_ISA", backend.removeprefix("cpu-"))
        executor = kernels.make_executor(model.nodes, "cpu")
        assert executor.backend == backend
        for threads, batch in ((1, len(images)), (2, 1)):
            torch.set_num_threads(threads)
            assert torch.equal(executor(images[:batch]), expected[:batch])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_leaves_the_integers_of_the_reference_alone(dtype: torch.dtype) -> None:
    layers = [Normalize(), nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 5), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)]
    for calibrate in (calibrate_, lambda model, _: model):
        images = torch.rand(2, 3, 32, 32)
        model = pack_(calibrate(quantize_(nn.Sequential(*copy.deepcopy(layers)).eval(), int8_absmax), images))
        for module in model.modules():
            module.backend = "reference"
        expected = model(images)
        with torch.autocast("cpu", dtype):
            assert torch.equal(model(images), expected)


def test_what_was_made_in_inference_mode_serves_gradients_too() -> None:
    network = packed("resnet_18", 8, stem="maxpool")
    network.backend = "reference"
    images = torch.rand(2, 3, 32, 32)
    for model in (network, pack_(quantize_(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), act_bits=None))):
        with torch.inference_mode():
            expected = model(images)
        grown = images.clone().requires_grad_()
        found = model(grown)
        assert torch.equal(found, expected)
        found.sum().backward()
        assert grown.grad is not None


@pytest.mark.filterwarnings("ignore:TF32 acceleration:UserWarning")
def test_the_reference_is_exact_without_onednn_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where NNPACK would take large batches, in Winograd's way and in float32: integers beyond 2^20."""
    codes = torch.randint(-1, 2, (64, 256, 3, 3), dtype=torch.int8)
    pixels = torch.randint(0, 256, (16, 256, 16, 16)).float()
    expected = reference._conv2d(pixels.double(), codes.double(), padding=1)
    monkeypatch.setattr(reference, "ONEDNN", False)
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(reference._conv2d(pixels, codes.float(), padding=1).double(), expected)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_the_linear_layers_of_a_transformer(backend: str) -> None:
    model, images = packed("vit", 8, width=64, depth=2), torch.rand(3, 3, 32, 32)
    model.encoder = None  # which is tested on its own
    layers = [m for m in model.modules() if isinstance(m, PackedLinear)]
    for layer in layers:
        layer.backend = "reference"
    expected = model(images), model(images[:1])
    for layer in layers:
        layer.backend, layer._runner = backend, None
    assert torch.equal(model(images), expected[0]) and torch.equal(model(images[:1]), expected[1])
    assert len(layers) == 13 and {layer._runner.backend for layer in layers} == {backend}


@pytest.mark.parametrize(
    ("name", "options", "compiler"),
    [
        ("resnet_18", {"stem": "maxpool"}, "inductor"),
        ("alexnet", {}, "eager"),
        ("vit", {"width": 64, "depth": 1}, "eager"),
    ],
)
def test_packed_models_compile_and_export(name: str, options: dict[str, object], compiler: str) -> None:
    model, images = packed(name, 8, **options), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        if name == "resnet_18":
            with pytest.raises(RuntimeError, match="before torch.compile or torch.export"):
                torch.export.export(model, (images,))
        expected = model(images)
        assert torch.equal(torch.compile(model, backend=compiler, fullgraph=True)(images), expected)
        program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        assert torch.equal(program.module()(images.repeat(2, 1, 1, 1)), expected.repeat(2, 1))
        assert any("ternary" in str(node.target) for node in program.graph.nodes)


@torch.no_grad()
def test_what_runs_on_the_reference_compiles_in_one_graph_too() -> None:
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(8 * 28 * 28, 5)]
    model, images = pack_(quantize_(nn.Sequential(*layers).eval())), torch.rand(2, 3, 32, 32)
    expected = model(images)
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(images), expected)


def test_numbers_of_another_process_are_unknown() -> None:
    """An exported program, which holds such a number, is refused elsewhere and does not run what was made there."""
    script = """
import torch
from quantization_utils import kernels
print(kernels.make_linear(torch.ones(4, 8, dtype=torch.int8), torch.ones(4), None, 8, "cpu")._handle)
"""
    out = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert int(out) > 1_000_000  # the first of that process, and no other's
    with pytest.raises(ValueError, match="no packed network or layer has the number"):
        torch.ops.ternary.linear_run(torch.ones(8), int(out), 4)


def test_after_fork() -> None:
    """A child of a process whose OpenMP threads PyTorch had woken, before and after a kernel ran there."""
    script = """
import os, signal, torch
from quantization_utils import kernels
torch.set_num_threads(2)
layer = kernels.make_linear(torch.ones(4, 8, dtype=torch.int8), torch.ones(4), None, 8, "cpu")
torch.rand(2000, 2000).exp()
for _ in range(2):
    child = os.fork()
    signal.alarm(60)  # ends what hangs
    x = torch.ones(64, 8)
    assert layer(x).eq(8).all()
    if child == 0:
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False, timeout=120).returncode == 0


def test_every_operator_passes_opcheck() -> None:
    """Those that take tensors; the others only make, describe and free what these use."""
    model, images = packed("resnet_18", 6, stem="maxpool"), torch.rand(1, 3, 32, 32)
    torch.library.opcheck(torch.ops.ternary.network_run, (images, model.executor._handle, [10]))
    layer = kernels.make_linear(torch.randint(-1, 2, (9, 37), dtype=torch.int8), torch.rand(9), torch.rand(9), 8, "cpu")
    for x in (torch.randn(37), torch.randn(2, 3, 37), torch.randn(0, 37)):
        torch.library.opcheck(torch.ops.ternary.linear_run, (x, layer._handle, 9))
    vit = packed("vit", 8, width=64, depth=1)
    vit(images)
    encoder = vit.encoder._runner._handle
    hidden = torch.randn(2, 5, 64)
    for x, tail in ((hidden, [1, 64]), (hidden, [10]), (images, [3, 64]), (images, [10])):
        torch.library.opcheck(torch.ops.ternary.encoder_run, (x, encoder, tail))
    projection = vit.network.vit.embeddings.patch_embeddings.projection
    projection(images)
    patches = projection._runner
    torch.library.opcheck(torch.ops.ternary.patches_run, (images, patches._handle, [4, 4], 64))


def test_without_a_compiler(tmp_path: Path) -> None:
    """One warning and the reference; a backend that was asked for is an error that says why."""
    script = """
import torch, warnings
from quantization_utils import kernels
codes = torch.randint(-1, 2, (4, 8), dtype=torch.int8)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    layers = [kernels.make_linear(codes, torch.ones(4), None) for _ in range(2)]
warned = sum("slow reference" in str(w.message) for w in said)
print([layer.backend for layer in layers], warned, kernels.available_backends())
try:
    kernels.make_linear(codes, torch.ones(4), None, 8, "cpu")
except ValueError as error:
    print(error)
"""
    environment = {k: v for k, v in os.environ.items() if k != "CXX"} | {
        "PATH": str(tmp_path),
        "TORCH_EXTENSIONS_DIR": str(tmp_path),
    }
    out = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout
    lines = out.splitlines()
    assert lines[0] == "['reference', 'reference'] 1 ('reference',)"
    assert "no C++ compiler was found as 'c++'" in lines[1]
