from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from quantization_utils import calibrate_, quantize_
from quantization_utils.bit_layers import StaticQuantizer
from tests.networks import images, make
from train_test_utils.recipe import Recipe, adamw, sgd


@pytest.mark.parametrize(
    "epochs, size, budget, steps",
    [
        (2, 1280, 1, 20), (2, 1289, 1, 20), (2, 1280, 0.5, 10), (0.25, 1280, 1, 2), (0.27, 1280, 1, 3),
        (5, 1280, 1e-6, 1), (3, 50, 1, 3),
    ],
)
def test_number_of_steps(epochs, size, budget, steps):
    """Whole batches only, fractions of epochs, at least one step."""
    assert Recipe(epochs=epochs, lr=1, batch_size=128).steps(size, budget) == steps


def test_warm_up_then_half_a_cosine():
    recipe = Recipe(epochs=1, lr=0.4, warmup=0.1)
    assert recipe == Recipe(epochs=1, lr=0.4), "the default"
    rates = [recipe.lr_at(i, 100) for i in range(100)]
    assert rates[:10] == pytest.approx([0.4 * (i + 1) / 11 for i in range(10)])
    assert rates[10] == pytest.approx(0.4) and rates[55] == pytest.approx(0.2)
    assert rates[10:] == sorted(rates[10:], reverse=True) and 0 < rates[-1] < 0.4 * (math.pi / 90) ** 2
    assert [Recipe(epochs=1, lr=1, warmup=0.0).lr_at(0, 1)] == [1.0]


def test_the_area_that_is_blanked_is_in_proportion_to_the_budget():
    recipe = Recipe(epochs=1, lr=1, cutout=16)
    assert [recipe.cutout_at(budget) for budget in (0.001, 0.04, 0.25, 1.0, 4.0)] == [1, 3, 8, 16, 16]
    assert Recipe(epochs=1, lr=1).cutout_at(1.0) == 0


def test_the_ramp_goes_up_in_quarters():
    recipe = Recipe(epochs=1, lr=1, ramp=0.5)
    parts = [recipe.quantized_part_at(i, 40) for i in range(40)]
    assert parts == [0.0] * 5 + [0.25] * 5 + [0.5] * 5 + [0.75] * 5 + [1.0] * 20
    assert {Recipe(epochs=1, lr=1).quantized_part_at(i, 40) for i in range(40)} == {1.0}


@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_only_matrices_and_kernels_decay_and_steps_go_slowly(optimizer):
    model = calibrate_(quantize_(make("resnet_like")), images(8))
    groups = Recipe(epochs=1, lr=0.1, weight_decay=0.01, optimizer=optimizer).build_optimizer(model).param_groups
    decayed, plain, steps = groups
    assert all(p.dim() >= 2 for p in decayed["params"]) and decayed["weight_decay"] == 0.01
    assert plain["weight_decay"] == steps["weight_decay"] == 0.0
    assert (decayed["lr_factor"], plain["lr_factor"], steps["lr_factor"]) == (1.0, 1.0, 0.01)
    expected = {id(m.step) for m in model.modules() if isinstance(m, StaticQuantizer)}
    assert {id(p) for p in steps["params"]} == expected
    every = [id(p) for g in groups for p in g["params"]]
    assert sorted(every) == sorted(id(p) for p in model.parameters())


def test_frozen_parameters_are_left_alone():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    groups = Recipe(epochs=1, lr=0.1).build_optimizer(model).param_groups
    assert {id(p) for g in groups for p in g["params"]} == {id(model[1].weight), id(model[1].bias)}


def test_one_step_of_sgd_by_its_formula():
    layer = nn.Linear(2, 1, bias=False)
    weight = layer.weight.detach().clone()
    optimizer = Recipe(epochs=1, lr=0.1, weight_decay=0.5).build_optimizer(layer)
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    gradient = torch.ones(1, 2) + 0.5 * weight
    torch.testing.assert_close(layer.weight.detach(), weight - 0.1 * 1.9 * gradient)  # Nesterov: g + 0.9 · g


def test_the_betas_of_adamw():
    assert adamw([{"params": [nn.Parameter(torch.ones(1))]}], 0.1).defaults["betas"] == (0.9, 0.999)
