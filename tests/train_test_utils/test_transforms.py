"""Transformations that look at calibration images: where training starts, and what takes weights that are loaded."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from models.select import select_layers
from quantization_utils import absmean, int8_absmax, quantize_
from quantization_utils.bit_layers import BitConv2d, BitLinear, Quantized
from quantization_utils.post_training import Settings
from quantization_utils.post_training.reconstruction import Reconstruction
from tests.networks import images, make
from train_test_utils.dataset import ImageDataset, Split
from train_test_utils.rows import Row, Ternary
from train_test_utils.run import Run
from train_test_utils.transforms import CalibratedStart, CalibratedTernary, ReconstructedTernary, TernaryStart

pytestmark = pytest.mark.filterwarnings("ignore:fewer positions than weights:UserWarning")


@pytest.mark.parametrize("kind", ["alexnet_like", "resnet_like"])
def test_training_starts_with_scales_for_the_activations_that_it_will_see(kind):
    """Where a network's statistics are not those of its ternary weights: as in a deep one, by every layer."""
    x, model = images(64), make(kind)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_var *= 1000

    def clipped(start: nn.Module) -> float:
        """Share of what the last ReLU puts out in training that has no gradient."""
        last = [m for m in start.modules() if isinstance(m, Quantized) and isinstance(m.module, nn.ReLU)][-1]
        seen: list[torch.Tensor] = []
        last.quantizer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        start.train()(x)
        top = last.quantizer.step * last.quantizer.code_max
        return (seen[0] > top).sum().item() / (seen[0] > 0).sum().item()

    start = TernaryStart(act_bits=8)(copy.deepcopy(model), x, 0)
    assert not start.training
    assert clipped(Ternary(act_bits=8)(copy.deepcopy(model), x, 0)) > 0.2
    assert clipped(start) < 0.05


def test_a_start_depends_on_the_seed_alone():
    x, model, transform = images(33), make("alexnet_like"), TernaryStart()  # with dropout
    start = transform(copy.deepcopy(model), x, 5)
    torch.rand(3)  # whatever has been drawn before
    assert torch.equal(start(x), transform(copy.deepcopy(model), x, 5)(x))


@pytest.mark.parametrize(
    "kind, how", [(Ternary, "__call__"), (CalibratedTernary, "__call__"), (CalibratedTernary, "structure")]
)
def test_layers_that_are_kept_stay_float(kind, how):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))
    getattr(kind(keep=["1"]), how)(model, torch.rand(64, 3, 2, 2), 0)
    assert [isinstance(layer, BitLinear) for _, layer in select_layers(model)] == [False, True]


@pytest.mark.parametrize("kind", ["alexnet_like", "resnet_like", "vit_like"])
@pytest.mark.parametrize("act_bits", [None, 8])
@pytest.mark.parametrize("transform", [
    TernaryStart(), CalibratedTernary(), CalibratedStart(),
    ReconstructedTernary(reconstruction=Reconstruction(5, lr=0.1)),
], ids=lambda transform: type(transform).__name__)  # fmt: skip
def test_the_structure_alone_takes_the_weights_of_the_whole(transform, act_bits, kind):
    x, model, transform = images(33), make(kind), replace(transform, act_bits=act_bits)
    whole, rebuilt = transform(copy.deepcopy(model), x, 5), transform.structure(copy.deepcopy(model), x, 5)
    rebuilt.load_state_dict(whole.state_dict())
    with torch.no_grad():
        assert torch.equal(rebuilt(x), whole(x))


@pytest.mark.parametrize("kind", ["alexnet_like", "vit_like"])
def test_training_starts_from_the_calibrated_codes_and_moves_them(kind):
    x, model = images(32), make(kind)
    calibrated = CalibratedTernary(act_bits=8)(copy.deepcopy(model), x, 0)
    trainable = CalibratedStart(act_bits=8)(model, x, 0)
    layers = [m for m in trainable.modules() if isinstance(m, (BitConv2d, BitLinear))]
    chosen = [m.quantized_weight() for m in calibrated.modules() if isinstance(m, (BitConv2d, BitLinear))]
    before = [layer.quantized_weight() for layer in layers]
    # Not the outputs: where a scale is rounded otherwise, an activation may have another code.
    for (codes, scale), (chosen_codes, chosen_scale) in zip(before, chosen, strict=True):
        assert torch.equal(codes, chosen_codes)
        torch.testing.assert_close(scale, chosen_scale)
    optimizer = torch.optim.SGD(trainable.parameters(), lr=0.5)
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(trainable(x), torch.arange(32) % 10).backward()
        optimizer.step()
    after = [layer.quantized_weight()[0] for layer in layers]
    assert any(not torch.equal(codes, moved) for (codes, _), moved in zip(before, after, strict=True))


def test_calibration_sees_neither_labels_nor_test_images():
    """Another test split and other labels: the same weights, bit for bit."""
    train = Split((images(40) * 255).to(torch.uint8), torch.arange(40) % 10)
    names = tuple("0123456789")
    data = ImageDataset("made_up", names, train, train)
    other = replace(data, train=Split(train.images, train.labels.flip(0)), test=Split(255 - train.images, train.labels))
    model = make("alexnet_like")
    row = Row("ptq_all_corrected", None, [CalibratedTernary(act_bits=8)], None)
    states = []
    for dataset in (data, other):
        run = object.__new__(Run)
        run.row, run.data, run.seed = row, dataset, 0
        states.append(run.transformed(copy.deepcopy(model)).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_calibrated_row_hands_on_what_it_was_given(monkeypatch):
    seen = []
    monkeypatch.setattr("train_test_utils.transforms.ternarize_", lambda *args: seen.append(args))
    settings = Settings(correct=False)
    CalibratedTernary(settings, 8, nn.Linear, ["1"])(None, None, 0)
    assert seen == [(None, None, settings, 8, nn.Linear, ["1"])]


def test_a_reconstructed_row_hands_on_what_it_was_given(monkeypatch):
    seen = []
    monkeypatch.setattr("train_test_utils.transforms.ternarize_", lambda *args, **more: seen.append((args, more)))
    settings, reconstruction = Settings(correct=False), Reconstruction(steps=7)
    ReconstructedTernary(settings, 8, nn.Linear, ["1"], reconstruction=reconstruction)(None, None, 0)
    assert seen == [((None, None, settings, 8, nn.Linear, ["1"]), {"reconstruction": reconstruction})]


@pytest.mark.parametrize("how", ["__call__", "structure"])
def test_a_calibrated_start_is_trained_with_its_quantizer(how):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))
    getattr(CalibratedStart(quantizer=absmean), how)(model, torch.rand(64, 3, 2, 2), 0)
    assert [layer.quantizer for _, layer in select_layers(model)] == [absmean, absmean]


def test_a_calibrated_start_leaves_layers_of_8_bits():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))
    quantize_(model, int8_absmax, act_bits=None, only="1")
    CalibratedStart()(model, torch.rand(64, 3, 2, 2), 0)
    assert [layer.weight_bits for _, layer in select_layers(model)] == [8, "ternary"]
