from __future__ import annotations

import pytest
import torch
from torch import nn

from models.select import select_layers
from quantization_utils import quantize_


@pytest.fixture
def model():
    inner = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Linear(4, 4))
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), inner, nn.Linear(4, 2))


@pytest.mark.parametrize(
    "only, keep, names",
    [
        (None, (), ["0", "2.0", "2.1", "3"]),
        (nn.Conv2d, (), ["0", "2.0"]),
        ("2.*", (), ["2.0", "2.1"]),
        (["0", nn.Linear], (), ["0", "2.1", "3"]),
        (None, ["2.*", "3"], ["0"]),
        (nn.Linear, ["3"], ["2.1"]),
        ([], (), []),
    ],
)
def test_only_and_keep(model, only, keep, names):
    assert [name for name, _ in select_layers(model, only, keep)] == names


def test_a_type_takes_the_quantized_layers_of_its_kind_too(model):
    assert [name for name, _ in select_layers(quantize_(model), nn.Conv2d)] == ["0", "2.0"]


def test_layers_in_a_list_of_nodes_are_no_packed_network():
    model = nn.Module()
    model.nodes = nn.ModuleList([nn.Linear(4, 4)])
    assert [name for name, _ in select_layers(model)] == ["nodes.0"]


@pytest.mark.parametrize("which", ["only", "keep"])
def test_a_pattern_that_matches_nothing_is_a_mistake(model, which):
    with pytest.raises(ValueError, match=f"{which}='4' matches no layer: choose from 0, 2.0, 2.1, 3"):
        select_layers(model, **{which: ["0", "4"]})


@pytest.mark.parametrize("how", [{"keep": None}, {"keep": (nn.Linear,)}, {"only": nn.Linear(3, 4)}, {"only": 123}])
def test_what_is_neither_a_type_nor_a_pattern_is_told(model, how):
    (option,) = how
    with pytest.raises(ValueError, match=f"{option} takes .*name patterns, not "):
        select_layers(model, **how)


def test_models_that_cannot_be_changed_yet_or_any_more(model):
    with pytest.raises(ValueError, match="the model is compiled: give what was compiled"):
        select_layers(torch.compile(model, backend="eager"))
    model[0].to("meta")
    assert len(select_layers(model, keep="0")) == 3
    with pytest.raises(ValueError, match="0 has no values, it is on the device meta"):
        select_layers(model.to("meta"))
