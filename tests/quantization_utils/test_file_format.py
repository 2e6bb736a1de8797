"""What the bytes of a model file may say, and two that write to one path."""

from __future__ import annotations

import threading

import pytest

from quantization_utils.file_format import ModelFileError, _check_entries, is_shape, parse_json, replacing, write_file


@pytest.mark.parametrize("text", ['{"a":1,"a":1}', "NaN"])
def test_json_with_a_member_twice_or_without_a_number_is_refused(text):
    with pytest.raises(ModelFileError, match="the header is not valid JSON"):
        parse_json(text, "the header")


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
