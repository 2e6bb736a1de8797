"""One row with one seed: what makes it another row, where it starts, what is kept until it is written."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.trainings import CPU
from train_test_utils import run as run_module
from train_test_utils.checkpoint import save_weights
from train_test_utils.dataset import ImageDataset, Split
from train_test_utils.recipe import Recipe
from train_test_utils.row_folder import claim, owner_of
from train_test_utils.rows import Row, _hash_of_folder, calibration_images
from train_test_utils.run import Run, backend_of
from train_test_utils.train import Setup

FLOAT = Row("float", None, [], Recipe(epochs=1, lr=0.1))


class Stop(Exception):
    pass


@pytest.fixture(autouse=True)
def small_models(monkeypatch):
    def build(name, classes, **options):
        return nn.Sequential(nn.Flatten(), nn.Linear(3072, classes))

    monkeypatch.setattr(run_module, "build", build)


def run(
    folder, row=FLOAT, parent=None, seed=0, name="small", data_name="noise", data_seed=0, budget=1.0,
    precision=torch.float32, **options,
) -> Run:  # fmt: skip
    generator = torch.Generator().manual_seed(data_seed)
    pixels = torch.randint(0, 256, (2, 8, 3, 32, 32), generator=generator, dtype=torch.uint8)
    train, test = (Split(images, torch.arange(8) % 2) for images in pixels)
    arguments = SimpleNamespace(
        budget=budget, precision=precision, device=CPU, compile=False, checkpoint_seconds=7, quick=True
    )
    data = ImageDataset(data_name, ("a", "b"), train, test)
    return Run(name, options, row, parent, seed, data, arguments, folder)


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


def test_all_that_figures_depend_on_makes_another_row(tmp_path, monkeypatch):
    changes = [
        {}, {"name": "other"}, {"width": 2}, {"data_name": "other"}, {"data_seed": 1}, {"budget": 0.5},
        {"precision": torch.bfloat16},
    ]  # fmt: skip
    hashes = [run(tmp_path, **change).hash for change in changes]
    monkeypatch.setenv("WORLD_SIZE", "2")
    hashes.append(run(tmp_path).hash)
    assert len(set(hashes)) == len(changes) + 1


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
    assert row.recall(logbook) is None
    for name in ("checkpoint.safetensors", "last.pt"):
        (row.folder / name).touch()
    assert row.recall(logbook) == line | {"line_hash": row.line_hash}
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


def test_figures_are_those_of_the_saved_file_on_the_test_images(tmp_path, monkeypatch):
    """A file that gets all images right, of a model that gets none right."""
    row, file, saved, compared = run(tmp_path), nn.Identity(), [], []
    test = row.data.test

    def predict(model, images):
        assert images is test.images
        right = nn.functional.one_hot(test.labels, 2).float()
        return right if model is file else 1 - right

    def save_model(packed, path, metadata, images):
        path.parent.mkdir()
        path.touch()
        saved.append(metadata["accuracy_of_trainable_pct"])

    def agreement_pct(model, stored, images, trainable, packed):
        assert images is test.images and stored is file
        compared.append((trainable.argmax(1).tolist(), packed.argmax(1).tolist()))
        return 12.5, 25

    monkeypatch.setattr(run_module, "predict", predict)
    monkeypatch.setattr(run_module, "save_model", save_model)
    monkeypatch.setattr(run_module, "load_model", lambda *where, **backend: (file, {}))
    monkeypatch.setattr(run_module, "agreement_pct", agreement_pct)
    for name in ("count_macs", "ideal_bytes", "weight_bits"):
        monkeypatch.setattr(run_module, name, lambda packed: 0)
    monkeypatch.setattr(run_module, "latency_beside", lambda *models, seconds: {})
    line = row.measured(row.start())
    assert (line["test_accuracy_pct"], line["test_images"]) == (100, 8)
    assert (line["reload_agreement_pct"], line["reload_agreement_float64_pct"]) == (12.5, 25)
    assert saved == [0] and compared == [([1, 0] * 4, [0, 1] * 4)]


def keep_what_is_recorded(row, monkeypatch):
    """Nothing is measured: what `row` records is what it was told."""
    monkeypatch.setattr(row, "_record", lambda logbook, model, more: more)


def test_weights_that_another_configuration_has_trained_are_refused(tmp_path, monkeypatch):
    row, other = run(tmp_path), run(tmp_path, width=2)
    monkeypatch.setattr(run_module, "train", lambda *arguments, **more: more["on_epoch"]({"train_seconds": 1.5}))
    keep_what_is_recorded(row, monkeypatch)
    logbook = SimpleNamespace(start_row=lambda *arguments: None, epoch=lambda record: None)
    assert row._train_and_record(logbook, row.start(), 0.0)["train_seconds"] == 1.5
    row.trained()
    with pytest.raises(ValueError, match=f"it was trained with configuration {row.hash}, not {other.hash}"):
        other.trained()


def test_a_training_gets_what_its_row_and_the_command_line_say(tmp_path, monkeypatch):
    given = {}

    def train(model, data, recipe, setup, **more):
        given.update(more, data=data, recipe=recipe, setup=setup)

    parent = run(tmp_path)
    save_weights(parent.start(), parent.checkpoint, parent.hash)
    distilled = Row("qat", "float", [], Recipe(epochs=1, lr=0.1, distill=0.5))
    row = run(tmp_path, distilled, parent, 3, budget=0.5, precision=torch.bfloat16)
    monkeypatch.setattr(run_module, "train", train)
    keep_what_is_recorded(row, monkeypatch)
    logbook = SimpleNamespace(
        start_row=lambda *arguments: None, resume_at_the_end=lambda: {"epoch": 1, "train_seconds": 7.5}
    )
    recorded = row._train_and_record(logbook, row.start(), 0.25)
    assert given["data"] is row.data and given["recipe"] == distilled.recipe
    assert given["setup"] == Setup(CPU, torch.bfloat16, False, 7)
    assert (given["seed"], given["budget"], given["state_path"]) == (3, 0.5, row.folder / "last.pt")
    assert torch.equal(given["teacher"][1].weight, parent.trained()[1].weight)
    assert recorded == {"train_seconds": 7.5, "transform_seconds": 0.25}  # it had ended before it was interrupted


def test_a_row_that_is_measured_twice_still_says_where_it_was_trained(tmp_path, monkeypatch):
    row = run(tmp_path)
    claim(row.folder, row.hash)
    now = {"device": "B", "commit": "two", "versions": {"torch": "2"}}
    monkeypatch.setattr(row, "trained", lambda: None)
    monkeypatch.setattr(row, "_record", lambda logbook, model, more: more | now)
    logbook = SimpleNamespace(start_row=lambda *arguments: None)
    line = {"device": "A", "commit": "one", "versions": {"torch": "1"}}
    for _ in range(2):
        line = row.measure_again(logbook, line)
    assert [line[f"trained_{field}"] for field in now] == ["A", "one", {"torch": "1"}]


def test_the_folders_of_a_rows_ancestors_stay_while_it_is_done(tmp_path, monkeypatch):
    grandparent = run(tmp_path)
    parent = run(tmp_path, Row("qat", "float", [], None), grandparent)
    row = run(tmp_path, Row("ptq", "qat", [], None), parent)
    for ancestor in (grandparent, parent):
        claim(ancestor.folder, ancestor.hash)

    def start():
        for ancestor in (grandparent, parent):
            with pytest.raises(ValueError, match="another process is at work"):
                claim(ancestor.folder, "another")
        raise Stop

    monkeypatch.setattr(row, "start", start)
    with pytest.raises(Stop):
        row.execute(None)


def test_the_backend_is_that_of_the_network_or_those_of_the_layers():
    layers = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    assert backend_of(layers) == "torch"
    for layer, backend in zip(layers, ("reference", "cpu"), strict=True):
        layer._runner = SimpleNamespace(backend=backend)
    assert backend_of(layers) == "cpu+reference"
    layers.executor = SimpleNamespace(backend="cpu")
    assert backend_of(layers) == "cpu"
