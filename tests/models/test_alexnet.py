from __future__ import annotations

import pytest
from torch import nn

from models import build


def layers(model: nn.Module, kind: type) -> list:
    return [m for m in model.modules() if isinstance(m, kind)]


@pytest.mark.parametrize("batch_norm", [True, False])
def test_layer_sizes_of_the_earlier_study(batch_norm):
    model = build("alexnet", 100, batch_norm=batch_norm)
    assert [c.out_channels for c in layers(model, nn.Conv2d)] == [64, 192, 384, 256, 256]
    linear = layers(model, nn.Linear)
    assert [(layer.in_features, layer.out_features) for layer in linear] == [(9216, 4096), (4096, 4096), (4096, 100)]
    norms = [m.num_features for m in layers(model, (nn.BatchNorm1d, nn.BatchNorm2d))]
    assert norms == ([64, 192, 384, 256, 256, 4096, 4096] if batch_norm else [])
    assert [layer.bias is None for layer in layers(model, (nn.Conv2d, nn.Linear))] == [batch_norm] * 7 + [False]


def test_batch_norm_is_the_default_and_dropout_fits():
    model, original = build("alexnet", 10), build("alexnet", 10, batch_norm=False)
    assert layers(model, nn.BatchNorm2d)
    assert {d.p for d in layers(model, nn.Dropout)} == {0.2} and {d.p for d in layers(original, nn.Dropout)} == {0.5}
    assert {d.p for d in layers(build("alexnet", 10, dropout=0.0), nn.Dropout)} == {0.0}


def test_weights_start_as_he_et_al_draw_them_and_biases_at_zero():
    for layer in layers(build("alexnet", 10, batch_norm=False), (nn.Conv2d, nn.Linear)):
        fan_in = layer.weight[0].numel()
        assert layer.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.05) and not layer.bias.any()
