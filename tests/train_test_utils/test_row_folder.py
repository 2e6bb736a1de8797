from __future__ import annotations

import pytest

from train_test_utils import distributed
from train_test_utils.row_folder import claim, locked, owner_of


def test_results_that_are_moved_aside_take_the_place_of_none(tmp_path, capsys):
    (tmp_path / "row.a").mkdir()
    (tmp_path / "row.a" / "older").touch()
    (tmp_path / "row").mkdir()
    claim(tmp_path / "row", "a")
    claim(tmp_path / "row", "b")
    (aside,) = tmp_path.glob("row.a.*")
    assert f"row had results of another configuration: they are in {aside.name} now" in capsys.readouterr().err
    assert (aside / "config_hash").read_text() == "a\n" and (tmp_path / "row.a" / "older").exists()
    assert (tmp_path / "row" / "config_hash").read_text() == "b\n"


def test_nothing_is_written_where_a_folder_is_claimed_already(tmp_path):
    """A read-only disk, say."""
    claim(tmp_path / "row", "a")
    (tmp_path / "row" / "config_hash").write_text("a")
    claim(tmp_path / "row", "a")
    assert (tmp_path / "row" / "config_hash").read_text() == "a"


def test_a_mark_that_was_cut_off_is_written_again(tmp_path):
    claim(tmp_path / "row", "a")
    (tmp_path / "row" / "config_hash").write_text("")
    claim(tmp_path / "row", "a")
    assert owner_of(tmp_path / "row") == "a"


def test_the_first_of_several_processes_claims_and_the_others_wait_for_it(tmp_path, monkeypatch):
    waited = []
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr(distributed, "barrier", lambda: waited.append(True))
    claim(tmp_path / "row", "a")
    assert waited and not (tmp_path / "row").exists()


def test_several_may_read_what_none_may_write_meanwhile(tmp_path):
    claim(tmp_path / "row", "a")
    with locked(tmp_path / "row", shared=True), locked(tmp_path / "row", shared=True):
        with pytest.raises(ValueError, match="another process is at work"), locked(tmp_path / "row"):
            pass
        with pytest.raises(ValueError, match="another process is at work"):
            claim(tmp_path / "row", "b")
    claim(tmp_path / "row", "b")
