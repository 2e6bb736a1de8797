from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import save_model
from torch import nn

from pruning_utils import l1, prune_
from quantization_utils import calibrate_, quantize_
from tests.networks import KINDS, images, make
from train_test_utils.checkpoint import load_state, load_weights, save_state, save_weights

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_weights_masks_and_steps_come_back(kind, tmp_path):
    def model():
        return calibrate_(quantize_(prune_(make(kind), l1, 0.5)), images(8))

    saved, path = model(), tmp_path / "row" / "checkpoint.safetensors"
    save_weights(saved, path, "0123")
    other = model()
    assert any(not torch.equal(t, other.state_dict()[n]) for n, t in saved.state_dict().items())
    load_weights(other, path, "0123")
    assert all(torch.equal(t, other.state_dict()[n]) for n, t in saved.state_dict().items())
    batch = images(2)
    with torch.no_grad():
        assert torch.equal(saved(batch), other(batch))


def test_the_same_weights_are_the_same_bytes(tmp_path):
    model = make("alexnet_like").to(memory_format=torch.channels_last)
    save_weights(model, tmp_path / "a", "0123")
    save_weights(model, tmp_path / "b", "0123")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_layer_under_two_names_comes_back(tmp_path):
    layer, other = nn.Linear(2, 2), nn.Linear(2, 2)
    save_weights(nn.Sequential(layer, layer), tmp_path / "a", "0123")
    load_weights(nn.Sequential(other, other), tmp_path / "a", "0123")
    assert torch.equal(layer.weight, other.weight)


@pytest.mark.parametrize("save", [
    lambda width, path: save_weights(nn.Linear(width, 1), path, "0123"),
    lambda width, path: save_state({"weight": torch.ones(width)}, path),
])  # fmt: skip
def test_who_reads_a_file_while_it_is_written_anew_reads_the_old_one(save, tmp_path):
    path = tmp_path / "file"
    save(3, path)
    before = path.read_bytes()
    with open(path, "rb") as reader:
        save(4, path)
        assert reader.read() == before != path.read_bytes()


def damaged(path, how):
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "text": b"not a checkpoint"}[how])


@pytest.mark.parametrize("how", ["cut", "empty", "text"])
def test_damage_is_one_sentence_that_says_what_to_do(how, tmp_path):
    weights, state = tmp_path / "checkpoint.safetensors", tmp_path / "last.pt"
    save_weights(make("alexnet_like"), weights, "0123")
    save_state({"step": 3, "model": make("alexnet_like").state_dict()}, state)
    damaged(weights, how), damaged(state, how)
    with pytest.raises(ValueError, match=r"checkpoint.safetensors is not a checkpoint of this model .*: delete it"):
        load_weights(make("alexnet_like"), weights)
    with pytest.raises(ValueError, match=r"last.pt cannot be read .*: delete it to start the row anew") as raised:
        load_state(state, CPU)
    assert "weights_only" not in str(raised.value), "nobody is advised to load what may run a program"


def test_one_bit_of_a_weight_is_noticed(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    save_weights(make("alexnet_like"), path, "0123")
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="SHA-256: the file is damaged.*delete it to train the row again"):
        load_weights(make("alexnet_like"), path)


def test_a_checkpoint_of_another_model(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    save_weights(make("alexnet_like"), path, "0123")
    with pytest.raises(ValueError, match=r"not a checkpoint of this model \(\S+ is in one of the two only\)") as caught:
        load_weights(make("resnet_like"), path)
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError):
        load_weights(make("alexnet_like"), tmp_path / "nothing")


def test_a_checkpoint_of_another_row(tmp_path):
    """Of the same structure: only what was written beside the weights tells."""
    path = tmp_path / "checkpoint.safetensors"
    save_weights(make("alexnet_like"), path, "0123")
    load_weights(make("alexnet_like"), path)
    with pytest.raises(ValueError, match="it was trained with configuration 0123, not 4567"):
        load_weights(make("alexnet_like"), path, "4567")


def test_a_checkpoint_that_says_nothing_of_its_row_is_taken(tmp_path):
    """As older ones do."""
    saved, loaded = make("alexnet_like"), make("alexnet_like")
    save_model(saved, tmp_path / "checkpoint.safetensors")
    load_weights(loaded, tmp_path / "checkpoint.safetensors", "0123")
    assert all(map(torch.equal, loaded.parameters(), saved.parameters()))


def test_state_of_an_unfinished_training(tmp_path):
    path = tmp_path / "row" / "last.pt"
    assert load_state(path, CPU) is None
    save_state({"step": 3, "sums": torch.ones(4)}, path)
    save_state({"step": 4, "sums": torch.ones(4)}, path)
    assert load_state(path, CPU)["step"] == 4
    assert [p.name for p in path.parent.iterdir()] == ["last.pt"], "no temporary file is left"


def test_a_state_runs_no_program(tmp_path):
    class Program:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    torch.save({"step": Program()}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="last.pt cannot be read"):
        load_state(tmp_path / "last.pt", CPU)
    assert not (tmp_path / "made").exists()


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "last.pt"
    save_state({"step": 3}, path)
    with pytest.raises(Exception, match="pickle|lambda"):
        save_state({"step": lambda: 0}, path)
    assert load_state(path, CPU) == {"step": 3}
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_no_memory_is_no_damage(error, tmp_path, monkeypatch):
    """Else the message would advise to delete a good file."""

    def fail(*args, **kwargs):
        raise error

    save_state({"step": 3}, tmp_path / "last.pt")
    monkeypatch.setattr("train_test_utils.checkpoint.torch.load", fail)
    monkeypatch.setattr("train_test_utils.checkpoint.safe_open", fail)
    with pytest.raises(type(error), match="^$|can't allocate"):
        load_state(tmp_path / "last.pt", torch.device("cpu"))
    with pytest.raises(type(error), match="^$|can't allocate"):
        load_weights(torch.nn.Linear(1, 1), tmp_path / "last.pt")
