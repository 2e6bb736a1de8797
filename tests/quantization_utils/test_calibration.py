"""`calibrate_`: where static scales of activations go, and what they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models.normalize import Normalize
from quantization_utils import calibrate_, pack_, quantize_
from quantization_utils.bit_layers import Quantized, StaticQuantizer
from quantization_utils.post_training.layer_inputs import execution_order
from quantization_utils.transform import _best_step
from tests.networks import CHAINS, KINDS, images, layers, logits_of, make


@pytest.mark.parametrize("kind", CHAINS)
def test_calibration_gives_every_input_one_static_step(kind):
    model = quantize_(make(kind), act_bits=6)
    dynamic = logits_of(model, images(4))
    assert calibrate_(model, images(32)) is model
    steps = [m.quantizer for m in layers(model, Quantized)]
    assert all(m.input_quantizer is None for m in layers(model))
    assert len(steps) == (6 if kind == "resnet_like" else 3) and {q.bits for q in steps} == {6}
    assert all(float(q.step.detach()) > 0 for q in steps) and dynamic.isfinite().all()


def test_calibrating_again_sets_the_steps_anew():
    """From float activations: those that the steps there are would round have no part in the new ones."""
    model, batch = quantize_(make("alexnet_like")), images(16)

    def steps(images):
        return [float(q.step.detach()) for q in layers(calibrate_(model, images), StaticQuantizer)]

    before, darker, again = steps(batch), steps(batch * 0.1), steps(batch)
    assert len(before) == 3 and before == again and all(new != old for new, old in zip(darker, before, strict=True))


def test_transformers_keep_their_dynamic_scales():
    model = quantize_(make("vit_like"))
    batch = images(2)
    expected = logits_of(model, batch)
    assert torch.equal(logits_of(calibrate_(model, images(4)), batch), expected)
    assert not layers(model, Quantized)


def test_an_input_that_no_node_ends_keeps_its_dynamic_scale():
    ends = [nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 28 * 28, 2)]
    model = calibrate_(quantize_(nn.Sequential(Normalize(), nn.Conv2d(3, 4, 3), *ends)), images(8))
    assert [m.input_quantizer is None for m in layers(model)] == [True, False, True]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_calibration_changes_no_weight_and_no_mode(kind, training):
    model = quantize_(make(kind)).train(training)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    calibrate_(model, images(8))
    assert all(m.training == training for m in model.modules())
    now = model.state_dict()
    assert all(torch.equal(now[k], v) for k, v in state.items())


def test_what_are_no_images():
    with pytest.raises(ValueError, match="at least one image"):
        calibrate_(quantize_(make("alexnet_like")), images(0))
    with pytest.raises(ValueError, match="not torch.uint8"):
        calibrate_(quantize_(nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU())), images(2).byte())


@pytest.mark.parametrize("code_max", [255, 15])
def test_the_step_is_near_the_best_there_is(code_max):
    values = torch.randn(5000).clamp_min(0).square()  # a long tail, so that clipping pays

    def error(step: float) -> float:
        return float((values - (values / step).round().clamp(0, code_max) * step).square().sum())

    best = min(error(float(values.max()) * i / 1000 / code_max) for i in range(1, 1001))
    assert error(_best_step(values, code_max)) <= 1.05 * best
    assert _best_step(torch.zeros(10), code_max) > 0


class Steeper(nn.ReLU):
    def forward(self, input):
        return 2 * input


POOLS = [nn.AdaptiveAvgPool2d(18), nn.AdaptiveAvgPool2d(16)]


@pytest.mark.parametrize(
    "signed",
    [[Normalize(), POOLS[1]], [Normalize(), *POOLS], [Normalize(), nn.BatchNorm2d(3), *POOLS], [Steeper()]],
    ids=["pool", "pools", "batch norm", "own ReLU"],
)
def test_what_may_be_negative_is_given_no_unsigned_codes(signed):
    tail = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)]
    model = calibrate_(quantize_(nn.Sequential(*signed, *tail)), images(8))
    conv = model[len(signed)]
    assert not layers(model[: len(signed)], Quantized) and conv.input_quantizer.bits == 8
    assert len(layers(model, Quantized)) == 2


def test_one_input_has_one_number_of_bits():
    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
            self.relu = nn.ReLU()

        def forward(self, x):
            x = self.relu(self.a(x))
            return self.b(x) + self.c(x)

    model = quantize_(quantize_(Fork(), act_bits=4, only="c"), act_bits=8)
    before = str(model)
    with pytest.raises(ValueError, match="c reads with 4 bits what another layer reads with others"):
        calibrate_(model, images(8))
    assert str(model) == before and "Dynamic" in before


def test_what_is_done_in_place_later_does_not_change_a_step():
    class Sum(nn.Module):
        def __init__(self, in_place):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.relu, self.end = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.ReLU()
            self.in_place = in_place

        def forward(self, x):
            x = self.relu(self.a(x))
            y = self.b(x)
            if self.in_place:
                x += y
            else:
                x = x + y
            return self.end(x)

    batch = images(8)
    steps = [calibrate_(quantize_(Sum(in_place)), batch).relu.quantizer.step for in_place in (True, False)]
    assert torch.equal(*steps)


def test_a_relu_that_is_used_twice_is_not_given_one_scale():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
            self.relu = nn.ReLU()

        def forward(self, x):
            return self.c(self.relu(self.b(self.relu(self.a(x))) * 100))

    model, batch = quantize_(Shared(), act_bits=4, keep=("c",)), images(2)
    expected = logits_of(model, batch)
    with pytest.raises(ValueError, match="relu runs more than once .*: give each use its own module"):
        calibrate_(model, batch)
    assert torch.equal(logits_of(model, batch), expected)


@pytest.mark.parametrize("ended", [True, False])
def test_a_layer_that_is_used_twice_has_both_inputs_quantized(ended):
    """Where something else than a ReLU stands before one of them, both keep their dynamic scales."""
    twice = nn.Conv2d(8, 8, 3, padding=1)
    between = nn.ReLU() if ended else nn.Softplus()
    model = nn.Sequential(Normalize(), nn.Conv2d(3, 8, 3), nn.ReLU(), twice, between, twice)
    calibrate_(quantize_(model, act_bits=2), images(4))
    seen = []
    model[3].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits_of(model, images(1))
    if ended:
        assert model[3].input_quantizer is None and [len(x.unique()) <= 4 for x in seen] == [True, True]
    else:
        assert model[3].input_quantizer.bits == 2


def test_calibration_comes_between_quantization_and_packing():
    for model in (make("alexnet_like"), pack_(quantize_(make("alexnet_like")))):
        with pytest.raises(ValueError, match="no layer is quantized, or all are packed"):
            calibrate_(model, images(8))
    for wrong, size in ((images(0), 8), (images(8), 0)):
        with pytest.raises(ValueError, match="at least one image, and batches of at least one"):
            calibrate_(quantize_(make("alexnet_like")), wrong, size)
    with pytest.raises(ValueError, match="images are one tensor .*, not a list"):
        calibrate_(quantize_(make("alexnet_like")), [images(8)])


class CalledByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
        self.pool, self.flat, self.fc = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)

    def forward(self, images):
        return self.fc(self.flat(self.pool(self.relu(input=self.bn(input=self.conv(input=images))))))


def test_modules_that_are_called_by_name():
    batch, model = images(8), CalledByName().eval()
    assert execution_order(model, batch[:1]) == {"conv": "bn", "fc": None}
    expected = calibrate_(quantize_(model), batch)(batch)
    torch.testing.assert_close(pack_(model)(batch), expected, rtol=0, atol=1e-4)


def test_a_second_calibration_that_fails_leaves_the_steps_of_the_first():
    model = calibrate_(quantize_(make("alexnet_like")), images(8))
    model[1].weight.data[0] = torch.nan
    before = str(model)
    with pytest.raises(ValueError, match="is not finite on the calibration images"):
        calibrate_(model, images(8))
    assert str(model) == before


def test_a_lone_large_value_is_clipped_where_that_is_better():
    """The step is nearly the best of a fine grid, which goes far below the largest value."""
    torch.manual_seed(0)
    values = torch.cat([torch.rand(100_000), torch.tensor([10.0])])

    def error(step):
        return float((values - (values / step).round().clamp(0, 15) * step).square().sum())

    best = min(error(10 * part / 600 / 15) for part in range(10, 601, 2))
    assert error(_best_step(values, 15)) <= 1.05 * best
