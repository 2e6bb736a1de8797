"""benchmarks/training_speed.py: what it counts."""

from __future__ import annotations

import argparse
from types import SimpleNamespace

import pytest
import torch

from benchmarks import training_speed
from benchmarks.command_line import count
from benchmarks.training_speed import Stopwatch, check, covered, measure
from train_test_utils.cli import parse_arguments
from train_test_utils.data import load_dataset
from vit_experiments import rows


def test_intervals_that_overlap_count_once():
    assert covered([]) == 0
    assert covered([(5.0, 7.0), (0.0, 2.0), (1.0, 3.0), (1.5, 2.5), (3.0, 4.0)]) == 6


@pytest.mark.parametrize("word", ["--seeds", "--budget=0.1", "--quick"])
def test_options_that_would_change_nothing_are_refused(word):
    check(["--only", "float", "--device", "cpu"])
    with pytest.raises(ValueError, match=f"{word} is of no use here"):
        check(["--only", "float", word])


@pytest.mark.parametrize("word", ["0", "-1", "1.5", "x", ""])
def test_counts_are_whole_numbers_from_1_on(word):
    assert count("12") == 12
    with pytest.raises(argparse.ArgumentTypeError, match=f"a whole number from 1 on, not {word!r}"):
        count(word)


def test_the_second_round_is_timed(monkeypatch):
    times = iter([1.0, 3.0, 4.0, 9.0])
    monkeypatch.setattr(training_speed, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(3):
        watch({})
    assert watch.seconds == 2.0


def measured(device: str) -> dict:
    options = ["checkpoint=none", "width=64", "depth=1"]
    arguments = parse_arguments("vit", ["--dataset", "digits", "--device", device, "--options", *options])
    row = next(row for row in rows(arguments.options) if row.name == "qat_all_calibrated")
    data = load_dataset("digits", arguments.data_dir).to(arguments.device)
    return measure("vit", row, data, arguments, steps=3) | {"epochs": row.recipe.epochs, "images": len(data.train)}


def test_a_row_is_trained_as_its_script_trains_it():
    line = measured("cpu")
    assert line["steps"] == 3 and line["images_per_s"] > 0 and line["busy_pct"] is None
    minutes = line["epochs"] * line["images"] / line["images_per_s"] / 60
    assert line["full_recipe_minutes"] == pytest.approx(minutes, rel=0.01, abs=0.01)


@pytest.mark.gpu
def test_a_gpu_is_busy_for_a_part_of_the_time():
    line = measured("cuda")
    assert 0 < line["busy_pct"] <= 100 and line["trained_on"] == torch.cuda.get_device_name()
