"""What the bytes of a model file may say, and what is left of it whatever happens while it is written."""

from __future__ import annotations

import os
import stat
import threading

import pytest
import torch

from benchmarks.kill_while_saving import kill_while_saving, save_on_full_disk
from quantization_utils.file_format import ModelFileError, _check_entries, is_shape, parse_json, replacing, write_file


@pytest.mark.parametrize("value", ["1e999", "-1e999", "Infinity", "NaN", "1" * 21, '{"b":1,"b":1}'])
def test_json_with_a_number_that_is_none_or_a_member_twice_is_refused(value):
    assert parse_json('{"a":-1.5e3}', "it") == {"a": -1500.0}
    with pytest.raises(ModelFileError, match="it is not valid JSON .*(number|twice)"):
        parse_json(f'{{"a":{value}}}', "it")


def test_a_shape_is_a_list_of_a_few_counts():
    assert is_shape([]) and is_shape([2, 0])
    assert not any(is_shape(value) for value in ([True], [-1], [1.0], [1] * 9, (1,), None))


@pytest.mark.parametrize("begin", [2, 5])
def test_tensors_that_overlap_or_leave_a_hole_are_refused(begin):
    ends = {"a": (0, 4), "b": (begin, 8)}
    entries = {name: {"dtype": "U8", "shape": [e - b], "data_offsets": [b, e]} for name, (b, e) in ends.items()}
    with pytest.raises(ModelFileError, match="'b' leaves a hole or overlaps"):
        _check_entries(entries, 8)


def test_a_description_longer_than_readers_take_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="at most 4194304 fit a file"):
        write_file(tmp_path / "model", {}, {"metadata": "x" * (4 << 20)})
    assert list(tmp_path.iterdir()) == []


def test_two_that_write_to_one_path_do_not_wait_and_the_last_one_wins(tmp_path):
    path = tmp_path / "model"
    with replacing(path) as file:
        file.write(b"one")
        other = threading.Thread(target=write_file, args=(path, {}, {}), daemon=True)
        other.start()
        other.join(10)
        assert not other.is_alive() and path.stat().st_size > 3
    assert path.read_bytes() == b"one" and list(tmp_path.iterdir()) == [path]


def test_only_temporary_files_of_its_own_are_removed(tmp_path):
    abandoned = tmp_path / ".model.0123abcd.tmp"
    others = [tmp_path / f".model.{name}.tmp" for name in ("my-notes", "safetensors.1234", "safetensors.0123abcd")]
    for path in (abandoned, *others):
        path.touch()
    write_file(tmp_path / "model", {}, {})
    assert not abandoned.exists() and all(path.exists() for path in others)


def test_permissions_follow_the_umask(tmp_path):
    for mask, mode in ((0o022, 0o644), (0o077, 0o600)):
        before = os.umask(mask)
        try:
            write_file(tmp_path / "model", {}, {})
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == mode


def test_kills_and_a_full_disk_leave_the_previous_file(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        killed = kill_while_saving(8, tmp_path, width=512)
    finally:
        torch.set_num_threads(threads)
    assert killed["broken"] == killed["leftovers"] == 0 and killed["first"] + killed["second"] == 8
    full = save_on_full_disk(5, tmp_path, width=512, mounted=False)
    assert full["refused"] == full["intact"] == 5 and full["leftovers"] == 0
