"""What every model has in common; parametrized over those there are."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from models import MODELS, build
from models.normalize import Normalize
from tests.networks import images

SMALL = {"vit": {"width": 64, "depth": 1, "patch_size": 16}}  # for tests that need not be of the real size


@pytest.mark.parametrize("classes", [2, 10, 100])
@pytest.mark.parametrize("name", MODELS)
def test_images_in_logits_out(name, classes):
    model = build(name, classes, **SMALL.get(name, {})).eval()
    with torch.no_grad():
        logits = model(images(2))
    assert logits.shape == (2, classes) and logits.dtype == torch.float32 and logits.isfinite().all()


@pytest.mark.parametrize("name", MODELS)
def test_no_images_and_images_of_other_types(name):
    model = build(name, 3, **SMALL.get(name, {})).eval()
    with torch.no_grad():
        assert model(images(0)).shape == (0, 3)
        for dtype in (torch.float64, torch.bfloat16):
            batch = images(2).to(dtype)
            assert torch.equal(model(batch), model(batch.float()))


@pytest.mark.parametrize("name", MODELS)
def test_the_constructor_rebuilds_the_model_and_is_json(name):
    model = build(name, 7, **SMALL.get(name, {}))
    told = json.loads(json.dumps(model.constructor))
    again = build(told["name"], told["num_classes"], **told["options"])
    again.load_state_dict(model.state_dict())  # strict: the same tensors of the same shapes
    assert again.constructor == model.constructor
    batch = images(2)
    with torch.no_grad():
        assert torch.equal(again.eval()(batch), model.eval()(batch))


@pytest.mark.parametrize("name", MODELS)
def test_normalisation_is_the_first_step_and_there_is_one(name):
    model = build(name, 3, **SMALL.get(name, {}))
    assert sum(isinstance(m, Normalize) for m in model.modules()) == 1
    seen = []
    for module in model.modules():
        module.register_forward_hook(lambda m, args, out: seen.append(m))
    with torch.no_grad():
        model.eval()(images(1))
    assert isinstance(seen[0], Normalize)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_learns(name):
    model = build(name, 5, **SMALL.get(name, {})).train()
    model(images(4)).square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(
    "arguments, options, sentence",
    [
        (("resnet18", 10), {}, "unknown model 'resnet18': choose one of alexnet, .*vit"),
        (("alexnet", 1), {}, "at least two classes, not 1"),
        (("alexnet", "10"), {}, "at least two classes, not '10'"),
        (("resnet_18", 10), {"width": 3}, "resnet_18 has no option 'width': choose from stem"),
        (("resnet_18", 10), {"stem": "imagenet"}, "unknown stem 'imagenet': choose cifar or maxpool"),
        (("alexnet", 10), {"dropout": "some"}, r"dropout is a fraction in \[0, 1\), not 'some'"),
        (("alexnet", 10), {"dropout": float("nan")}, r"dropout is a fraction in \[0, 1\), not nan"),
        (("alexnet", 10), {"dropout": 1.0}, r"dropout is a fraction in \[0, 1\), not 1.0"),
        (("alexnet", 10), {"batch_norm": "no"}, "batch_norm is true or false, not 'no'"),
        (("vit", 10), {"width": 100}, "multiple of 64"),
        (("vit", 10), {"width": 0}, "multiple of 64"),
        (("vit", 10), {"width": "wide"}, "width is a whole number, not 'wide'"),
        (("vit", 10), {"width": 64, "depth": 0}, "a depth of one layer or more, not 0"),
        (("vit", 10), {"width": 64, "depth": 1.5}, "depth is a whole number, not 1.5"),
        (("vit", 10), {"width": 64, "patch_size": 5}, "choose 4 or 8, not 5"),
        (("vit", 10), {"width": 64, "patch_size": 0}, "choose 4 or 8, not 0"),
        (("vit", 10), {"config": 3}, "config is a dictionary, not 3"),
        (("vit", 10), {"config": {}, "width": 64}, "a config has a width of its own"),
        (("vit", 10), {"config": {}, "checkpoint": "x"}, "of a checkpoint or of a config: give one of the two"),
        (("vit", 10), {"config": {"num_hidden_layers": "many"}}, "vit cannot be built with {'config': {'num_hidden"),
        (("vit", 10), {"mean": [1]}, r"mean is three numbers, one a colour, .* not \[1\]"),
        (("vit", 10), {"mean": [float("inf"), 0, 0]}, r"mean is three numbers, .* not \[inf, 0, 0\]"),
        (("vit", 10), {"std": [0, 0.5, 0.5]}, r"a deviation above 0 are wanted for each channel, not .* and \[0, "),
    ],
)
def test_mistakes_are_told_in_a_sentence(arguments, options, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        build(*arguments, **options)
    assert "\n" not in str(caught.value)


def test_normalize_against_its_formula():
    normalize = Normalize(mean=(125, 123, 114), std=(63, 60, 58))
    pixels = torch.randint(0, 256, (2, 3, 4, 4))
    constants = zip((125, 123, 114), (63, 60, 58), strict=True)
    expected = torch.stack([(pixels[:, c] - m) / s for c, (m, s) in enumerate(constants)], 1)
    torch.testing.assert_close(normalize(pixels / 255), expected.float())
    for wrong in (pixels[:, :1] / 255, torch.rand(4, 4)):
        with pytest.raises(ValueError, match="images have 3 channels"):
            normalize(wrong)
    with pytest.raises(ValueError, match="a mean and a deviation above 0 are wanted for each channel"):
        Normalize((125, 123, 114), (63,))
    assert Normalize().mean == (125, 123, 114) and Normalize().std == (63, 63, 63)
    assert not nn.Module.state_dict(normalize), "its constants are arguments of the constructor, not weights"
