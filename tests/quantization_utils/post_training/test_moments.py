from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from quantization_utils.post_training.moments import MomentSum, images_wanted


@pytest.mark.parametrize("layer, shape", [
    (nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=False), (6, 3, 9, 9)),
    (nn.Conv2d(3, 5, 3, padding=1, dilation=2, bias=False), (6, 3, 9, 9)),
    (nn.Linear(4, 5, bias=False), (6, 7, 4)),
    (nn.Linear(4, 5, bias=False), (6, 4)),
])  # fmt: skip
def test_moments_against_those_of_the_outputs_themselves(layer: nn.Module, shape: tuple[int, ...]) -> None:
    inputs = torch.randn(shape)
    total = MomentSum(layer, images=6)
    with torch.no_grad():
        outputs = layer(inputs)
        targets = outputs + torch.randn_like(outputs)
        for part, wanted in zip(inputs.split(4), targets.split(4), strict=True):
            total.add(part, wanted)
        moments, weight_NK = total.result(), layer.weight.flatten(1)
    dimensions = (0, 2, 3) if outputs.dim() == 4 else tuple(range(outputs.dim() - 1))
    torch.testing.assert_close(moments.output_mean(weight_NK), outputs.mean(dimensions))
    torch.testing.assert_close(moments.output_variance(weight_NK), outputs.var(dimensions, correction=0))
    centred = [t - t.mean(dimensions, keepdim=True) for t in (outputs, targets)]
    torch.testing.assert_close(moments.covariance(weight_NK), (centred[0] * centred[1]).mean(dimensions))


def test_central_moments_are_those_of_what_is_left_without_the_means() -> None:
    layer, inputs, targets = nn.Linear(4, 5), torch.randn(50, 4) + 3, torch.randn(50, 5) - 2
    found = []
    for x, t in ((inputs, targets), (inputs - inputs.mean(0), targets - targets.mean(0))):
        total = MomentSum(layer, images=50)
        total.add(x, t)
        found.append(total.result())
    centred, wanted = found[0].centred(), found[1]
    for name in ("inputs_KK", "mean_K", "cross_NK", "target_mean_N"):
        torch.testing.assert_close(getattr(centred, name), getattr(wanted, name), rtol=1e-4, atol=1e-5)


def test_positions_are_thinned_out_and_stay_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantization_utils.post_training.moments.MAX_COLUMNS", 60)
    monkeypatch.setattr("quantization_utils.post_training.moments.LEAST_OF_AN_IMAGE", 1)
    layer, inputs = nn.Conv2d(2, 3, 1, bias=False), torch.randn(10, 2, 8, 8)
    totals = [MomentSum(layer, images=10) for _ in range(2)]
    for total in totals:
        total.add(inputs, F.conv2d(inputs, layer.weight.detach()))
    moments = totals[0].result()
    assert moments.columns == 60  # 6 of 64 positions of each image
    assert torch.equal(totals[1].result().inputs_KK, moments.inputs_KK)  # the same ones every time
    torch.testing.assert_close(moments.cross_NK, layer.weight.detach().flatten(1) @ moments.inputs_KK)


def test_of_every_image_some_positions_count_however_many_images_there_are() -> None:
    total = MomentSum(nn.Conv2d(64, 3, 1), images=10_000)
    inputs = torch.eye(64).view(1, 64, 8, 8).repeat(2, 1, 1, 1)  # a channel for each position
    total.add(inputs, torch.randn(2, 3, 8, 8))
    assert total.columns == 48
    for _ in range(29):
        total.add(inputs, torch.randn(2, 3, 8, 8))
    assert total.result().mean_K.min() > 0  # every position has its turn


def test_how_many_positions_of_an_image_count() -> None:
    assert [MomentSum(nn.Linear(2, 2), images).per_image for images in (100, 100_000)] == [250, 24]
    assert [images_wanted(positions) for positions in (1024, 24, 4, 1)] == [1042, 1042, 6250, 25_000]
