"""Other work on the cores is noticed, told once, and never where there is none."""

from __future__ import annotations

import pytest
import torch

from tests.trainings import CPU, PLAIN, dataset, linear
from train_test_utils import crowding
from train_test_utils.crowding import Crowding
from train_test_utils.train import Setup, train


@pytest.fixture
def clocks(monkeypatch):
    """Two threads, and [seconds that have passed, seconds that this process has had on cores]: since a while ago."""
    now = [0.0, 0.0]
    monkeypatch.setattr(crowding.time, "monotonic", lambda: 100 + now[0])
    monkeypatch.setattr(crowding.time, "process_time", lambda: 50 + now[1])
    monkeypatch.setattr(Crowding, "told", False)
    torch.set_num_threads(2)
    return now


@pytest.mark.parametrize("used, cores", [(20.0, "1.0"), (8.0, "0.4")])
def test_threads_that_had_half_of_their_cores_or_less_are_told_how_many_to_be_and_once(clocks, used, cores):
    seen = Crowding()
    clocks[:] = [20.0, used]
    assert f"threads {cores} cores" in (news := seen.news() or "") and "OMP_NUM_THREADS=1 " in news
    assert seen.news() is None
    later = Crowding()
    clocks[:] = [40.0, used + 10.0]
    assert later.news() is None


@pytest.mark.parametrize("seconds, used, threads", [(20.0, 39.0, 2), (0.0, 0.0, 2), (5.0, 5.0, 2), (20.0, 10.0, 1)])
def test_nothing_is_said_when_alone_or_too_early_or_of_one_thread(clocks, seconds, used, threads):
    torch.set_num_threads(threads)
    seen = Crowding()
    clocks[:] = [seconds, used]
    assert seen.news() is None


def test_a_training_says_it(capsys, monkeypatch):
    monkeypatch.setattr(Crowding, "news", lambda self: "crowded")
    train(linear(), dataset(), PLAIN, Setup(CPU), budget=0.1)
    assert "crowded" in capsys.readouterr().err
