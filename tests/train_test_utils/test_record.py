"""Figures of benchmarks: a line of results/ each, as safe as a row's."""

import calendar
import json
import platform
import shlex
import subprocess
import time
from pathlib import Path

import pytest
import torch

from train_test_utils import record
from train_test_utils.record import append_record


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "ROOT", tmp_path)
    return tmp_path


def test_the_command_can_be_given_again(root, monkeypatch):
    words = [str(root / "benchmarks" / "kernels.py"), "--only", "qat*", "--data-dir", "my data"]
    monkeypatch.setattr("sys.argv", words)
    path = append_record("latency/kernels", {"us": 1.5})
    assert path == root / "results" / "latency" / "kernels.jsonl"
    (line,) = map(json.loads, path.read_text().splitlines())
    assert line["us"] == 1.5 and line["versions"]["torch"]
    assert line["command"] == "python3 benchmarks/kernels.py --only 'qat*' --data-dir 'my data'"
    assert shlex.split(line["command"])[2:] == words[1:]


def test_a_script_outside_the_checkout_is_given_by_its_name(root, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/elsewhere/kernels.py"])
    assert json.loads(append_record("kernels", {}).read_text())["command"] == "python3 kernels.py"


@pytest.mark.parametrize(
    "changed, said", [(None, ""), ("new.py", ""), ("results/rows.jsonl", ""), ("code.py", "+changes")]
)
def test_the_commit_says_whether_files_were_changed(changed, said, root):
    """Those that it has; what was measured is none of the code."""
    (root / "results").mkdir()
    for name in ("code.py", "results/rows.jsonl"):
        (root / name).touch()
    for words in ("init -q", "add .", "-c user.name=x -c user.email=x commit -q -m x"):
        subprocess.run(["git", *words.split()], cwd=root, check=True)
    if changed:
        (root / changed).write_text("changed")
    record.commit.cache_clear()
    head = subprocess.check_output(["git", "rev-parse", "--short=12", "HEAD"], cwd=root, text=True)
    assert record.commit() == head.strip() + said
    record.commit.cache_clear()


def test_what_is_unpacked_inside_of_another_repository_is_not_of_its_commit(tmp_path, monkeypatch):
    for words in ("init -q", "-c user.name=x -c user.email=x commit -q --allow-empty -m x"):
        subprocess.run(["git", *words.split()], cwd=tmp_path, check=True)
    monkeypatch.setattr(record, "ROOT", tmp_path / "unpacked")
    (tmp_path / "unpacked").mkdir()
    record.commit.cache_clear()
    assert record.commit() == ""
    record.commit.cache_clear()


def test_without_a_commit_or_without_git_there_is_none(root, monkeypatch):
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    for path in (None, str(root)):
        if path:
            monkeypatch.setenv("PATH", path)
        record.commit.cache_clear()
        assert record.commit() == ""
    record.commit.cache_clear()


@pytest.mark.parametrize(
    "told, name",
    [("processor\t: 0\nmodel name\t: A CPU: 2 GHz\nmodel name\t: another\n", "A CPU: 2 GHz"), ("", platform.machine())],
)
def test_the_processor_is_called_as_the_system_calls_it(told, name, monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda path: told)
    assert record.device_name(torch.device("cpu")) == name


def test_versions_are_pythons_and_those_of_what_is_installed():
    versions = record.versions("pytest", "no-such-package")
    assert versions == {"python": platform.python_version(), "pytest": pytest.__version__}


def test_times_are_those_of_greenwich(root, monkeypatch):
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("TZ", "UTC-9")
        time.tzset()
        told = json.loads(append_record("kernels", {}).read_text())["finished_at"]
    time.tzset()
    assert abs(calendar.timegm(time.strptime(told, "%Y-%m-%dT%H:%M:%SZ")) - time.time()) < 3600


def test_what_is_not_json_leaves_the_file_as_it_was(root):
    path = append_record("kernels", {"us": 1.5})
    before = path.read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        append_record("kernels", {"us": float("nan")})
    assert path.read_bytes() == before


def test_a_line_that_a_kill_cut_short_does_not_take_the_next_one_with_it(root, capsys):
    path = append_record("kernels", {"us": 1.5})
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:20])
    append_record("kernels", {"us": 2.5})
    assert [json.loads(line)["us"] for line in path.read_text().splitlines()] == [1.5, 2.5]
    assert "cut short" in capsys.readouterr().err
