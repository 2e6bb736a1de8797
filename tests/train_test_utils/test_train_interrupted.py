"""Trainings that are broken off: continued ones end in the same bits, and divergence is told."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.trainings import CPU, PLAIN, RECIPES, dataset, linear, model, same
from train_test_utils import train as train_module
from train_test_utils.train import NonFiniteLoss, Setup, train


class Stop(Exception):
    pass


@cache
def whole_run(name: str) -> tuple[nn.Module, list[dict]]:
    records: list[dict] = []
    return train(model(), dataset(), RECIPES[name], Setup(CPU), seed=3, on_epoch=records.append), records


@pytest.mark.parametrize("saves", [1, 7, 15])
@pytest.mark.parametrize("name", RECIPES)
def test_an_interrupted_run_ends_in_the_same_bits(name, saves, tmp_path, monkeypatch):
    """Fifteen steps, broken off after some of them, in the middle of an epoch too, and continued in a new model."""
    (whole, records), recipe = whole_run(name), RECIPES[name]
    data, path = dataset(), tmp_path / "last.pt"
    done = 0

    def save_and_stop(state, path, save=train_module.save_state):
        nonlocal done
        save(state, path)
        done += 1
        if done == saves:
            raise Stop

    monkeypatch.setattr(train_module, "LOOK_EVERY", 1)  # and with it a state after every step
    monkeypatch.setattr(train_module, "save_state", save_and_stop)
    begun: list[dict] = []
    with pytest.raises(Stop):
        train(model(), data, recipe, Setup(CPU, checkpoint_seconds=-1), seed=3, state_path=path, on_epoch=begun.append)
    torch.manual_seed(99)  # another process has drawn other numbers
    continued = train(model(), data, recipe, Setup(CPU), seed=3, state_path=path, on_epoch=begun.append)
    assert same(whole, continued)
    assert not same(whole, model())
    without_time = [[{k: v for k, v in r.items() if k != "train_seconds"} for r in rs] for rs in (records, begun)]
    assert without_time[0] == without_time[1]


def test_a_run_broken_off_between_epochs(tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "LOOK_EVERY", 1)
    data, path = dataset(), tmp_path / "last.pt"
    whole = train(model(), data, PLAIN, Setup(CPU))

    def stop(record):
        if record["epoch"] == 2:
            raise Stop

    with pytest.raises(Stop):
        train(model(), data, PLAIN, Setup(CPU, checkpoint_seconds=-1), state_path=path, on_epoch=stop)
    assert torch.load(path)["step"] == 9
    assert same(whole, train(model(), data, PLAIN, Setup(CPU), state_path=path))


def test_the_seconds_before_an_interruption_count(tmp_path, monkeypatch):
    """On a clock that moves by one at every step."""
    calls, seconds, path = [], [], tmp_path / "last.pt"
    monkeypatch.setattr(train_module, "LOOK_EVERY", 1)
    monkeypatch.setattr(train_module, "time", SimpleNamespace(monotonic=lambda: len(calls)))

    def on_epoch(record):
        seconds.append(record["train_seconds"])
        if len(seconds) == 2:
            raise Stop

    for _ in range(2):
        net = linear()
        net.register_forward_hook(lambda *_: calls.append(None))
        with suppress(Stop):  # at the end of the second epoch, whose last step is done again
            train(net, dataset(), PLAIN, Setup(CPU, checkpoint_seconds=-1), state_path=path, on_epoch=on_epoch)
    assert seconds == [5, 10, 10, 15]


def test_the_scale_of_the_loss_comes_back(tmp_path, monkeypatch):
    def stop(record):
        raise Stop

    monkeypatch.setattr(train_module, "LOOK_EVERY", 1)
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=1.0, growth_interval=1))
    path, setup = tmp_path / "last.pt", Setup(CPU, torch.float16, checkpoint_seconds=-1)
    with pytest.raises(Stop):
        train(linear(), dataset(), PLAIN, setup, state_path=path, on_epoch=stop)
    train(linear(), dataset(), PLAIN, setup, state_path=path)
    assert torch.load(path)["scaler"]["scale"] == 2**15  # doubled in each of 15 steps


@pytest.mark.parametrize(("seconds", "saved"), [(1e9, False), (-1, True)])
def test_states_are_as_far_apart_as_the_setup_says(seconds, saved, tmp_path):
    train(linear(), dataset(), PLAIN, Setup(CPU, checkpoint_seconds=seconds), state_path=tmp_path / "last.pt")
    assert (tmp_path / "last.pt").exists() == saved


def test_the_seconds_between_two_states_are_counted_from_the_last_one(tmp_path, monkeypatch):
    """On a clock that moves by one at every step."""
    calls, saved = [], []
    monkeypatch.setattr(train_module, "LOOK_EVERY", 1)
    monkeypatch.setattr(train_module, "time", SimpleNamespace(monotonic=lambda: len(calls)))
    monkeypatch.setattr(train_module, "save_state", lambda state, path: saved.append(state["step"]))
    net = linear()
    net.register_forward_hook(lambda *_: calls.append(None))
    train(net, dataset(), PLAIN, Setup(CPU, checkpoint_seconds=4), state_path=tmp_path / "last.pt")
    assert saved == [5, 10, 15]


@pytest.mark.parametrize("state", [{"step": 3}, {"step": 3, "model": {}}, [1]])
def test_a_state_of_another_training_is_one_sentence(state, tmp_path):
    path = tmp_path / "last.pt"
    torch.save(state, path)
    with pytest.raises(ValueError, match=f"{path} is not the state of this training .*: delete it") as caught:
        train(model(), dataset(), PLAIN, Setup(CPU), state_path=path)
    assert "\n" not in str(caught.value)


class Bomb(nn.Module):
    """A classifier whose logits are not a number from a given step on."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.linear, self.left = nn.Linear(3, 4), step

    def forward(self, x):
        self.left -= 1
        return self.linear(x.mean((2, 3))) * (math.nan if self.left < 0 else 1.0)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "LOOK_EVERY", 1)
    path = tmp_path / "last.pt"
    with pytest.raises(NonFiniteLoss, match=f"not finite at step 3; the last good state is {path}"):
        train(Bomb(3), dataset(), PLAIN, Setup(CPU, checkpoint_seconds=-1), state_path=path)
    state = torch.load(path)
    assert state["step"] == 3 and state["model"]["linear.weight"].isfinite().all()


def test_weights_that_are_not_finite_take_no_good_states_place(tmp_path, monkeypatch):
    class Ruin(torch.optim.SGD):
        left = 3

        def step(self, closure=None):
            super().step(closure)
            self.left -= 1
            if self.left < 0:
                self.param_groups[0]["params"][0].data.fill_(math.inf)

    monkeypatch.setattr(train_module, "LOOK_EVERY", 1)
    path = tmp_path / "last.pt"
    recipe = replace(PLAIN, optimizer=lambda *args, **kwargs: Ruin(args[0], lr=0.1))
    with pytest.raises(NonFiniteLoss, match="step 4; the last good state"):  # its loss is the first of those weights
        train(Bomb(99), dataset(), recipe, Setup(CPU, checkpoint_seconds=-1), state_path=path)
    state = torch.load(path)
    assert state["step"] == 3 and all(tensor.isfinite().all() for tensor in state["model"].values())


@pytest.mark.parametrize("step", [0, 7])
def test_the_step_is_named_however_late_it_is_looked_at(step):
    with pytest.raises(NonFiniteLoss, match=f"at step {step}; nothing was saved yet"):
        train(Bomb(step), dataset(), PLAIN, Setup(CPU))


def test_weights_that_the_last_step_has_ruined_are_no_result():
    """Its loss was finite, and there is no other one behind it."""

    class Ruin(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            self.param_groups[0]["params"][0].data.fill_(math.inf)

    recipe = replace(PLAIN, epochs=1, batch_size=80, optimizer=lambda *args, **kwargs: Ruin(args[0], lr=0.1))
    with pytest.raises(NonFiniteLoss, match="a weight was not finite at the end; nothing was saved yet"):
        train(Bomb(99), dataset(), recipe, Setup(CPU))
