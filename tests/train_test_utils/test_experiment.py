"""The loop over the rows of a table, with rows that only pretend to be done."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.trainings import CPU, dataset
from train_test_utils import experiment
from train_test_utils.rows import Row


@pytest.fixture
def table(monkeypatch, tmp_path):
    """A table of two rows with two seeds; given a function (row's name, seed) -> line: the exit code, what was told."""

    def run(line_of):
        told = []

        class Pretended:
            def __init__(self, model_name, options, row, parent, seed, *more):
                self.row, self.seed = row, seed

            def line(self, logbook):
                return line_of(self.row.name, self.seed)

        class Logbook:
            def __init__(self, path, wandb_mode):
                told.append(("in", path.parent.name))

            def rows(self):
                return ["of before"]

            def close(self, table, paths):
                told.append(("close", table, paths))

            def finish(self):
                told.append("finish")

        def write_report(lines, folder):
            told.append(("report", lines))
            return ["page"]

        monkeypatch.setattr(experiment, "Run", Pretended)
        monkeypatch.setattr(experiment, "Logbook", Logbook)
        monkeypatch.setattr(experiment, "print_table", lambda table: None)
        monkeypatch.setattr(experiment, "write_report", write_report)
        rows = [Row(name, None, [], None) for name in ("float", "other")]
        arguments = SimpleNamespace(out=tmp_path, wandb="disabled", device=CPU, seeds=(0, 1))
        return experiment.run_table("small", {}, rows, dataset(), arguments), told

    return run


def test_every_seed_of_every_row_is_reported_and_mirrored(table):
    code, told = table(lambda name, seed: f"{name} {seed}")
    lines = ["float 0", "other 0", "float 1", "other 1"]
    assert code == 0
    assert told == [("in", "small-bright"), ("report", ["of before", *lines]), ("close", lines, ["page"]), "finish"]


def test_the_worst_exit_code_of_a_row_is_the_tables(table):
    def line_of(name, seed):
        raise ValueError("a mistake") if seed == 0 else MemoryError

    assert table(line_of) == (2, [("in", "small-bright"), "finish"])


def test_rows_from_before_there_were_fingerprints_are_taken_for_those_of_these_images(tmp_path):
    folder = tmp_path / "small-bright"
    folder.mkdir()
    (folder / "rows.jsonl").write_text('{"row": "float"}\n')
    experiment.refuse_mixed_results("small", [dataset()], tmp_path)
    (folder / "rows.jsonl").write_text('{"row": "float", "data_fingerprint": "of others"}\n')
    with pytest.raises(ValueError, match="has results of other images"):
        experiment.refuse_mixed_results("small", [dataset()], tmp_path)
