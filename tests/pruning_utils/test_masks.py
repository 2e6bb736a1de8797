import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pruning_utils import Mask, l1, l2_filters, prune_, strip_masks_, zero_fraction
from pruning_utils.masks import apply_mask_, choose_kept, mask_of


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 16, 4),
    )  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, float("-inf")]), min_size=1, max_size=40), st.data())
def test_exactly_k_entries_go_by_importance_then_position(values, data):
    k = data.draw(st.integers(0, len(values)))
    kept = choose_kept((torch.tensor(values),), k)
    expected = sorted(range(len(values)), key=lambda i: (values[i], i))[:k]
    assert (~kept).nonzero().flatten().tolist() == sorted(expected)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=40), st.data())
def test_ties_go_by_the_second_key(pairs, data):
    k = data.draw(st.integers(0, len(pairs)))
    first, second = (torch.tensor([float(p[i]) for p in pairs]) for i in (0, 1))
    expected = sorted(range(len(pairs)), key=lambda i: (*pairs[i], i))[:k]
    assert (~choose_kept((first, second), k)).nonzero().flatten().tolist() == sorted(expected)


def test_the_mask_keeps_the_shape_of_its_keys_also_not_contiguous():
    importance = torch.arange(12.0).view(3, 4).t()
    kept = choose_kept((importance,), 4)
    assert torch.equal(kept, importance >= 4)


def test_a_masked_entry_is_plus_zero_whatever_is_behind_it():
    mask = Mask(torch.tensor([True, False, False, False]))
    out = mask(torch.tensor([-2.0, -3.0, float("nan"), float("inf")]))
    assert out.tolist() == [-2.0, 0.0, 0.0, 0.0]
    assert not out[1:].signbit().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(), (5,), (0, 3), (2, 140_000), (6, 4, 3, 3)])  # rows above a block; another order
def test_a_mask_is_a_choice_of_each_entry_in_any_type_and_order_and_so_is_its_gradient(dtype, shape):
    x, kept, grad = torch.randn(shape), torch.rand(shape) < 0.5, torch.randn(shape)
    if len(shape) == 4:
        x, grad = x.to(memory_format=torch.channels_last), grad.transpose(2, 3)
    x, grad = x.to(dtype).requires_grad_(), grad.to(dtype)
    out = Mask(kept)(x)
    out.backward(grad)
    wanted, wanted_grad = (t.detach().float().where(kept, 0.0) for t in (x, grad))
    assert out.dtype == dtype and torch.equal(out.float(), wanted) and torch.equal(x.grad.float(), wanted_grad)


def test_the_gradient_of_a_mask_has_one_too():
    x, kept = torch.randn(4, 3, dtype=torch.float64, requires_grad=True), torch.rand(4, 3) < 0.5
    assert torch.autograd.gradgradcheck(lambda x: Mask(kept)(x).pow(3), x)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("score", [l1, l2_filters], ids=lambda s: s.__name__)
def test_zeros_survive_optimizer_steps_and_the_rest_learns(optimizer, score):
    model = small_network()
    x = torch.randn(16, 3, 8, 8)
    step = OPTIMIZERS[optimizer](model.parameters())  # momentum from before the pruning too
    for phase in range(2):
        if phase == 1:
            prune_(model, score, 0.5)
        before = {n: t.detach().clone() for n, t in model.named_parameters()}
        zeros = [m.weight == 0 for m in model if isinstance(m, (nn.Conv2d, nn.Linear))]
        for _ in range(3):
            step.zero_grad()
            model(x).square().sum().backward()
            step.step()
        after = [m.weight == 0 for m in model if isinstance(m, (nn.Conv2d, nn.Linear))]
        assert all(torch.equal(a, b) for a, b in zip(zeros, after, strict=True))
        assert all(not torch.equal(before[n], p) for n, p in model.named_parameters())
    assert after[0].float().mean() == 0.5


def test_deepcopy_is_equal_and_independent():
    model = prune_(small_network(), l2_filters, 0.5)
    twin = copy.deepcopy(model)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(model.eval()(x), twin.eval()(x))
    prune_(twin, l2_filters, 0.75)
    assert zero_fraction(model[0]) == 0.5 and zero_fraction(twin[0]) == 0.75


def test_state_dict_round_trip_restores_masks_and_weights():
    model = prune_(small_network(), l1, 0.5)
    other = prune_(small_network(), lambda w: -w.abs(), 0.5)
    x = torch.randn(2, 3, 8, 8)
    assert not torch.equal(model.eval()(x), other.eval()(x))
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(model(x), other(x))


def test_the_parameter_behind_the_mask_holds_no_pruned_values():
    layer = nn.Linear(4, 4)
    apply_mask_(layer, "weight", torch.eye(4, dtype=torch.bool))
    assert int((layer.parametrizations.weight.original != 0).sum()) == 4
    apply_mask_(layer, "weight", torch.zeros(4, 4, dtype=torch.bool))
    assert int((layer.parametrizations.weight.original != 0).sum()) == 0


def test_a_mask_beside_a_parametrization_that_cannot_be_undone_is_applied_again():
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    apply_mask_(layer, "weight", torch.arange(16).view(4, 4) > 3)
    apply_mask_(layer, "weight", torch.arange(16).view(4, 4) < 12)
    assert (layer.weight == 0).all(1).tolist() == [True, False, False, True]


def test_a_second_mask_holds_besides_the_first():
    layer = nn.Linear(2, 3)
    for row in range(2):
        apply_mask_(layer, "weight", (torch.arange(3) != row)[:, None].expand(3, 2))
    layer.parametrizations.weight.original.data.fill_(1.0)
    assert layer.weight.tolist() == [[0, 0], [0, 0], [1, 1]] and "4 of 6 pruned" in repr(layer)


def test_averaged_weights_keep_the_zeros():
    model = prune_(small_network(), l2_filters, 0.5)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(3):
        for p in model.parameters():
            p.data.add_(torch.randn_like(p))
        averaged.update_parameters(model)
    assert torch.equal(averaged.module[0].weight == 0, model[0].weight == 0)
    assert zero_fraction(averaged.module[0]) == 0.5


def test_stripping_bakes_the_zeros_in():
    model = prune_(small_network(), l2_filters, 0.5)
    model[0].parametrizations.weight.original.data.add_(1.0)  # as momentum may move it
    x = torch.randn(2, 3, 8, 8)
    before, names = model.eval()(x), set(small_network().state_dict())
    assert strip_masks_(model) is model
    assert not any(parametrize.is_parametrized(m) for m in model.modules())
    assert set(model.state_dict()) == names
    assert torch.equal(model(x), before) and zero_fraction(model[0]) == 0.5
    assert isinstance(model[0].weight, nn.Parameter) and type(model[0]) is nn.Conv2d


def test_stripping_leaves_other_parametrizations():
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    apply_mask_(layer, "weight", torch.eye(4, dtype=torch.bool))
    strip_masks_(layer)
    assert isinstance(mask_of(layer), Mask) and len(layer.parametrizations.weight) == 2


def test_zero_fraction_counts_over_all_chosen_layers():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 12))
    model[0].weight.data.zero_()
    assert zero_fraction(model) == 16 / 64 and zero_fraction(model, only="1") == 0
    with pytest.raises(ValueError, match="no linear or convolution layer"):
        zero_fraction(model, only=nn.Conv2d)


def test_masks_taken_off_a_copy_stay_on_the_original():
    model = prune_(small_network(), l1, 0.5)
    strip_masks_(copy.deepcopy(model))
    assert model(torch.rand(1, 3, 8, 8)).shape == (1, 4) and mask_of(model[0]) is not None
