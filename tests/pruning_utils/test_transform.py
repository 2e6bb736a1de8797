import copy
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune
from torch.nn.utils.parametrizations import weight_norm

from models import build
from pruning_utils import l1, l1_global, l2, l2_filters, prune_, random, zero_fraction
from pruning_utils.scores import scoring
from pruning_utils.structured import batch_norms_behind
from quantization_utils import absmean, absmean_fitted, mse_optimal, quantize_


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 10, 3), nn.ReLU(), nn.Conv2d(10, 7, 3), nn.ReLU(), nn.Flatten(), nn.Linear(28, 5))


def layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]


def zeros(model: nn.Module) -> list[int]:
    return [int((m.weight == 0).sum()) for m in layers(model)]


@settings(max_examples=100, deadline=None)
@given(st.floats(0, 0.999), st.sampled_from([l1, l2, random]), st.integers(0, 3))
def test_exactly_k_zeros_a_layer_under_ties(amount, score, magnitudes):
    model = nn.Sequential(nn.Linear(9, 11), nn.Linear(11, 3))
    for layer in model:
        layer.weight.data = torch.randint(1, magnitudes + 2, layer.weight.shape) * torch.randn(1).sign()
    prune_(model, score, amount)
    assert zeros(model) == [round(amount * 99), round(amount * 33)]


@pytest.mark.parametrize("amount", [0.0, 0.3, 0.5, 0.9])
def test_l1_is_torch_l1_unstructured(amount):
    ours, theirs = network(), network()
    prune_(ours, l1, amount)
    for mine, other in zip(layers(ours), layers(theirs), strict=True):
        torch_prune.l1_unstructured(other, "weight", amount)
        assert torch.equal(mine.weight, other.weight)


@pytest.mark.parametrize("amount", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("score, power", [(l2_filters, 2), (l2, 2), (l1, 1)])
def test_filters_are_torch_ln_structured(amount, score, power):
    ours, theirs = network(), network()
    prune_(ours, score, amount, granularity="filter")
    for mine, other in zip(layers(ours)[:-1], layers(theirs)[:-1], strict=True):
        torch_prune.ln_structured(other, "weight", amount, n=power, dim=0)
        assert torch.equal(mine.weight, other.weight)
    assert zeros(ours)[-1] == 0


@pytest.mark.parametrize("amount", [0.3, 0.7])
def test_global_is_torch_global_unstructured(amount):
    ours, theirs = network(), network()
    prune_(ours, l1_global, amount)
    tensors = [(m, "weight") for m in layers(theirs)]
    torch_prune.global_unstructured(tensors, torch_prune.L1Unstructured, amount=amount)
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(layers(ours), layers(theirs), strict=True))
    assert len({z / m.weight.numel() for z, m in zip(zeros(ours), layers(ours), strict=True)}) == 3


def test_global_counts_over_the_layers_chosen_only():
    model = prune_(network(), l1, 0.4, scope="global", only=nn.Conv2d)
    assert sum(zeros(model)) == round(0.4 * (270 + 630)) and zeros(model)[-1] == 0


def test_filters_of_all_layers_are_compared_by_the_sums_of_their_importances():
    sums = torch.cat([m.weight.detach().abs().flatten(1).sum(1) for m in layers(network())[:-1]])
    model = prune_(network(), l1, 0.4, granularity="filter", scope="global")
    gone = torch.cat([(m.weight == 0).flatten(1).all(1) for m in layers(model)[:-1]])
    assert gone.sum() == round(0.4 * 17) and sums[gone].max() < sums[~gone].min()


@pytest.mark.parametrize("granularity", ["weight", "filter"])
def test_random_is_reproducible_and_its_seeds_and_layers_differ(granularity):
    def masks(seed):
        model = nn.Sequential(*[nn.Linear(20, 20) for _ in range(3)])
        prune_(model, random, 0.5, granularity, seed=seed)
        return [m.weight == 0 for m in model][:2]

    (a, b), (a_again, b_again), (c, _) = masks(0), masks(0), masks(1)
    assert torch.equal(a, a_again) and torch.equal(b, b_again)
    assert not torch.equal(a, b) and not torch.equal(a, c)


def test_random_does_not_touch_the_global_random_state():
    torch.manual_seed(3)
    expected = torch.rand(1)
    model = network()
    torch.manual_seed(3)
    prune_(model, random, 0.5)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("score", [l1, random, l1_global])
def test_pruning_again_counts_what_is_pruned(score):
    model = prune_(network(), score, 0.3, seed=1)
    first = [m.weight == 0 for m in layers(model)]
    prune_(model, score, 0.5, seed=2)
    second = [m.weight == 0 for m in layers(model)]
    assert sum(zeros(model)) == sum(round(0.5 * m.numel()) for m in second)
    assert all((a & ~b).sum() == 0 for a, b in zip(first, second, strict=True))
    prune_(model, score, 0.2, seed=3)
    assert all(torch.equal(m.weight == 0, b) for m, b in zip(layers(model), second, strict=True))


@pytest.mark.parametrize(
    "only, touched",
    [
        (None, [True, True, True]),
        (nn.Conv2d, [True, True, False]),
        (nn.Linear, [False, False, True]),
        ((nn.Linear, "0"), [True, False, True]),
        ("[02]", [True, True, False]),
    ],
)
def test_only(only, touched):
    assert [z > 0 for z in zeros(prune_(network(), l1, 0.5, only=only))] == touched


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_layer_keeps_a_filter_and_the_classifier_all(scope):
    model = network()
    layers(model)[0].weight.data *= 1e-6
    prune_(model, l2_filters, 0.99, scope=scope)
    left = [int((m.weight != 0).flatten(1).any(1).sum()) for m in layers(model)]
    assert left == [1, 1, 5]


def test_filter_pruning_zeroes_the_channel_behind_the_batch_norm():
    model = build("resnet_18", 10, stem="maxpool")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
    seen: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda m, i, o, name=name: seen.__setitem__(name, o.detach()))
    prune_(model, l2_filters, 0.5, only=nn.Conv2d)
    for mode in (True, False):
        model.train(mode)(torch.rand(2, 3, 32, 32))
        assert len(seen) == 20
        for name, out in seen.items():
            dead = (out == 0).transpose(0, 1).flatten(1).all(1)
            assert int(dead.sum()) == out.shape[1] // 2, name
    assert zero_fraction(model, only=nn.Linear) == 0


def test_a_filter_with_some_weights_left_is_not_gone():
    model = prune_(prune_(network(), l1, 0.5), l2_filters, 0.3)
    assert int((model[0].weight == 0).flatten(1).all(1).sum()) == 3


def test_batch_norms_behind_a_layer_are_those_with_weights_also_behind_what_passes_all_on():
    plain, affine = nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4)
    layers = [nn.Conv2d(3, 4, 1), plain, nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Identity(), nn.Dropout2d(), affine]
    assert batch_norms_behind(nn.Sequential(*layers)) == {"0": [], "3": [affine]}


def test_a_layer_that_runs_twice_has_the_batch_norms_behind_both():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu = nn.Conv2d(4, 4, 1), nn.ReLU()
            self.first, self.last = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.last(self.conv(self.relu(self.first(self.conv(x)))))

    model = Twice()
    assert batch_norms_behind(model) == {"conv": [model.first, model.last]}


def test_a_batch_norm_of_tokens_is_not_of_the_filters_before_it():
    model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(6, 2))
    prune_(model, l2_filters, 0.5)
    assert int((model[0].weight == 0).all(1).sum()) == 3 and not hasattr(model[1], "parametrizations")


def test_filter_pruning_without_batch_norm_masks_the_bias():
    model = prune_(build("alexnet", 10, batch_norm=False), l2_filters, 0.5, only=nn.Conv2d)
    for module in model:
        if isinstance(module, nn.Conv2d):
            module.parametrizations.bias.original.data.fill_(1.0)
            assert int((module.bias == 0).sum()) == module.out_channels // 2


def test_filter_pruning_of_a_transformer():
    model = build("vit", 10, width=64, depth=1)
    prune_(model, l2_filters, 0.5)
    assert zero_fraction(model, only="*classifier") == 0
    assert zero_fraction(model, only="*layer*") == 0.5
    assert model(torch.rand(1, 3, 32, 32)).isfinite().all()


@pytest.mark.parametrize("quantizer", [absmean, absmean_fitted, mse_optimal], ids=lambda q: q.__name__)
@pytest.mark.parametrize("order", ["prune first", "quantize first"])
def test_pruning_and_quantizing_in_either_order_gives_zero_codes(quantizer, order):
    model = network()
    steps = [lambda: prune_(model, l1, 0.7), lambda: quantize_(model, quantizer, act_bits=None)]
    for step in steps if order == "prune first" else reversed(steps):
        step()
    for layer in layers(model):
        codes, scale = layer.quantized_weight()
        masked = layer.weight == 0
        assert int(masked.sum()) == round(0.7 * masked.numel())
        assert (codes[masked] == 0).all() and (scale > 0).all()


@pytest.mark.parametrize("amount", [0.1, 0.3])
def test_pruning_zero_codes_changes_nothing_with_mse_optimal(amount):
    torch.manual_seed(0)
    model = quantize_(nn.Sequential(nn.Linear(200, 50), nn.ReLU(), nn.Linear(50, 10)), mse_optimal, act_bits=None)
    before = [m.quantized_weight() for m in layers(model)]
    assert all((codes == 0).float().mean() > amount for codes, _ in before)
    prune_(model, l1, amount)
    for (codes, scale), layer in zip(before, layers(model), strict=True):
        assert int((layer.weight == 0).sum()) == round(amount * layer.weight.numel())
        assert torch.equal(codes, layer.quantized_weight()[0]) and torch.equal(scale, layer.quantized_weight()[1])


def test_zero_codes_go_in_the_order_of_the_float_weights_behind_them():
    torch.manual_seed(0)
    layer = quantize_(nn.Sequential(nn.Linear(200, 50)), mse_optimal, act_bits=None)[0]
    zero_codes = layer.weight.detach().abs()[layer.quantized_weight()[0] == 0]
    pruned_largest = zero_codes.sort().values[999]
    expected = (layer.weight.abs() <= pruned_largest) & (layer.quantized_weight()[0] == 0)
    prune_(layer, l1, 1000 / layer.weight.numel())
    assert torch.equal(layer.weight == 0, expected)


def test_random_pruning_of_ternary_layers_takes_any_code():
    model = quantize_(nn.Sequential(nn.Linear(100, 100)), mse_optimal, act_bits=None)
    codes = model[0].quantized_weight()[0]
    prune_(model, random, 0.5)
    taken = codes[model[0].weight == 0]
    assert 0.4 < (taken == 0).float().mean() / (codes == 0).float().mean() < 1.6


def test_prune_deepcopy_quantize_and_train_keeps_the_zeros():
    model = quantize_(copy.deepcopy(prune_(network(), l2_filters, 0.5)), absmean_fitted, act_bits=8)
    before = [m.quantized_weight()[0] == 0 for m in layers(model)]
    masked = [m.weight == 0 for m in layers(model)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.rand(8, 3, 6, 6)).square().sum().backward()
        optimizer.step()
    for layer, mask in zip(layers(model), masked, strict=True):
        assert torch.equal(layer.weight == 0, mask)
        assert (layer.quantized_weight()[0][mask] == 0).all()
    assert any(not torch.equal(m.quantized_weight()[0] == 0, b) for m, b in zip(layers(model), before, strict=True))


def test_filters_of_equal_scores_go_by_their_magnitude():
    model = network()
    magnitude_N = model[0].weight.abs().sum((1, 2, 3))
    prune_(model, scoring(granularity="filter")(lambda w: torch.ones(len(w))), 0.3, only="0")
    gone_N = (model[0].weight == 0).flatten(1).all(1)
    assert gone_N.sum() == 3 and magnitude_N[gone_N].max() < magnitude_N[~gone_N][1:].min()  # the first stays


def test_own_scores():
    by_position = prune_(network(), lambda w: torch.arange(w.numel()).view_as(w), 0.5)
    assert all((m.weight.flatten()[: m.weight.numel() // 2] == 0).all() for m in layers(by_position))
    with_numpy = prune_(network(), lambda w: torch.from_numpy(abs(w.numpy())), 0.5)
    assert all(map(torch.equal, with_numpy.parameters(), prune_(network(), l1, 0.5).parameters()))
    with pytest.raises(ValueError, match="has shape"):
        prune_(network(), lambda w: w.sum(), 0.5)
    with pytest.raises(ValueError, match="is a list: it should be a tensor"):
        prune_(network(), lambda w: w.tolist(), 0.5)
    with pytest.raises(ValueError, match=r"or be marked as one of filters: @scoring\(granularity='filter'\)"):
        prune_(network(), lambda w: w.flatten(1).abs().amax(1), 0.5)


@pytest.mark.parametrize("amount", [-0.1, 1, 1.0, 30, float("nan"), "0.3", None, True])
def test_amounts_that_are_no_fractions(amount):
    with pytest.raises(ValueError, match="fraction in"):
        prune_(network(), l1, amount)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"score": "l1"}, "a score is a function"),
        ({"granularity": "row"}, "unknown granularity"),
        ({"scope": "model"}, "unknown scope"),
        ({"score": l2_filters, "granularity": "weight"}, "scores filters"),
        ({"only": nn.LSTM}, "nothing to prune"),
        ({"score": l2_filters, "only": nn.Linear}, "classifier"),
    ],
)
def test_mistakes_are_told_and_change_nothing(arguments, message):
    model = network()
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        prune_(model, **({"score": l1, "amount": 0.5} | arguments))
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("score", [l1, random, lambda weight: weight.nan_to_num()])
def test_a_diverged_model_is_refused(score):
    model = network()
    model[0].weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        prune_(model, score, 0.5)


@pytest.mark.parametrize(
    "compute, undo",
    [
        (partial(torch_prune.l1_unstructured, name="weight", amount=0.5), torch_prune.remove),
        (weight_norm, parametrize.remove_parametrizations),
    ],
)
def test_a_weight_that_is_no_parameter_is_told_before_any_layer_is_masked(compute, undo):
    model = network()
    compute(model[2])
    with pytest.raises(ValueError, match="2 computes its weight anew .*: make it a parameter first"):
        prune_(model, l1, 0.5)
    assert not hasattr(model[0], "parametrizations")
    undo(model[2], "weight")
    assert zeros(prune_(model, l1, 0.5))[0] == 135


@pytest.mark.parametrize("masked_before", [False, True])
def test_a_weight_of_two_layers_is_no_one_layers_to_prune(masked_before):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight = model[0].weight
    if masked_before:
        parametrize.register_parametrization(model[1], "weight", nn.Identity())
    with pytest.raises(ValueError, match="0 shares its weight with another layer"):
        prune_(model, l1, 0.5, only="0")
    prune_(model, l1, 0.5, only="2")
    model = nn.Sequential(model[2], nn.ReLU(), model[2])  # one layer in two places
    assert zeros(prune_(model, l1, 0.75))[0] == 6


def test_prune_returns_the_model_itself():
    model = network()
    assert prune_(model, l1, 0.5) is model


def test_the_classifier_is_the_layer_that_runs_last():
    class Upside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.relu, self.conv = nn.Linear(36, 5), nn.ReLU(), nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.fc(self.relu(self.conv(x)).flatten(1))

    model = prune_(Upside(), l2_filters, 0.5)
    assert zeros(model) == [0, 2 * 27]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_importances_that_are_not_finite_are_refused(value):
    def score(weight):
        importance = weight.abs()
        importance.view(-1)[0] = value
        return importance

    with pytest.raises(ValueError, match="weights or importances that are not finite"):
        prune_(nn.Sequential(nn.Linear(9, 9)), score, 0.5)


def test_a_score_of_ones_own_gets_random_numbers_of_the_seed():
    @scoring(seeded=True)
    def own(weight, generator):
        return torch.rand(weight.shape, generator=generator)

    one, again, other = (
        prune_(nn.Sequential(nn.Linear(9, 9)), own, 0.5, seed=seed)[0].parametrizations.weight[0].mask
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, again) and not torch.equal(one, other)
