"""One row with one seed: what makes it another row, where it starts, what is kept until it is written."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from train_test_utils import run as run_module
from train_test_utils.dataset import ImageDataset, Split
from train_test_utils.recipe import Recipe
from train_test_utils.row_folder import claim, owner_of
from train_test_utils.rows import Row, _hash_of_folder, calibration_images
from train_test_utils.run import Run

FLOAT = Row("float", None, [], Recipe(epochs=1, lr=0.1))


class Stop(Exception):
    pass


@pytest.fixture(autouse=True)
def small_models(monkeypatch):
    def build(name, classes, **options):
        return nn.Sequential(nn.Flatten(), nn.Linear(3072, classes))

    monkeypatch.setattr(run_module, "build", build)


def run(folder, row=FLOAT, parent=None, seed=0, **options) -> Run:
    pixels = torch.randint(0, 256, (2, 8, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    train, test = (Split(images, torch.arange(8) % 2) for images in pixels)
    arguments = SimpleNamespace(budget=1.0, precision=torch.float32, device=torch.device("cpu"))
    data = ImageDataset("noise", ("a", "b"), train, test)
    return Run("small", options, row, parent, seed, data, arguments, folder)


def test_another_seed_parent_or_checkpoint_makes_another_row(tmp_path):
    child, checkpoint = Row("ptq", "float", [], None), tmp_path / "checkpoint"
    checkpoint.mkdir()
    runs = [run(tmp_path), run(tmp_path, seed=1)]
    runs += [run(tmp_path, child, parent) for parent in runs]
    for text in ("one", "two"):
        (checkpoint / "weights").write_text(text)
        _hash_of_folder.cache_clear()
        runs.append(run(tmp_path, checkpoint=str(checkpoint)))
    assert len({r.hash for r in runs}) == len(runs) and run(tmp_path).hash == runs[0].hash


def test_seeds_share_a_line_unless_they_or_their_parents_were_trained_otherwise(tmp_path):
    child, edited = Row("ptq", "float", [], None), Row("float", None, [], Recipe(epochs=2, lr=0.1))
    floats = [run(tmp_path), run(tmp_path, seed=1), run(tmp_path, edited, seed=1)]
    for one, other, edited in (floats, [run(tmp_path, child, parent, parent.seed) for parent in floats]):
        assert one.line_hash == other.line_hash != edited.line_hash


def test_a_fresh_model_depends_on_the_seed_alone(tmp_path):
    models = [run(tmp_path, seed=seed).start() for seed in (1, 1, 2)]
    one, again, other = (nn.utils.parameters_to_vector(model.parameters()) for model in models)
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_a_row_whose_weights_are_gone_is_not_finished(tmp_path):
    row = run(tmp_path)
    line = {"test_accuracy_pct": 90.0}
    logbook = SimpleNamespace(done=lambda config_hash: line, recall=lambda line: None)
    assert row.finished_in(logbook) is None
    for name in ("checkpoint.safetensors", "last.pt"):
        (row.folder / name).touch()
    assert row.finished_in(logbook) == line | {"line_hash": row.line_hash}
    assert not (row.folder / "last.pt").exists()  # left by a kill


def test_a_folder_that_was_taken_before_it_was_locked_is_left_alone(tmp_path, monkeypatch):
    row, other = run(tmp_path), run(tmp_path, seed=0, width=2)

    def claimed_and_lost(folder, config_hash):
        claim(folder, config_hash)
        claim(folder, other.hash)

    monkeypatch.setattr(run_module, "claim", claimed_and_lost)
    with pytest.raises(ValueError, match="taken by another process"):
        row.execute(SimpleNamespace(done=lambda config_hash: None))
    assert owner_of(row.folder) == other.hash


def test_a_row_that_another_process_finishes_meanwhile_is_not_done_again(tmp_path, monkeypatch):
    row, lines = run(tmp_path), {}

    def slowly(model):
        row.folder.mkdir()
        row.checkpoint.touch()
        lines[row.hash] = {"test_accuracy_pct": 90.0}
        return model

    monkeypatch.setattr(row, "transformed", slowly)
    assert row.execute(SimpleNamespace(done=lines.get, recall=lambda line: None))["test_accuracy_pct"] == 90


def test_the_state_of_a_training_is_kept_until_its_row_is_written(tmp_path, monkeypatch):
    def full(line):
        raise Stop

    row = run(tmp_path)
    row.folder.mkdir()
    (row.folder / "last.pt").touch()
    monkeypatch.setattr(row, "measured", lambda model: {})
    with pytest.raises(Stop):
        row._record(SimpleNamespace(row=full), None, {})
    assert (row.folder / "last.pt").exists()


def test_packed_files_are_calibrated_on_training_images(tmp_path, monkeypatch):
    def save_model(packed, path, metadata, images):
        assert torch.equal(images, calibration_images(row.data.train.images, 3))
        raise Stop

    row = run(tmp_path, seed=3)
    monkeypatch.setattr(run_module, "save_model", save_model)
    with pytest.raises(Stop):
        row.measured(row.start())
