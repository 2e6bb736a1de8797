"""A packed ViT and its fused encoder: what it is made of, and what becomes of it when its modules change."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import models
from models.normalize import Normalize
from pruning_utils import l2_filters, prune_
from quantization_utils import absmean, load_model, pack_, quantize_, save_model
from quantization_utils.quantizers import Quantizer, int8_absmax
from tests.networks import assert_equal_but_for_rounding, packed_vit


@torch.no_grad()
def test_a_layer_without_a_bias_takes_none_from_the_others() -> None:
    model, images = packed_vit(), torch.rand(4, 3, 32, 32)
    model.network.vit.layers[0].attention.k_proj.bias = None
    assert_equal_but_for_rounding(model(images), model.network(model.normalize(images)).logits)
    assert model.encoder.backend.startswith("cpu-")


@torch.no_grad()
def test_a_model_takes_it_and_keeps_it_through_copies_moves_and_files(tmp_path: Path) -> None:
    model, images = packed_vit(), torch.rand(4, 3, 32, 32)
    logits = model(images)
    assert model.encoder.backend.startswith("cpu-")
    assert_equal_but_for_rounding(logits, model.network(model.normalize(images)).logits)
    save_model(model, tmp_path / "vit.safetensors")
    loaded, _ = load_model(tmp_path / "vit.safetensors")
    twin = copy.deepcopy(model)
    bias = twin.network.vit.layers[0].mlp.fc1.bias
    kept = bias.clone()
    bias += 1
    assert not torch.equal(twin(images), logits)  # its own layers, not those of the model it was copied from
    assert torch.equal(loaded(images), logits) and torch.equal(model(images), logits)
    bias.copy_(kept)
    assert torch.equal(twin.to("cpu").float()(images), model(images))  # moved: read again


def double_a_norm(network: nn.Module) -> None:
    network.vit.layernorm.weight *= 2


def double_scales(network: nn.Module) -> None:
    network.vit.layers[1].mlp.fc2.scale.mul_(2)


def load_another(network: nn.Module) -> None:
    network.load_state_dict({name: t + t.is_floating_point() for name, t in network.state_dict().items()})


def replace_the_classifier(network: nn.Module) -> None:
    network.classifier = nn.Linear(128, 3)


def replace_a_layer(network: nn.Module) -> None:
    network.vit.layers[0].mlp.fc1 = nn.Linear(128, 512)


def take_a_bias_out(network: nn.Module) -> None:
    network.vit.layers[0].attention.k_proj.bias = None


@pytest.mark.parametrize(
    "change",
    [double_a_norm, double_scales, load_another, replace_the_classifier, replace_a_layer, take_a_bias_out],
)
@torch.no_grad()
def test_what_changes_behind_it_is_read_again(change: Callable[[nn.Module], None]) -> None:
    model, images = packed_vit(), torch.rand(4, 3, 32, 32)
    model(images)
    change(model.network)
    expected = model.network(model.normalize(images)).logits
    assert_equal_but_for_rounding(model(images), expected)
    assert (model.encoder.backend is None) == (change is replace_a_layer)  # which no kernel of the encoder runs
    assert torch.equal(model(images), model(images))


def another_mean(model: nn.Module) -> None:
    model.normalize.mean_C11.mul_(0.5)


def another_normalisation(model: nn.Module) -> None:
    model.normalize = nn.Identity()


def another_network(model: nn.Module) -> None:
    model.network = copy.deepcopy(model.network)
    model.network.classifier.scale.zero_()


def one_mean_for_all_colours(model: nn.Module) -> None:
    model.normalize = Normalize((125,), (63,))


@pytest.mark.parametrize("change", [another_mean, another_normalisation, one_mean_for_all_colours, another_network])
@pytest.mark.parametrize("called_before", [True, False])
@torch.no_grad()
def test_the_model_itself_may_change(change: Callable[[nn.Module], None], called_before: bool) -> None:
    model, images = copy.deepcopy(packed_vit()), torch.rand(4, 3, 32, 32)
    before = packed_vit()(images)
    if called_before:
        model(images)
    change(model)
    assert_equal_but_for_rounding(model(images), model.network(model.normalize(images)).logits)
    assert not torch.equal(model(images), before)


@torch.no_grad()
def test_another_backend_may_be_asked_for() -> None:
    model, images = packed_vit(), torch.rand(4, 3, 32, 32)
    before = model(images)
    layers = [module for module in model.modules() if hasattr(module, "backend")]
    for layer in layers:
        layer.backend = "reference"
    assert_equal_but_for_rounding(model(images), before)
    assert model.encoder.backend is None
    for layer in layers:
        layer.backend = "nonsense"
    with pytest.raises(ValueError, match="unknown backend 'nonsense'"):
        model(images)


@pytest.mark.parametrize("where", ["normalize", "network.vit.layers.0"])
@torch.no_grad()
def test_hooks_are_called(where: str) -> None:
    model, images = packed_vit(), torch.rand(4, 3, 32, 32)
    before = model(images)
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(where).register_forward_hook(lambda module, args, output: seen.append(output))
    assert_equal_but_for_rounding(model(images), before)
    assert len(seen) == 1 and model.encoder.backend is None
    handle.remove()
    assert torch.equal(model(images), before) and len(seen) == 1 and model.encoder.backend


@torch.no_grad()
def test_neurons_that_were_pruned_are_gone_and_nothing_else_changes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    images = torch.rand(4, 3, 32, 32)
    for fraction, neurons in ((0.5, 256), (0.999, 1)):
        slim = packed_vit(pruned=fraction)
        with monkeypatch.context() as patch:
            patch.setattr("quantization_utils.transform.remove_dead_neurons_", lambda model: model)
            whole = packed_vit(pruned=fraction)
        for model, kept in ((slim, neurons), (whole, 512)):
            mlps = [layer.mlp for layer in model.network.vit.layers]
            shapes = [(tuple(mlp.fc1.codes.shape), tuple(mlp.fc2.codes.shape)) for mlp in mlps]
            assert shapes == [((kept, 128), (128, kept))] * 2
        logits = slim(images)
        assert torch.equal(logits, whole(images)) and logits.unique().numel() > 1
        save_model(slim, tmp_path / "slim.safetensors")
        save_model(whole, tmp_path / "whole.safetensors")
        assert (tmp_path / "slim.safetensors").stat().st_size < (tmp_path / "whole.safetensors").stat().st_size
        for file in ("slim", "whole"):
            loaded, _ = load_model(tmp_path / f"{file}.safetensors")
            assert torch.equal(loaded(images), logits)


@pytest.mark.parametrize("bias", [1.0, 0.0])
@torch.no_grad()
def test_of_neurons_without_weights_those_with_a_bias_stay_or_else_one(bias: float) -> None:
    model, images = quantize_(models.build("vit", 10, width=64, depth=1).eval(), absmean, 8), torch.rand(2, 3, 32, 32)
    mlp = model.network.vit.layers[0].mlp
    mlp.fc1.weight.zero_(), mlp.fc1.bias.zero_()
    mlp.fc1.bias[3] = bias
    expected = model(images)
    assert_equal_but_for_rounding(pack_(model)(images), expected)
    assert mlp.fc1.codes.shape == (1, 64)


@pytest.mark.parametrize("ends", ["projection", "classifier"])
@torch.no_grad()
def test_patches_or_a_classifier_of_other_bits_run_by_themselves(ends: str) -> None:
    vit, images = models.build("vit", 10, width=64, depth=1).eval(), torch.rand(2, 3, 32, 32)
    model = pack_(quantize_(quantize_(vit, act_bits=4, only=f"*{ends}")))
    assert_equal_but_for_rounding(model(images), model.network(model.normalize(images)).logits)
    runner = model.encoder._runner
    assert (runner.embeds, bool(runner.classes)) == (ends != "projection", ends != "classifier")


@torch.no_grad()
def test_networks_of_another_kind_run_layer_by_layer() -> None:
    assert packed_vit(act_bits=None).encoder is None
    config = models.build("vit", 10, width=64, depth=1).constructor["options"]["config"]
    for change in ({"hidden_act": "relu"}, {"num_attention_heads": 8}):
        assert packed_vit(config=config | change).encoder is None
    torch.manual_seed(0)
    partly = models.build("vit", 10, width=64, depth=1).eval()
    mixed = quantize_(quantize_(copy.deepcopy(partly), act_bits=4, only="*.fc1"))
    assert pack_(quantize_(partly, absmean, 8, keep=("*.fc1",))).encoder is pack_(mixed).encoder is None


@torch.no_grad()
def test_layers_under_other_names_run_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.rand(2, 3, 32, 32)
    expected = packed_vit()(images)
    monkeypatch.setattr("quantization_utils.packed_encoder.linear_layers", lambda layer: [layer.attention.query])
    model = packed_vit()
    assert model.encoder is None
    assert_equal_but_for_rounding(model(images), expected)


@torch.no_grad()
def test_neurons_stay_where_zero_is_not_what_their_activation_makes_of_zero() -> None:
    config = models.build("vit", 10, width=64, depth=1).constructor["options"]["config"]
    model = packed_vit(config=config | {"hidden_act": "sigmoid"}, pruned=0.5)
    assert {layer.mlp.fc1.codes.shape[0] for layer in model.network.vit.layers} == {config["intermediate_size"]}


@torch.no_grad()
def test_neurons_stay_where_only_one_of_their_layers_is_packed() -> None:
    model = prune_(models.build("vit", 10, width=64, depth=1).eval(), l2_filters, 0.5, only=nn.Linear)
    images = torch.rand(2, 3, 32, 32)
    expected = quantize_(model, absmean, keep=["*.fc2"])(images)
    assert_equal_but_for_rounding(pack_(model)(images), expected)


@torch.no_grad()
def test_hooks_before_a_layer_are_called_too() -> None:
    model, images = packed_vit(), torch.rand(2, 3, 32, 32)
    model(images)
    seen: list[object] = []
    model.network.vit.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args))
    model(images)
    assert len(seen) == 1 and model.encoder.backend is None


@pytest.mark.parametrize("quantizer", [absmean, int8_absmax])
@torch.no_grad()
def test_in_float64_a_packed_model_on_the_reference_is_the_trainable_one(quantizer: Quantizer, tmp_path: Path) -> None:
    """In float32 a code turns here and there, and what follows from it is far larger than that."""
    model = quantize_(models.build("vit", 10, width=64, depth=2).eval(), quantizer)
    save_model(pack_(copy.deepcopy(model)), tmp_path / "vit.safetensors")
    stored, _ = load_model(tmp_path / "vit.safetensors", backend="reference")
    images = torch.rand(16, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(stored.double()(images), model.double()(images), rtol=1e-12, atol=1e-12)
