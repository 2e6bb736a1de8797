"""Multiply-adds, zeros, bits and the shape of timings; no test depends on how fast anything is."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from models import build
from quantization_utils import calibrate_, int8_absmax, pack_, quantize_
from quantization_utils.inspection import inspect_file
from quantization_utils.storage import load_model, save_model
from train_test_utils import measure

TINY_VIT = {"width": 64, "depth": 2}


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    ).eval()  # fmt: skip


SMALL_MACS = 16 * 16 * 8 * 27 + 16 * 16 * 16 * 72 + 160


def packed_network(*quantizer) -> nn.Module:
    torch.manual_seed(0)
    model = quantize_(build("resnet_18", 10, stem="maxpool").eval(), *quantizer)
    return pack_(calibrate_(model, torch.rand(2, 3, 32, 32)))


def test_macs_by_hand():
    assert measure.count_macs(small_network()) == SMALL_MACS


def test_macs_of_resnet_18_are_the_published_ones():
    model = build("resnet_18", 10)  # with the CIFAR stem: 0.56 G
    assert round(measure.count_macs(model) / 1e9, 2) == 0.56


@pytest.mark.parametrize("name, options", [("resnet_18", {}), ("resnet_18", {"stem": "maxpool"}), ("vit", TINY_VIT)])
def test_macs_do_not_change_when_a_model_is_packed(name, options):
    model = build(name, 10, **options).eval()
    macs = measure.count_macs(model)
    quantize_(model)
    assert measure.count_macs(model) == macs
    packed = pack_(calibrate_(model, torch.rand(1, 3, 32, 32)))
    assert measure.count_macs(packed) == macs


def test_macs_of_larger_images():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)
    model = nn.Sequential(*layers).eval()
    macs = 48 * 48 * 4 * 27 + 40
    assert measure.count_macs(model, 48) == macs
    packed = pack_(calibrate_(quantize_(model), torch.rand(2, 3, 48, 48)))
    assert measure.count_macs(packed, 48) == macs


def test_counting_leaves_no_hooks_and_no_other_mode_behind():
    model = build("alexnet", 10)
    model.train()
    measure.count_macs(model)
    assert all(m.training and not m._forward_hooks for m in model.modules())
    with pytest.raises(RuntimeError):
        measure.count_macs(model, 8)  # too small for its pools
    assert all(m.training and not m._forward_hooks for m in model.modules())


def test_zero_fraction_of_float_trainable_and_packed():
    model = small_network()
    with torch.no_grad():
        model[3].weight[:8] = 0
    weights = [m.weight for m in model if hasattr(m, "weight") and m.weight.dim() > 1]
    total = sum(w.numel() for w in weights)
    assert measure.code_zero_fraction(model) == model[3].weight[:8].numel() / total
    trainable = measure.code_zero_fraction(quantize_(model))
    codes = [m.quantized_weight()[0] for m in model if hasattr(m, "quantized_weight")]
    assert trainable == sum(int((c == 0).sum()) for c in codes) / total > 0.25
    assert measure.code_zero_fraction(pack_(calibrate_(model, torch.rand(2, 3, 32, 32)))) == trainable


def test_weight_bits():
    model = small_network()
    assert measure.weight_bits(model) == 32
    assert measure.weight_bits(quantize_(small_network())) == round(math.log2(3), 4)
    quantize_(model, only=nn.Linear)
    mixed = (160 * math.log2(3) + (216 + 1152) * 32) / (160 + 216 + 1152)
    assert measure.weight_bits(model) == round(mixed, 4) == measure.weight_bits(pack_(model))
    bytewise = quantize_(small_network(), int8_absmax)
    assert measure.weight_bits(bytewise) == measure.weight_bits(pack_(bytewise)) == 8
    assert measure.weight_bits(packed_network(int8_absmax)) == 8


@pytest.mark.parametrize(
    "make",
    [packed_network, lambda: build("vit", 10, **TINY_VIT), lambda: pack_(quantize_(build("vit", 10, **TINY_VIT)))],
)
def test_ideal_bytes_are_those_of_the_file(tmp_path, make):
    path = tmp_path / "model.safetensors"
    save_model(make().eval(), path)
    loaded, _ = load_model(path)
    assert measure.ideal_bytes(loaded) == math.ceil(inspect_file(path).ideal_bytes)


def test_ideal_bytes_do_not_change_with_the_memory_format():
    model = small_network()
    expected = measure.ideal_bytes(model)
    assert measure.ideal_bytes(model.to(memory_format=torch.channels_last)) == expected


def test_latency_beside_takes_turns():
    order = []

    class Model(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, x):
            assert not torch.is_grad_enabled() and not self.training and x.min() >= 0 and x.max() <= 1
            order.append(self.name)
            return x.mean((2, 3))

    fields = measure.latency_beside(Model("float"), Model("packed"), seconds=0.2, batch=16)
    for name in ("latency_ms_p50_batch1", "latency_ms_p90_batch1", "throughput_images_per_s"):
        assert fields[name] > 0 and fields[f"float_{name}"] > 0
    assert fields["latency_ms_p90_batch1"] >= fields["latency_ms_p50_batch1"]
    runs = [len(list(group)) for _, group in itertools.groupby(order)]
    assert set(order) == {"float", "packed"} and max(runs) <= 11  # ten measured calls and the one before them


def test_the_figures_of_latency_by_hand(monkeypatch):
    monkeypatch.setattr(measure, "_times", lambda *arguments: [[0.003, 0.004, 0.013], [0.001] * 3])
    assert measure.latency_beside(nn.Flatten(), nn.Flatten(), batch=8) == {
        "throughput_batch": 8,
        "float_latency_ms_p50_batch1": 4.0, "float_latency_ms_p90_batch1": 11.2,
        "float_throughput_images_per_s": 2000.0,
        "latency_ms_p50_batch1": 1.0, "latency_ms_p90_batch1": 1.0, "throughput_images_per_s": 8000.0,
    }  # fmt: skip


def test_calls_that_find_a_cold_machine_or_the_other_models_weights_are_not_measured(monkeypatch):
    """On a clock that only the models move: fast are those calls that follow one of their own, after the warm-up."""
    now, last = 0.0, None

    class Model(nn.Module):
        def forward(self, x):
            nonlocal now, last
            now += 1 / 1024 if last is self and now > 0.1 else 1 / 64
            last = self

    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: now, monotonic=lambda: now))
    for times in measure._times([Model(), Model()], torch.zeros(1), 1.0, 6):
        assert 6 <= len(times) < 16 and set(times) == {1 / 1024}  # as many as asked for, to the end of a block


@pytest.mark.parametrize(
    "macs, batch", [(1, 256), (140_186_624, 128), (555_422_720, 32), (1_500_000_000, 8), (17_000_000_000, 4)]
)
def test_the_large_batch_on_a_cpu(monkeypatch, macs, batch):
    floating, packed = nn.Flatten(), nn.Flatten()
    monkeypatch.setattr(measure, "count_macs", lambda model, image_size: macs if model is floating else 10**9)
    assert measure.latency_beside(floating, packed, seconds=0.0)["throughput_batch"] == batch


def test_few_calls_are_enough():
    batches = []
    model = nn.Identity()
    model.register_forward_hook(lambda module, inputs, output: batches.append(len(output)))
    measure.latency_beside(nn.Flatten(), model, batch=2, seconds=0.0)
    assert set(batches) == {1, 2} and len(batches) >= 6


def test_images_have_the_size_that_is_asked_for():
    sizes = set()
    model = nn.Identity()
    model.register_forward_hook(lambda module, inputs, output: sizes.add(tuple(output.shape)))
    measure.latency_beside(model, model, image_size=48, batch=2, seconds=0.0)
    assert sizes == {(1, 3, 48, 48), (2, 3, 48, 48)}
