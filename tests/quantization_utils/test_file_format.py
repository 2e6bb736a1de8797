"""What the bytes of a model file may say, and what is left of it whatever happens while it is written."""

from __future__ import annotations

import json
import os
import stat
import struct
import threading

import pytest
import torch

from benchmarks.kill_while_saving import kill_while_saving, save_on_full_disk
from quantization_utils.file_format import (
    HASH_KEY,
    NO_HASH,
    ModelFileError,
    Stored,
    _check_entries,
    dump_json,
    is_shape,
    parse_json,
    read_file,
    replacing,
    write_file,
)


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


def test_bytes_that_belong_to_no_tensor_are_refused():
    entries = {"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}
    _check_entries(entries, 4)
    with pytest.raises(ModelFileError, match="1 bytes at the end of the file belong to no tensor"):
        _check_entries(entries, 5)


def test_descriptions_are_written_in_one_way():
    assert dump_json({"b": 1, "a": {"d": [1, 2], "c": "π"}}) == '{"a":{"c":"\\u03c0","d":[1,2]},"b":1}'


def test_tensors_lie_by_size_and_name_on_whole_words(tmp_path):
    tensors = {"b": Stored("U8", (3,), b"abc"), "a": Stored("U8", (1,), b"x"), "z": Stored("F32", (1,), bytes(4)),
               "m": Stored("F16", (1,), bytes(2))}  # fmt: skip
    for extra in range(8):
        write_file(tmp_path / "x", tensors, {"metadata": "x" * extra})
        data = (tmp_path / "x").read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        assert length % 8 == 0
        assert list(json.loads(data[8 : 8 + length])) == ["__metadata__", "z", "m", "a", "b"]


OURS = {"format": "packed-vision-model", "format_version": "1"}


@pytest.mark.parametrize(
    "header, sentence",
    [
        ([], "the header is not a JSON object"),
        ({"__metadata__": {"format": 1}}, "no metadata of this project"),
        ({"__metadata__": OURS | {HASH_KEY: NO_HASH}}, "lacks the hashes"),
        ({"__metadata__": OURS | {"tensors": "{}"}}, "lacks the hashes"),
    ],
)
def test_a_header_that_is_none_is_refused(header, sentence, tmp_path):
    text = json.dumps(header).encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(ModelFileError, match=sentence):
        read_file(tmp_path / "x")


def test_a_header_longer_than_any_model_needs_is_not_read(tmp_path):
    write_file(tmp_path / "x", {}, {"tensors": "{}"})
    longer = (tmp_path / "x").read_bytes()[8:] + b" " * (4 << 20)
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(longer)) + longer)
    with pytest.raises(ModelFileError, match="its header would be longer"):
        read_file(tmp_path / "x")


def test_a_link_stays_one_and_leads_to_the_new_file(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "model")
    write_file(tmp_path / "link", {}, {})
    assert (tmp_path / "link").is_symlink() and (tmp_path / "folder" / "model").stat().st_size > 8
    with pytest.raises(IsADirectoryError, match="this is a folder: name a file"):
        write_file(tmp_path, {}, {})


def test_a_link_with_the_name_of_an_abandoned_file_is_nobodys_leftover(tmp_path):
    (tmp_path / "other").write_bytes(b"mine")
    (tmp_path / ".model.0123abcd.tmp").symlink_to(tmp_path / "other")
    write_file(tmp_path / "model", {}, {})
    assert (tmp_path / ".model.0123abcd.tmp").is_symlink()


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
    torch.set_num_threads(1)
    killed = kill_while_saving(8, tmp_path, width=512)
    assert killed["broken"] == killed["leftovers"] == 0 and killed["first"] + killed["second"] == 8
    full = save_on_full_disk(5, tmp_path, width=512, mounted=False)
    assert full["refused"] == full["intact"] == 5 and full["leftovers"] == 0
