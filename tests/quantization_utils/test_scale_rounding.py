"""Float16 scales: taken where classes stay, refused where they would change, one kind of tensor without the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from quantization_utils import calibrate_, pack_, quantize_
from quantization_utils.bit_layers import PackedConv2d, PackedLinear
from quantization_utils.network import PackedNetwork
from quantization_utils.scale_rounding import IMAGES, _round, with_float16_scales
from tests.networks import images, make

FINE = 1 + 2.0**-13  # float16 takes it for 1


def two_classes(scale: list[float], bias: list[float], codes: tuple[int, int] = (1, 1)) -> nn.Module:
    """Two logits of a picture x are codes[i] · scale[i] · x[0] + bias[i]; thirty never are the largest."""
    codes_NK = torch.zeros(32, 3 * 32 * 32, dtype=torch.int8)
    codes_NK[:2, 0] = torch.tensor(codes)
    scale_N, bias_N = torch.ones(32), torch.full((32,), -100.0)
    scale_N[:2], bias_N[:2] = torch.tensor(scale), torch.tensor(bias)
    return nn.Sequential(nn.Flatten(), PackedLinear(codes_NK, scale_N, bias_N, "ternary", None))


def is_float16(tensor: Tensor) -> bool:
    return torch.equal(tensor, tensor.half().float())


@pytest.mark.parametrize(
    ("scale", "bias", "scale_rounded", "bias_rounded"),
    [
        pytest.param([FINE, FINE], [2 * FINE, 0.0], True, True, id="far apart"),
        pytest.param([1.0, FINE], [0.0, 0.0], False, True, id="scales decide"),
        pytest.param([FINE, FINE], [1.0, FINE], True, False, id="biases decide"),
        pytest.param([FINE, 1.0], [FINE, 1.0], False, False, id="both decide"),
        pytest.param([FINE, 1.0], [FINE, 1 - 5 * 2.0**-10], True, False, id="either alone will do"),
    ],
)
def test_what_classes_hang_on_stays_as_it_was(scale, bias, scale_rounded, bias_rounded):
    torch.manual_seed(0)
    model = two_classes(scale, bias)
    rounded = with_float16_scales(model, 0.5 + images(64) / 2)
    assert (is_float16(rounded[1].scale), is_float16(rounded[1].bias)) == (scale_rounded, bias_rounded)
    assert torch.equal(model[1].scale[:2], torch.tensor(scale)) and torch.equal(model[1].bias[:2], torch.tensor(bias))
    assert rounded[1].codes.data_ptr() == model[1].codes.data_ptr()


@pytest.mark.parametrize("near", [0, 3, 4])
def test_a_few_images_near_to_changing_are_allowed(near):
    """Of `IMAGES`, `near` change when logits move 32 times as far; 0.64% may, for 0.02% that do when they do not."""
    model = two_classes([FINE, 1.0], [2.0**-10, 0.0])  # rounding takes a white pixel's 2^-13 from the lead of class 0
    x = torch.zeros(2 * IMAGES, 3, 32, 32)
    x[:near, 0, 0, 0] = x[IMAGES:, 0, 0, 0] = 1.0  # the second half is not looked at
    rounded = with_float16_scales(model, x)
    assert is_float16(rounded[1].scale) == (near <= 3)


@pytest.mark.parametrize("kind", ["alexnet_like", "resnet_like"])
def test_a_network_is_returned(kind):
    model = pack_(calibrate_(quantize_(make(kind)), images(32)))
    assert isinstance(model, PackedNetwork) and with_float16_scales(model, images(2)) is model


def test_few_numbers_stay_as_they_are():
    """Half of them would be no shorter in the file."""
    layer = PackedLinear(torch.ones(31, 3072, dtype=torch.int8), torch.full((31,), FINE), None, "ternary", None)
    rounded = with_float16_scales(nn.Sequential(nn.Flatten(), layer), images(2))
    assert torch.equal(rounded[1].scale, layer.scale)


def test_a_float_model_is_returned():
    model = make("resnet_like")
    assert with_float16_scales(model, images(2)) is model


def test_convolutions_are_rounded_as_well():
    geometry = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    codes, scale_N = torch.ones(32, 3, 1, 1, dtype=torch.int8), torch.full((32,), FINE)
    model = nn.Sequential(PackedConv2d(codes, scale_N, None, "ternary", None, geometry=geometry), nn.Flatten())
    assert is_float16(with_float16_scales(model, torch.zeros(2, 3, 4, 4))[0].scale)


@pytest.mark.parametrize("name, value", [("bias", 1e6), ("scale", 1e-9), ("scale", 100.5 * 2**-24)])
def test_what_float16_cannot_hold_stays_as_it_was(name, value):
    tensor = torch.ones(32)
    tensor[3] = value
    assert _round(tensor, name) is tensor


@pytest.mark.parametrize("name, value", [("bias", 1e-9), ("scale", 1 + 2.0**-11)])
def test_what_float16_holds_but_for_its_rounding_is_rounded(name, value):
    """A bias is added to larger numbers, so one near zero may be lost."""
    assert is_float16(_round(torch.full((32,), value), name))


def test_the_model_is_evaluated_and_its_modes_stay():
    model = two_classes([FINE, FINE], [0.0, 0.0]).append(nn.BatchNorm1d(32)).train()
    inner = model[0].eval()
    with_float16_scales(model, images(2))
    assert model.training and not inner.training and model[2].num_batches_tracked == 0
