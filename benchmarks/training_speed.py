"""How fast rows train, and which share of the time a GPU is busy: does it wait for data or for Python?

    python3 benchmarks/training_speed.py resnet_18 --only float qat_all --dataset cifar10 [--steps 100]

After the model's name come the options of its script that say what is trained on which data and device. Each row that
`--only` names is trained for three rounds of `--steps` steps, as its script trains it, but from newly drawn weights. In
the first round everything warms up and is compiled, the second is timed, and in the third PyTorch's profiler adds up
how long the GPU computes. "Busy" is that time divided by the second round's, which no profiler slows down. Appends a
line for each row to results/training/speed.jsonl, with the minutes that its full recipe takes at this rate, and the
minutes that the whole table would take if all its rows were as fast: training alone, for one data set and seed.
"""

from __future__ import annotations

import copy
import importlib
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.command_line import count, make_parser
from models import build
from train_test_utils.cli import Arguments, parse_arguments, sentence
from train_test_utils.data import load_dataset
from train_test_utils.dataset import ImageDataset
from train_test_utils.experiment import options_of
from train_test_utils.record import append_record, device_name
from train_test_utils.rows import Row, choose, is_named, transformed
from train_test_utils.train import Setup, train


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals (start, end): kernels of two streams at a time count once."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


class Stopwatch:
    """Called at the end of each of three rounds: times the second round and, on a GPU, profiles the third.

    `seconds`: of the second round. `busy_seconds`: how long the GPU computed in the third; None on a CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.rounds, self.began = device, 0, 0.0
        self.seconds = 0.0
        self.busy_seconds: float | None = None
        self.profiler = profile(activities=[ProfilerActivity.CUDA])

    def __call__(self, record: dict[str, Any]) -> None:
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize(self.device)
        self.rounds += 1
        if self.rounds == 2:
            self.seconds = time.perf_counter() - self.began
            if on_gpu:
                self.profiler.start()
        elif self.rounds == 3 and on_gpu:
            self.profiler.stop()
            kernels = [e for e in self.profiler.events() or [] if e.device_type == DeviceType.CUDA]
            self.busy_seconds = covered((e.time_range.start, e.time_range.end) for e in kernels) / 1e6
        self.began = time.perf_counter()


def measure(model_name: str, row: Row, data: ImageDataset, arguments: Arguments, steps: int) -> dict[str, Any]:
    """A row's line, but for the table's minutes."""
    assert row.recipe is not None
    batch = row.recipe.batch_size
    part = replace(data, train=data.train[torch.arange(min(len(data.train), steps * batch))])
    steps, batch = row.recipe.steps_per_epoch(len(part.train)), min(batch, len(part.train))
    watch = Stopwatch(arguments.device)
    torch.manual_seed(0)
    parent = build(model_name, len(data.class_names), **arguments.options)
    model = transformed(row, copy.deepcopy(parent), data.train.images, seed=0, structure_only=True)
    teacher = parent if row.recipe.distill else None
    train(
        model, part, replace(row.recipe, epochs=3), title=row.name,
        setup=Setup(arguments.device, arguments.precision, arguments.compile), teacher=teacher, on_epoch=watch,
    )  # fmt: skip
    speed = steps * batch / watch.seconds
    return {
        "model": model_name, "dataset": data.name, "options": arguments.options, "row": row.name, "steps": steps,
        "images_per_s": round(speed, 1),
        "busy_pct": None if watch.busy_seconds is None else round(100 * watch.busy_seconds / watch.seconds, 1),
        "full_recipe_minutes": round(row.recipe.epochs * len(data.train) / speed / 60, 2),
        "trained_on": device_name(arguments.device), "precision": str(arguments.precision),
        "compiled": arguments.compile,
    }  # fmt: skip


def check(words: list[str]) -> None:
    """Raises ValueError for an option of the scripts that changes nothing here."""
    idle = ("--list", "--seeds", "--budget", "--holdout", "--measure-again", "--checkpoint-seconds", "--out", "--wandb",
            "--quick")  # fmt: skip
    if given := [word for word in words if word.partition("=")[0] in idle]:
        raise ValueError(f"{given[0]} is of no use here: nothing is trained to its end")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("model", choices=["alexnet", "resnet_18", "vit"])
    parser.add_argument("--steps", type=count, default=100)
    given, words = parser.parse_known_args()
    script = importlib.import_module(f"{given.model}_experiments")
    try:
        check(words)
        arguments = parse_arguments(given.model, words)
        options = options_of(arguments, getattr(script, "OPTIONS", {}), None)
        arguments = replace(arguments, options=options)
        table = script.rows(arguments.options) if hasattr(script, "rows") else script.ROWS
        rows = [row for row in choose(table, arguments.only) if row.recipe and is_named(row, arguments.only)]
        if not rows:
            raise ValueError(f"none of {' '.join(arguments.only)} is trained: choose others with --only")
        epochs = sum(row.recipe.epochs for row in table if row.recipe)
        for name in arguments.dataset:
            data = load_dataset(name, arguments.data_dir).to(arguments.device)
            for row in rows:
                line = measure(given.model, row, data, arguments, given.steps)
                line["table_minutes"] = round(epochs * len(data.train) / line["images_per_s"] / 60, 1)
                append_record("training/speed", line)
                busy = "" if line["busy_pct"] is None else f", device busy {line['busy_pct']:.1f}% of the time"
                print(f"{line['row']:<34}{line['images_per_s']:>10,.0f} images/s, full recipe "
                      f"{line['full_recipe_minutes']:,.1f} minutes, the whole table of {name} "
                      f"{line['table_minutes']:,.0f}{busy}")  # fmt: skip
    except (ValueError, OSError) as error:
        parser.error(sentence(error))


if __name__ == "__main__":
    main()
