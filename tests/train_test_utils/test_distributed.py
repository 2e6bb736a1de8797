"""Two processes on one machine train one model: the same weights in both, and both stop when one diverges."""

from __future__ import annotations

import contextlib
import io
import math
import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing, nn

from train_test_utils import distributed
from train_test_utils import train as train_module
from train_test_utils.dataset import ImageDataset, Split
from train_test_utils.recipe import Recipe
from train_test_utils.train import NonFiniteLoss, Setup, train

CPU = torch.device("cpu")
RECIPE = Recipe(epochs=2, lr=0.05, batch_size=7)  # four images for one process, three for the other


class Net(nn.Module):
    """`left`: steps until this process's logits are not a number. `seen`: the brightness of each step's images."""

    def __init__(self, left: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(3600, 2))
        self.left, self.seen, self.seeds = left, [], []

    def forward(self, x):
        self.seen.append((255 * x[:, 0, 0, 0]).round().tolist())
        self.seeds.append(torch.initial_seed())
        self.left -= 1
        return self.layers(x) * (math.nan if self.left < 0 else 1.0)


def process(rank: int, folder: Path, steps: float) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    with distributed.first_alone():
        arrived = folder / "arrived"
        assert arrived.exists() == (rank > 0)
        arrived.touch()
    pixels = torch.arange(14, dtype=torch.uint8).view(14, 1, 1, 1).expand(14, 3, 32, 32)  # a brightness each
    data = ImageDataset("two", ("a", "b"), *[Split(pixels, torch.arange(14) % 2)] * 2)
    records, saved, losses = [], [], []
    loss_of = train_module._loss

    def loss(*arguments):
        losses.append(loss_of(*arguments))
        return losses[-1]

    train_module._loss, train_module.save_state = loss, lambda state, path: saved.append(state["step"])
    setup = Setup(CPU, checkpoint_seconds=-1)
    try:
        model = Net(steps if rank == 0 else math.inf)
        with contextlib.redirect_stderr(io.StringIO()) as said:
            train(model, data, RECIPE, setup, state_path=folder / "last.pt", on_epoch=records.append)
        outcome = {"weights": [p.detach() for p in model.parameters()], "records": records, "saved": saved,
                   "progress": "images/s" in said.getvalue()}  # fmt: skip
        outcome |= {"seen": model.seen, "seeds": model.seeds, "losses": [value.item() for value in losses]}
    except NonFiniteLoss as error:
        outcome = {"error": str(error)}
    torch.save(outcome, folder / f"{rank}.pt")
    distributed.stop()
    assert not dist.is_initialized()


def outcomes(folder: Path, steps: float) -> list[dict]:
    multiprocessing.spawn(process, (folder, steps), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return outcomes(tmp_path_factory.mktemp("trained"), math.inf)


def test_two_processes_train_one_model_and_tell_the_same(trained):
    one, two = trained
    assert all(torch.equal(a, b) for a, b in zip(one["weights"], two["weights"], strict=True))
    for record in (*one["records"], *two["records"]):
        del record["train_seconds"]
    assert one["records"] == two["records"] and [record["epoch"] for record in one["records"]] == [1, 2]
    losses = [sum(one["losses"][i : i + 2] + two["losses"][i : i + 2]) / 4 for i in (0, 2)]
    assert [record["train_loss"] for record in one["records"]] == pytest.approx(losses)


def test_each_image_of_an_epoch_is_seen_by_one_process_and_altered_by_numbers_of_its_own(trained):
    for epoch in (slice(0, 2), slice(2, 4)):
        seen = [image for outcome in trained for batch in outcome["seen"][epoch] for image in batch]
        assert sorted(seen) == list(range(14))
    assert len({seed for outcome in trained for seed in outcome["seeds"]}) == 8


def test_the_first_process_alone_saves_and_shows_progress(trained):
    assert [outcome["progress"] for outcome in trained] == [True, False]
    assert [bool(outcome["saved"]) for outcome in trained] == [True, False]


def test_both_stop_when_one_diverges_even_at_the_last_step(tmp_path):
    """Earlier, its gradients would tell the other one step later."""
    one, two = outcomes(tmp_path, 3)
    assert one == two and "not finite at step 3" in one["error"]


def failing(rank: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        with distributed.first_alone():
            raise ValueError("there is no such data set")
    except (ValueError, SystemExit) as error:
        (folder / f"{rank}").write_text(repr(error))
    distributed.stop()


def test_if_the_first_fails_alone_the_others_end_in_silence(tmp_path):
    multiprocessing.spawn(failing, (tmp_path,), nprocs=2)
    said = [(tmp_path / str(rank)).read_text() for rank in range(2)]
    assert said == ["ValueError('there is no such data set')", "SystemExit(2)"]


def test_alone_everything_does_nothing():
    with distributed.first_alone():
        assert torch.equal(distributed.summed(torch.ones(2)), torch.ones(2))
    assert distributed.rank() == 0 and distributed.world_size() == 1


def test_a_rank_alone_makes_no_second_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "1")
    assert distributed.rank() == 0 and distributed.launcher() == "python3"
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert distributed.rank() == 1 and distributed.launcher() == "torchrun --nproc_per_node=4"


def test_processes_join_a_group_of_their_kind_of_device(monkeypatch):
    joined, patience = [], []
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(
        dist, "init_process_group", lambda backend, timeout: patience.append(timeout) or joined.append(backend)
    )
    monkeypatch.setattr(torch.cuda, "set_device", joined.append)
    assert distributed.start(CPU) == CPU and not joined
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert distributed.start(CPU) == CPU and joined == ["gloo"]
    gpu = torch.device("cuda", 1)
    assert distributed.start(torch.device("cuda")) == gpu and joined == ["gloo", gpu, "nccl"]
    assert min(patience) > timedelta(hours=1), "the others wait while the first one packs and measures"


def test_processes_wait_for_each_other_where_there_are_several(monkeypatch):
    waited = []
    monkeypatch.setattr(dist, "barrier", lambda: waited.append(True))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    distributed.barrier()
    assert not waited
    monkeypatch.setenv("WORLD_SIZE", "2")
    distributed.barrier()
    assert waited
