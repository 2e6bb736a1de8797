"""The ViT: compact, from a checkpoint folder, and what is said when there is no checkpoint to be had."""

from __future__ import annotations

import json

import pytest
import torch
from huggingface_hub.utils import logging as hub_logging
from safetensors.torch import load, save_file
from torch.nn import functional as F
from transformers import BertConfig, ViTConfig, ViTForImageClassification, ViTImageProcessor

from models import build
from quantization_utils import load_model, save_model

TINY = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 48,
    "patch_size": 16, "layer_norm_eps": 1e-5, "hidden_act": "relu",
}  # fmt: skip


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(3)
    return ViTForImageClassification(ViTConfig(**TINY, num_labels=6)).eval()


@pytest.fixture
def folder(network, tmp_path):
    network.save_pretrained(tmp_path)
    return tmp_path


def test_compact_by_its_options():
    config = build("vit", 10, width=128, depth=3, patch_size=8).network.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (128, 3, 2)
    assert (config.image_size, config.patch_size, config.intermediate_size, config.num_labels) == (32, 8, 512, 10)
    assert config.hidden_dropout_prob == config.attention_probs_dropout_prob == 0


def test_a_normalisation_that_is_given_beside_a_checkpoint_counts(folder):
    model = build("vit", 6, checkpoint=str(folder), mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.25])
    torch.testing.assert_close(model.normalize.mean_C11.flatten(), torch.tensor([0.4, 0.5, 0.6]))
    torch.testing.assert_close(model.normalize.std_C11.flatten(), torch.tensor([0.2, 0.3, 0.25]))


def test_checkpoint_folder_with_its_head(network, folder):
    """Images are resized to the checkpoint's side, its weights are used, head included where the classes fit."""
    model = build("vit", 6, checkpoint=str(folder)).eval()
    images = torch.rand(2, 3, 32, 32)
    large = F.interpolate(images, (48, 48), mode="bicubic", antialias=True).clamp(0, 1)
    with torch.no_grad():
        torch.testing.assert_close(model(images), network((large - 0.5) / 0.5).logits)
        torch.testing.assert_close(model(large), network((large - 0.5) / 0.5).logits)


def test_checkpoint_folder_with_a_new_head(network, folder):
    model = build("vit", 3, checkpoint=str(folder))
    state = model.network.state_dict()
    for name, tensor in network.state_dict().items():
        if name.startswith("classifier"):
            assert state[name].shape[0] == 3
        else:
            assert torch.equal(state[name], tensor), name


def test_normalisation_of_the_checkpoint(folder):
    ViTImageProcessor(image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.25]).save_pretrained(folder)
    model = build("vit", 6, checkpoint=str(folder))
    torch.testing.assert_close(model.normalize.mean_C11.flatten(), torch.tensor([0.4, 0.5, 0.6]))
    torch.testing.assert_close(model.normalize.std_C11.flatten(), torch.tensor([0.2, 0.3, 0.25]))
    assert model.constructor["options"]["mean"] == [0.4, 0.5, 0.6]


def test_config_rebuilds_a_checkpoint_without_the_folder(folder):
    model = build("vit", 6, checkpoint=str(folder)).eval()
    options = json.loads(json.dumps(model.constructor["options"]))
    assert "checkpoint" not in options and str(folder) not in json.dumps(options)
    (folder / "config.json").unlink()
    again = build("vit", 6, **options).eval()
    again.load_state_dict(model.state_dict())
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(images), model(images))
    assert again.network.config.layer_norm_eps == 1e-5


def test_no_hub_is_one_sentence_that_names_two_ways_on(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub_logging.set_verbosity_warning()
    with pytest.raises(FileNotFoundError) as caught:
        build("vit", 10, checkpoint="nobody/no-such-checkpoint")
    assert hub_logging.get_verbosity() == hub_logging.WARNING, "it was quiet for that time alone"
    sentence = str(caught.value)
    assert "nobody/no-such-checkpoint" in sentence and "\n" not in sentence
    assert "checkpoint=FOLDER" in sentence and "checkpoint=none" in sentence


def test_a_checkpoint_of_another_kind(tmp_path):
    BertConfig(hidden_size=32, num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a bert checkpoint: name one of a ViT"):
        build("vit", 10, checkpoint=str(tmp_path))


def test_a_folder_with_the_wrong_content_is_one_sentence(folder):
    def told() -> str:
        with pytest.raises(ValueError, match="cannot be loaded as a ViT") as caught:
            build("vit", 6, checkpoint=str(folder))
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
        return str(caught.value)

    weights, config = folder / "model.safetensors", folder / "config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    told()
    weights.unlink()
    told()
    config.write_text("{")
    told()
    config.unlink()
    told()


def test_weights_that_are_missing_or_misshaped_are_not_made_up(network, folder):
    """transformers would draw them at random and warn: the row would be of another model than it says."""
    state = load((folder / "model.safetensors").read_bytes())  # not mapped: the file is overwritten
    some = next(name for name in state if "attention" in name and name.endswith("weight"))
    for changed in ({k: v for k, v in state.items() if k != some}, state | {some: state[some][:-1].clone()}):
        save_file(changed, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=f"has no weights for .*{some.rpartition('.')[2]}.*: name a whole ViT"):
            build("vit", 6, checkpoint=str(folder))


@pytest.mark.parametrize("size", ["width", "depth", "patch_size"])
def test_sizes_of_the_compact_vit_beside_a_checkpoint_are_not_ignored(size, folder):
    with pytest.raises(ValueError, match=f"has a {size} of its own: for the compact ViT add checkpoint=none"):
        build("vit", 6, checkpoint=str(folder), **{size: 64})


def test_a_damaged_image_processor_is_not_replaced_by_a_guess(folder):
    ViTImageProcessor(image_mean=[0.4, 0.5, 0.6]).save_pretrained(folder)
    file = folder / "preprocessor_config.json"
    file.write_text(file.read_text()[:40])
    with pytest.raises(ValueError, match="image processor of .* is damaged"):
        build("vit", 6, checkpoint=str(folder))


@pytest.mark.parametrize("option, wrong", [("checkpoint", 0), ("mean", ["a", "b", "c"])])
def test_options_of_a_wrong_kind_are_a_sentence_of_our_own(option, wrong):
    with pytest.raises(ValueError, match=f"^{option} is "):
        build("vit", 6, **{option: wrong})


def save(folder, network=None, **config):
    """A checkpoint of that configuration, and of the network's weights, or new ones."""
    made = ViTConfig(**{**TINY, "num_labels": 6, **config})
    (network or ViTForImageClassification(made)).save_pretrained(folder)
    made.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "foreign", [{"output_hidden_states": True}, {"output_attentions": True}, {"return_dict": False}]
)
@torch.no_grad()
def test_what_a_checkpoint_says_beside_its_structure_changes_nothing(foreign, network, tmp_path):
    """Once trained it can be saved: transformers hangs hooks on the layers of a network that is to return more."""
    model = build("vit", 6, checkpoint=save(tmp_path, network, **foreign)).eval()
    images = torch.rand(2, 3, 48, 48)
    torch.testing.assert_close(model(images), network((images - 0.5) / 0.5).logits)
    save_model(model, tmp_path / "model.safetensors")
    assert torch.equal(load_model(tmp_path / "model.safetensors")[0](images), model(images))


@pytest.mark.parametrize(
    "config, said",
    [
        ({"image_size": [32, 48]}, "32×48 pixels and 3 channels"),
        ({"image_size": [48, 48, 48]}, "48×48×48 pixels and 3 channels"),
        ({"num_channels": 1}, "48×48 pixels and 1 channels"),
        ({"patch_size": 64}, "in patches of 64"),
        ({"head_dim": 32}, "size mismatch"),
    ],
)
def test_checkpoints_of_other_shapes_are_refused_before_they_are_trained(config, said, tmp_path):
    if {"patch_size", "image_size"} & config.keys():  # no network of some of them can be made
        ViTConfig(**{**TINY, **config}).save_pretrained(tmp_path)
    else:
        save(tmp_path, **config)
    with pytest.raises(ValueError, match=said):
        build("vit", 6, checkpoint=str(tmp_path))
    if "head_dim" not in config:
        with pytest.raises(ValueError, match=f"a ViT of this config .*{said}"):
            build("vit", 6, config={**TINY, **config})


def test_a_side_may_be_given_twice(tmp_path):
    model = build("vit", 6, checkpoint=save(tmp_path, image_size=[48, 48]))
    assert model.network.config.image_size == 48 and model(torch.rand(1, 3, 32, 32)).shape == (1, 6)
    model = build("vit", 6, config={**TINY, "image_size": [48, 48], "num_labels": 3})  # as many as there are classes
    assert model.network.config.image_size == 48 and model(torch.rand(1, 3, 32, 32)).shape == (1, 6)


@pytest.mark.parametrize(
    "processor, mean, std",
    [
        ({"do_normalize": False}, 0.0, 1.0),
        ({"image_mean": [0.4] * 3, "image_std": [0.2] * 3}, 0.4, 0.2),
        ({"do_rescale": False}, None, "leaves pixels beyond"),
        ({"rescale_factor": 1 / 127.5}, None, "leaves pixels beyond"),
        ({"image_mean": [0.5]}, None, "mean is three numbers"),
        ({"image_std": 0.5}, None, "std is three numbers"),
    ],
)
def test_an_image_processor_is_done_as_it_says_or_refused(processor, mean, std, folder):
    ViTImageProcessor(**processor).save_pretrained(folder)
    if mean is None:
        with pytest.raises(ValueError, match=std):
            build("vit", 6, checkpoint=str(folder))
        return
    normalize = build("vit", 6, checkpoint=str(folder)).normalize
    assert normalize.mean_C11.flatten().tolist() == pytest.approx([mean] * 3)
    assert normalize.std_C11.flatten().tolist() == pytest.approx([std] * 3)


def test_weights_that_are_no_numbers_are_refused(network, folder):
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    weights["classifier.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="no finite numbers in classifier.weight"):
        build("vit", 6, checkpoint=str(folder))


def test_one_image_is_no_batch():
    with pytest.raises(ValueError, match=r"images are a batch \(B, 3, H, W\)"):
        build("vit", 10, width=64, depth=1)(torch.rand(3, 32, 32))


def test_half_precision_images_of_another_size():
    model, images = build("vit", 10, width=64, depth=1).eval(), torch.rand(1, 3, 40, 40)
    with torch.no_grad():
        torch.testing.assert_close(model(images.half()), model(images.half().float()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@torch.no_grad()
def test_images_of_another_type_are_resized_too(dtype):
    model = build("vit", 3, width=64, depth=1, patch_size=16).eval()
    images = torch.rand(2, 3, 20, 20).to(dtype)
    assert torch.equal(model(images), model(images.float()))
