"""Training: what the recipe says is done, and nothing else."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pruning_utils import l1, prune_, zero_fraction
from quantization_utils.bit_layers import BitConv2d, BitLinear
from tests.networks import make
from tests.trainings import CPU, PLAIN, RECIPES, dataset, linear, model, same
from train_test_utils import train as train_module
from train_test_utils.data import augment, epoch_order, to_float
from train_test_utils.recipe import Recipe, sgd
from train_test_utils.train import Setup, train


def test_images_are_altered_as_the_recipe_and_the_data_set_say(monkeypatch):
    seen = []

    def spy(images, augment=train_module.augment, **how):
        seen.append(how)
        return augment(images, **how)

    monkeypatch.setattr(train_module, "augment", spy)
    recipe = Recipe(epochs=1, lr=0.01, batch_size=80, crop_padding=2, cutout=5)
    for flip, budget in ((True, 1.0), (False, 0.2)):
        train(linear(), replace(dataset(), flip=flip), recipe, Setup(CPU), budget=budget)
    assert seen == [
        {"crop_padding": 2, "cutout": 5, "flip": True}, {"crop_padding": 2, "cutout": 2, "flip": False},
    ]  # fmt: skip


@pytest.mark.parametrize("precision", [torch.float32, torch.float16])
def test_gradients_are_clipped_to_the_recipes_norm(precision):
    """Those that the optimizer sees: with a loss that is scaled, after that is undone."""
    norms = []

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            norms.append(float(torch.cat([p.grad.flatten() for g in self.param_groups for p in g["params"]]).norm()))
            return super().step(closure)

    recipe = Recipe(epochs=1, lr=0.01, batch_size=16, clip_norm=0.1, optimizer=lambda groups, lr: Spy(groups, lr=lr))
    train(linear(), dataset(), recipe, Setup(CPU, precision))
    assert norms == pytest.approx([0.1] * len(norms), rel=1e-3) and norms


def test_seeds_differ_and_nothing_else_does():
    data = dataset()
    one = train(model(), data, PLAIN, Setup(CPU), seed=1, budget=0.3)
    torch.manual_seed(123)
    assert same(one, train(model(), data, PLAIN, Setup(CPU), seed=1, budget=0.3))
    assert not same(one, train(model(), data, PLAIN, Setup(CPU), seed=2, budget=0.3))


def test_the_test_split_is_not_read():
    one = train(model(), dataset(1), PLAIN, Setup(CPU), budget=0.3)
    assert same(one, train(model(), dataset(2), PLAIN, Setup(CPU), budget=0.3))


def test_it_learns_and_tells_how():
    records: list[dict] = []
    recipe = Recipe(epochs=12, lr=0.05, batch_size=16)
    trained = train(make("alexnet_like"), dataset(), recipe, Setup(CPU), on_epoch=records.append)
    assert [r["epoch"] for r in records] == list(range(1, 13)) and [r["step"] for r in records] == list(range(5, 65, 5))
    assert records[-1]["train_loss"] < 0.5 * records[0]["train_loss"]
    assert records[-1]["train_accuracy_pct"] > 80 and not trained.training


def test_pruned_weights_stay_zero_through_momentum_and_decay():
    pruned = prune_(make("alexnet_like"), l1, 0.5)
    before = zero_fraction(pruned)
    assert zero_fraction(train(pruned, dataset(), RECIPES["everything"], Setup(CPU))) == before > 0.49


def test_learning_rates_and_ramp_follow_the_recipe(monkeypatch):
    rates, parts = [], []

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            rates.append([g["lr"] / g["lr_factor"] for g in self.param_groups])
            parts.append({m.quantized_part for m in trained.modules() if isinstance(m, (BitLinear, BitConv2d))})
            return super().step(closure)

    trained = model()
    recipe = Recipe(epochs=2, lr=0.1, batch_size=16, ramp=0.5, optimizer=lambda groups, lr: Spy(groups, lr=lr))
    train(trained, dataset(), recipe, Setup(CPU))
    assert len(rates) == 10 and all(max(r) == pytest.approx(min(r)) for r in rates)
    assert [r[0] for r in rates] == pytest.approx([recipe.lr_at(i, 10) for i in range(10)])
    assert parts == [{recipe.quantized_part_at(i, 10)} for i in range(10)] and parts[-1] == {1.0}


def test_averaged_weights_are_the_result():
    """With a decay of almost one they have hardly left where they began."""
    start = make("alexnet_like")
    first = [p.detach().clone() for p in start.parameters()]
    recipe = Recipe(epochs=2, lr=0.05, batch_size=16, ema=0.9999)
    train(start, dataset(), recipe, Setup(CPU))
    plain = train(make("alexnet_like"), dataset(), Recipe(epochs=2, lr=0.05, batch_size=16), Setup(CPU))
    moved = sum(float((p.detach() - f).abs().sum()) for p, f in zip(start.parameters(), first, strict=True))
    moved_plainly = sum(float((p.detach() - f).abs().sum()) for p, f in zip(plain.parameters(), first, strict=True))
    assert moved < 0.2 * moved_plainly


def test_distillation_by_its_formula():
    logits, teacher, labels = torch.randn(6, 4), torch.randn(6, 4), torch.arange(6) % 4
    recipe = Recipe(epochs=1, lr=1, distill=0.3, temperature=2.0, label_smoothing=0.1)
    soft, p = F.softmax(teacher / 2, 1), F.softmax(logits / 2, 1)
    divergence = (soft * (soft / p).log()).sum(1).mean()
    hard = F.cross_entropy(logits, labels, label_smoothing=0.1)
    expected = 0.7 * hard + 0.3 * 4 * divergence
    torch.testing.assert_close(train_module._loss(logits, labels, teacher, recipe), expected)
    torch.testing.assert_close(train_module._loss(logits, labels, None, recipe), hard)


def test_the_teacher_gets_no_gradients():
    teacher = linear()
    train(linear(), dataset(), Recipe(epochs=1, lr=0.01, batch_size=80, distill=0.5), Setup(CPU), teacher=teacher)
    assert all(p.grad is None for p in teacher.parameters())


def test_every_row_of_a_long_table_is_compiled(monkeypatch):
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    recipe = Recipe(epochs=1, lr=0.01, batch_size=80)
    for layers in range(10):
        net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 4), *(nn.Linear(4, 4) for _ in range(layers)))
        train(net, dataset(), recipe, Setup(CPU, compile=True))
    assert len(compiled) == 10


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_cuda_graph_does_what_its_steps_do(monkeypatch, recipe, precision):
    """The same learning rates, random numbers, ramp and figures: 15 steps, of which each graph repeats some."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    device = torch.device("cuda")

    def trained() -> tuple[nn.Module, list[dict]]:
        curve: list[dict] = []
        net = train(model(), dataset().to(device), RECIPES[recipe], Setup(device, precision), on_epoch=curve.append)
        return net, [{k: v for k, v in record.items() if k != "train_seconds"} for record in curve]

    net, curve = trained()
    monkeypatch.setattr(train_module.Replayed, "__call__", lambda self, variant: self.function())
    stepped, expected = trained()
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, stepped.state_dict()[name], msg=lambda text, name=name: f"{name}: {text}")
    assert [record.keys() for record in curve] == [record.keys() for record in expected]
    for record, other in zip(curve, expected, strict=True):
        assert record == pytest.approx(other, rel=1e-4)
    assert not same(net, model().to(device))


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_mixed_precision_trains(precision):
    """Products in the lower precision, weights in the higher."""
    recipe = Recipe(epochs=1, lr=0.01, batch_size=16, optimizer=sgd)
    seen = set()
    net = model()
    linear_layer = next(m for m in net.modules() if isinstance(m, nn.Linear))
    linear_layer.register_forward_hook(lambda module, args, output: seen.add((module.training, output.dtype)))
    whole = train(net, dataset(), recipe, Setup(CPU, precision))
    assert (True, precision) in seen and (True, torch.float32) not in seen
    assert all(t.isfinite().all() and t.dtype != precision for t in whole.state_dict().values())
    assert not same(whole, model())


def test_a_first_step_that_loss_scaling_skips_leaves_no_trace():
    """Its gradients overflow in half precision: momentum begins at the next one, from zeros."""
    optimizers = []

    def spied(groups, lr):
        optimizers.append(sgd(groups, lr))
        return optimizers[-1]

    class Loud(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3072, 4)

        def forward(self, x):
            return self.layer(x.flatten(1)) * 3000

    torch.manual_seed(0)
    net = Loud()
    before = net.layer.weight.detach().clone()
    for _ in range(4):  # memory that is given back is used again, with what was in it
        torch.full((4, 3072), 1e30)
    recipe = Recipe(epochs=1, lr=0.01, batch_size=16, optimizer=spied)
    trained = train(net, dataset(), recipe, Setup(CPU, torch.float16), budget=0.2)
    (momentum,) = (s["momentum_buffer"] for p, s in optimizers[0].state.items() if p is trained.layer.weight)
    assert torch.equal(trained.layer.weight, before) and not momentum.any()


@pytest.mark.parametrize("ema", [None, 0.5])
def test_statistics_of_batch_norm_are_those_of_altered_images_under_the_last_weights(ema):
    """Against the moments of what the layer reads, taken here; averages over the steps are elsewhere."""
    data = dataset()

    def small() -> nn.Module:
        torch.manual_seed(6)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 30 * 30, 4))

    recipe = Recipe(epochs=1, lr=1e-3, batch_size=16, ema=ema, cutout=40)
    plain = train(small(), data, recipe, Setup(CPU), seed=3, budget=0.25)
    trained = train(small(), data, replace(recipe, statistics_images=32), Setup(CPU), seed=3, budget=0.25)
    torch.manual_seed(3)
    batches = data.train.images[epoch_order(80, 3, 0)[:32]].split(16)
    altered = torch.cat([augment(batch, crop_padding=4, flip=data.flip, cutout=20) for batch in batches])
    seen = trained[0](to_float(altered)).transpose(0, 1).reshape(4, 2, -1)
    torch.testing.assert_close(trained[1].running_mean, seen.mean((1, 2)))
    torch.testing.assert_close(trained[1].running_var, seen.var(2).mean(1))
    assert torch.equal(trained[0].weight, plain[0].weight)
    assert (plain[1].running_var - trained[1].running_var).abs().max() > 0.1


def test_a_ramp_that_has_not_come_to_its_end_ends_with_the_training():
    trained = train(model(), dataset(), Recipe(epochs=1, lr=0.01, batch_size=16, ramp=1.0), Setup(CPU))
    assert all(m.quantized_part == 1.0 for m in trained.modules() if isinstance(m, (BitLinear, BitConv2d)))


def test_distillation_without_a_teacher_is_told():
    with pytest.raises(ValueError, match="distils from a teacher, and there is none"):
        train(model(), dataset(), Recipe(epochs=1, lr=0.01, distill=0.5), Setup(CPU))


def test_statistics_of_one_image_more_than_whole_batches():
    """One image alone has no variance: it is left out."""
    recipes = [Recipe(epochs=1, lr=0.01, batch_size=16, statistics_images=count) for count in (32, 33)]
    assert same(*(train(model(), dataset(), recipe, Setup(CPU)) for recipe in recipes))


def test_each_seed_and_each_step_draws_its_own_numbers(monkeypatch):
    drawn = []
    monkeypatch.setattr(train_module, "augment", lambda images, **how: drawn.append(torch.initial_seed()) or images)
    for seed in (1, 2, 1):
        train(linear(), dataset(), replace(PLAIN, epochs=1), Setup(CPU), seed=seed)
    assert drawn[:5] == drawn[10:] and len(set(drawn)) == 10


def test_every_epoch_has_an_order_of_its_own(monkeypatch):
    seen = []

    def noted(data, batch, recipe, budget):
        seen.extend(batch.tolist())
        return to_float(data.train.images[batch])

    monkeypatch.setattr(train_module, "_augmented", noted)
    train(linear(), dataset(), replace(PLAIN, epochs=2), Setup(CPU), seed=3)
    assert seen == [i for epoch in (0, 1) for i in epoch_order(80, 3, epoch).tolist()]


def test_the_teacher_stays_as_it_is():
    teacher = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(1800, 4))
    before = copy.deepcopy(teacher.state_dict())
    train(linear(), dataset(), replace(PLAIN, epochs=1, distill=0.5), Setup(CPU), teacher=teacher)
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())


def test_statistics_are_averaged_with_the_weights():
    first, recipe = make("alexnet_like"), replace(PLAIN, epochs=2)
    nets = [train(copy.deepcopy(first), dataset(), replace(recipe, ema=ema), Setup(CPU)) for ema in (0.9999, None)]
    slow, fast = ((net[2].running_mean - first[2].running_mean).abs().sum() for net in nets)
    assert slow < 0.5 * fast


def test_fewer_images_than_a_batch_are_one_batch():
    records = []
    recipe = Recipe(epochs=2, lr=0.01, batch_size=128)
    train(linear(), dataset(), recipe, Setup(CPU), on_epoch=records.append)
    assert [record["step"] for record in records] == [1, 2]


def test_the_learning_rate_that_is_told_is_that_of_the_epochs_last_step():
    records = []
    train(linear(), dataset(), replace(PLAIN, epochs=2), Setup(CPU), on_epoch=records.append)
    assert [record["lr"] for record in records] == [PLAIN.lr_at(step, 10) for step in (4, 9)]


def test_the_last_part_of_an_epoch_is_told_too():
    records = []
    train(linear(), dataset(), replace(PLAIN, epochs=1.4), Setup(CPU), on_epoch=records.append)
    assert [(record["epoch"], record["step"]) for record in records] == [(1, 5), (2, 7)]
