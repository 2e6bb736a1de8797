"""Rows survive kills, full disks and broken lines; curves survive interruptions."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from train_test_utils import logbook
from train_test_utils.cli import sentence
from train_test_utils.logbook import Logbook, append_line, read_curves, read_rows


def book(folder):
    return Logbook(folder / "rows.jsonl", wandb_mode="disabled")


def test_a_row_is_found_again_by_its_configuration(tmp_path):
    book(tmp_path).row({"row": "float", "config_hash": "a", "test_accuracy_pct": 90.0})
    book(tmp_path).row({"row": "qat_all", "config_hash": "b"})
    book(tmp_path).row({"row": "float", "config_hash": "a", "test_accuracy_pct": 91.0})
    again = book(tmp_path)
    assert [r["row"] for r in again.rows()] == ["float", "qat_all", "float"]
    assert again.done("a")["test_accuracy_pct"] == 91.0
    assert again.done("c") is None


@pytest.mark.parametrize("tail", [b'{"row": "qa', b'{"row": "\xc3', b"\x00\x00\x00", b"[1, 2]"])
def test_a_torn_last_line_is_set_aside_and_nothing_else_is_lost(tmp_path, capsys, tail):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"row": "float", "config_hash": "a"}\n' + tail)
    again = book(tmp_path)
    assert "cut short" in capsys.readouterr().err
    assert (tmp_path / "rows.jsonl.torn").read_bytes() == tail + b"\n"
    again.row({"row": "next"})
    assert path.read_bytes() == b'{"row": "float", "config_hash": "a"}\n{"row": "next"}\n'


def test_a_complete_last_line_without_its_newline_is_kept(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"row": "float"}')
    again = book(tmp_path)
    again.row({"row": "next"})
    assert [r["row"] for r in again.rows()] == ["float", "next"]
    assert not (tmp_path / "rows.jsonl.torn").exists()


def test_a_broken_line_in_the_middle_is_named_and_left_out(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"row": "a"}\nnot json\n\n{"row": "b"}\n')
    assert [r["row"] for r in read_rows(path)] == ["a", "b"]
    assert "line 2" in capsys.readouterr().err


def test_a_broken_line_is_named_once_however_often_the_rows_are_read(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('not json\n{"config_hash": "b"}\n')
    again = book(tmp_path)
    assert again.done("b") and again.done("a") is None and len(again.rows()) == 1
    assert capsys.readouterr().err.count("line 1 is not a row") == 1


def test_killed_while_writing(tmp_path):
    """Whatever moment SIGKILL comes at: every line that was reported as written is there, whole."""
    script = (
        "import sys; from train_test_utils.logbook import Logbook\n"
        "book = Logbook(sys.argv[1], wandb_mode='disabled'); k = len(book.rows())\n"
        "while True:\n"
        "    book.row({'row': k, 'fill': 'x' * 5000}); print(k, flush=True); k += 1\n"
    )
    path = tmp_path / "rows.jsonl"
    said = -1
    for delay in (0.0, 0.05):
        process = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True)
        process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        said = max([said, *(int(line) for line in process.communicate()[0].split())])
    rows = book(tmp_path).rows()
    assert [r["row"] for r in rows] == list(range(len(rows)))
    assert len(rows) > said >= 0


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    append_line(path, {"row": "float"})
    real = os.write
    monkeypatch.setattr(logbook.os, "write", lambda fd, data: real(fd, data[:7]))  # as a disk with 7 bytes left
    with pytest.raises(OSError, match="no space left"):
        append_line(path, {"row": "qat_all"})
    assert path.read_text() == '{"row": "float"}\n'


def test_a_full_disk_is_told_with_the_file_that_did_not_fit(tmp_path, monkeypatch):
    def full(descriptor, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(logbook.os, "write", full)
    with pytest.raises(OSError, match="No space left") as raised:
        append_line(tmp_path / "rows.jsonl", {"row": "float"})
    assert sentence(raised.value) == f"{tmp_path / 'rows.jsonl'}: No space left on device"


@pytest.mark.parametrize("before, sizes", [
    (b"", [11]),
    (b'{"row": 0}', [11, 22]),
    (b'{"row": 0}\n{"ro', [5, 11, 22]),  # the line that is set aside first
])  # fmt: skip
def test_whatever_is_written_is_on_the_disk_before_anything_else_happens(before, sizes, tmp_path, monkeypatch):
    synchronized = []
    monkeypatch.setattr(logbook.os, "fsync", lambda file: synchronized.append(os.fstat(file).st_size))
    (tmp_path / "rows.jsonl").write_bytes(before)
    book(tmp_path).row({"row": 1})
    assert synchronized == sizes


@pytest.mark.parametrize("write", [logbook.mend, lambda path: append_line(path, {"row": 1})])
def test_one_process_at_a_time_writes(write, tmp_path, monkeypatch):
    path, lock = tmp_path / "rows.jsonl", fcntl.flock
    path.write_bytes(b'{"ro')
    with open(path) as other:
        lock(other, fcntl.LOCK_EX)
        monkeypatch.setattr(logbook.fcntl, "flock", lambda file, how: lock(file, how | fcntl.LOCK_NB))
        with pytest.raises(BlockingIOError):  # it would wait
            write(path)
    assert path.read_bytes() == b'{"ro'


def test_every_torn_line_is_kept(tmp_path):
    path = tmp_path / "rows.jsonl"
    for tail in (b'{"a', b'{"b'):
        path.write_bytes(tail)
        logbook.mend(path)
    assert (tmp_path / "rows.jsonl.torn").read_bytes() == b'{"a\n{"b\n'


@pytest.mark.parametrize("why", [errno.EACCES, errno.EROFS])
def test_rows_that_can_only_be_read_are_read(why, tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"row": "float"}\n{"ro')

    def refused(*_):
        raise OSError(why, os.strerror(why), str(path))

    monkeypatch.setattr(logbook.os, "open", refused)
    assert Logbook(path, "disabled").rows() == [{"row": "float"}]


def test_what_is_not_json_is_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        append_line(tmp_path / "rows.jsonl", {"loss": float("nan")})
    assert not (tmp_path / "rows.jsonl").exists()


def test_curves_of_an_interrupted_row_continue_without_repetition(tmp_path):
    first = book(tmp_path)
    first.start_row("qat_all-seed0", {})
    for epoch in (1, 2, 3):
        first.epoch({"epoch": epoch, "train_loss": 1.0})
    with open(tmp_path / "qat_all-seed0" / "curves.jsonl", "a") as file:
        file.write('{"epoch": 4, "tra')
    second = book(tmp_path)  # its last saved state was after epoch 2
    second.start_row("qat_all-seed0", {})
    second.epoch({"epoch": 3, "train_loss": 0.5})
    second.epoch({"epoch": 4, "train_loss": 0.4})
    curves = read_curves(tmp_path / "qat_all-seed0")
    assert [(c["epoch"], c["train_loss"]) for c in curves] == [(1, 1.0), (2, 1.0), (3, 0.5), (4, 0.4)]
    second.start_row("qat_all-seed0", {})  # from the beginning
    second.epoch({"epoch": 1, "train_loss": 2.0})
    assert [c["epoch"] for c in read_curves(tmp_path / "qat_all-seed0")] == [1]


def test_epochs_that_are_no_numbers_are_left_out(tmp_path):
    (tmp_path / "curves.jsonl").write_text('{"epoch": 2}\n{"epoch": "x"}\n{}\n{"epoch": 1}\n')
    assert read_curves(tmp_path) == [{"epoch": 1}, {"epoch": 2}]


class Mirror:
    """Keeps what it is told, and how many rows the file had then."""

    def __init__(self, mode, folder):
        self.folder, self.told = folder, []

    def start(self, name, config, job_type):
        self.told.append(f"{job_type} {name}")

    def epoch(self, record):
        self.told.append(record["epoch"])

    def end(self, row):
        self.told.append((row["row"], len(read_rows(self.folder / "rows.jsonl"))))

    def close(self, table, files, packed):
        self.told.append([file.name for file in files] + [file.parent.name for file in packed])


def test_the_mirror_is_told_the_earlier_epochs_that_hold_and_the_rows_that_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(logbook, "Mirror", Mirror)
    for epochs in ((1, 2, 3), (3, 4)):  # the second time, the last saved state was after epoch 2
        again = book(tmp_path)
        again.start_row("qat-seed0", {})
        for epoch in epochs:
            again.epoch({"epoch": epoch})
    again.row({"row": "qat"})
    again.close([{"row": "float", "seed": 0, "weight_bits": 32}, {"row": "qat", "seed": 0, "weight_bits": 1.6}])
    assert again._mirror.told == ["train qat-seed0", 1, 2, 3, 4, ("qat", 1), ["rows.jsonl", "qat-seed0"]]


def test_curves_of_a_training_that_had_ended_before_its_row_was_written_are_mirrored(tmp_path, monkeypatch):
    monkeypatch.setattr(logbook, "Mirror", Mirror)
    for _ in range(2):
        again = book(tmp_path)
        again.start_row("qat-seed0", {})
        if not (tmp_path / "qat-seed0").exists():
            assert again.resume_at_the_end() is None
            again.epoch({"epoch": 1})
            again.epoch({"epoch": 2, "train_seconds": 7.5})
    assert again.resume_at_the_end() == {"epoch": 2, "train_seconds": 7.5}
    assert again._mirror.told == ["train qat-seed0", 1, 2]


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    book(tmp_path).row({"row": "float", "config_hash": "a"})
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    other = book(tmp_path)
    other.start_row("x-seed0", {})
    other.epoch({"epoch": 1})
    other.row({"row": "x"})
    other.close([], [])
    other.finish()
    assert other.done("a") == {"row": "float", "config_hash": "a"}
    assert len(read_rows(tmp_path / "rows.jsonl")) == 1
    assert json.dumps(sorted(os.listdir(tmp_path))) == '["rows.jsonl"]'


def test_a_line_behind_one_that_another_process_left_torn_is_not_lost(tmp_path):
    mine = book(tmp_path)
    with open(tmp_path / "rows.jsonl", "ab") as other:
        other.write(b'{"row": "torn by ano')
    mine.row({"row": "two", "config_hash": "x"})
    assert mine.done("x") == {"row": "two", "config_hash": "x"}
