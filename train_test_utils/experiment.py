"""The plain loop over the rows of a table: build, transform, train, pack, save, reload, measure, log."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import distributed
from .cli import QUICK_BUDGET, Arguments, is_out_of_memory, parse_arguments, sentence
from .data import load_dataset
from .dataset import ImageDataset
from .logbook import Logbook, read_rows
from .output import prepare_output, say
from .record import commit
from .report import print_table, write_report
from .rows import Row, choose, format_rows, in_small_batches
from .run import Run
from .train import NonFiniteLoss

Options = dict[str, Any]  # of a model's constructor


def main(
    model_name: str,
    rows: Sequence[Row] | Callable[[Options], Sequence[Row]],
    quick: Sequence[str],
    quick_options: Options | Callable[[Options], Options] | None = None,
    quick_budget: float = QUICK_BUDGET,
    **default_options: Any,
) -> None:
    """Run the table of a script from the command line.

    `rows`: the table, or a function that makes it from the model's options. `quick`, `quick_options`, `quick_budget`:
    the rows, model options (also as a function of those that the user gives) and budget of `--quick`.
    `default_options`: the model's options unless `--options` says otherwise.
    Exits with code 2 and one sentence on a user's mistake, with 1 if a training diverged or found no memory, with 130
    on Ctrl-C. A row that can't be done is named, and the others are done.
    """
    # PyTorch's own switch, read at the first large allocation: in huge pages AlexNet's 227 MB of weights are read up to
    # twice as fast where memory is scattered.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # Outside of autocast, a GPU's convolutions are compared with exact integers and used for calibration.
    torch.backends.cudnn.allow_tf32 = False
    prepare_output()
    arguments = parse_arguments(model_name, sys.argv[1:], quick_budget)
    commit()  # of the code that is about to run
    options = options_of(arguments, default_options, quick_options)
    try:
        table = rows(options) if callable(rows) else rows
        chosen = choose(table, arguments.only or (quick if arguments.quick else None))
        if arguments.quick:
            chosen = [in_small_batches(row) for row in chosen]
        if arguments.list:
            say(format_rows(model_name, chosen, arguments.budget))
            return
        device = distributed.start(arguments.device)
        with distributed.first_alone():  # one process downloads; all sets, so that a missing one is told now
            datasets = [load_dataset(name, arguments.data_dir) for name in arguments.dataset]
        if arguments.holdout:
            datasets = [dataset.held_out(arguments.holdout) for dataset in datasets]
        refuse_mixed_results(model_name, datasets, arguments.out)
        code = 0
        for dataset in datasets:
            code = max(code, run_table(model_name, options, chosen, dataset, replace(arguments, device=device)))
        if code:
            distributed.barrier()  # torchrun ends the other processes as soon as one has ended with an error
            raise SystemExit(code)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if os.environ.get("TERNARY_TRACEBACK") or not is_expected(error):
            raise
        print(f"{Path(sys.argv[0]).name}: {sentence(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"\n{Path(sys.argv[0]).name}: interrupted; the same command continues", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        distributed.stop()


def options_of(arguments: Arguments, default: Options, quick: Options | Callable[[Options], Options] | None) -> Options:
    """The model's: those that the user gives go before those of `--quick`, and these before the script's."""
    of_quick = quick(arguments.options) if callable(quick) else quick or {}
    return default | (of_quick if arguments.quick else {}) | arguments.options


def is_expected(error: Exception) -> bool:
    """Whether one sentence is enough, without a traceback: for a user's mistake, or too little memory."""
    return not isinstance(error, RuntimeError) or is_out_of_memory(error)


def refuse_mixed_results(model_name: str, datasets: Sequence[ImageDataset], out: Path) -> None:
    """Raise a ValueError if rows of two data sets would come into one table, in this run or with earlier results."""
    fingerprints: dict[Path, str] = {}
    for dataset in datasets:
        folder = folder_of(model_name, dataset, out)
        if fingerprints.setdefault(folder, dataset.fingerprint) != dataset.fingerprint:
            raise ValueError(f"two data sets are called {dataset.name}: give each an --out of its own")
        lines = read_rows(folder / "rows.jsonl", warn=False)
        if any(line.get("data_fingerprint", dataset.fingerprint) != dataset.fingerprint for line in lines):
            raise ValueError(
                f"{folder} has results of other images that are called {dataset.name} too, or of these in another "
                "order: give another --out"
            )


def folder_of(model_name: str, dataset: ImageDataset, out: Path) -> Path:
    """Where the results of a table go."""
    return out / f"{model_name}-{dataset.name}"


def run_table(
    model_name: str, options: dict[str, Any], rows: Sequence[Row], dataset: ImageDataset, arguments: Arguments
) -> int:
    """Every row for every seed on one data set; then the table, the report and the pictures; return the exit code.

    Rows that fail, or that `--measure-again` finds nothing of, are left out, and so are those that start from them.
    """
    folder = folder_of(model_name, dataset, arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    logbook = Logbook(folder / "rows.jsonl", arguments.wandb)
    data = dataset.to(arguments.device)
    table: list[dict[str, Any]] = []
    code = 0
    try:
        for seed in arguments.seeds:
            runs: dict[str, Run] = {}
            for row in rows:
                parent = runs.get(row.parent) if row.parent else None
                if row.parent and parent is None:
                    continue  # its parent was left out, as has been printed
                run = Run(model_name, options, row, parent, seed, data, arguments, folder)
                line, failed = attempt(run, logbook)
                code = max(code, failed)
                if line is not None:
                    table.append(line)
                    runs[row.name] = run
        if distributed.rank() == 0 and table:
            report(table, logbook, folder)
    finally:
        logbook.finish()
        with suppress(OSError):
            folder.rmdir()  # if nothing has come of it
    return code


def attempt(run: Run, logbook: Logbook) -> tuple[dict[str, Any] | None, int]:
    """(the row's line, 0), or (None, exit code) if it failed, with a sentence printed: other rows can still be done."""
    name = f"{run.row.name}, seed {run.seed}"
    try:
        line = run.line(logbook)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        diverged = isinstance(error, NonFiniteLoss)
        # All processes diverge together; any other error may be that of one alone, for which the others would wait.
        others_know = diverged or distributed.world_size() == 1
        if os.environ.get("TERNARY_TRACEBACK") or not (is_expected(error) and others_know):
            raise
        print(f"{Path(sys.argv[0]).name}: {name}: {sentence(error)}", file=sys.stderr)
        return None, 2 if isinstance(error, (ValueError, OSError)) and not diverged else 1
    if line is None and distributed.rank() == 0:
        print(f"{name}: not done with these options, so not measured", file=sys.stderr)
    return line, 0


def report(table: list[dict[str, Any]], logbook: Logbook, folder: Path) -> None:
    """Print the table, write its pages and pictures, and close the logbook with them."""
    print_table(table)
    paths: list[Path] = []
    try:
        paths = write_report([*logbook.rows(), *table], folder)  # this table's lines come last, so they count
        say(f"report and pictures: {folder / 'report.html'}")
    except Exception as error:  # a full disk, a line written by hand: figures do not depend on pictures
        if os.environ.get("TERNARY_TRACEBACK"):
            raise
        say(f"the report could not be written ({sentence(error)})")
    logbook.close(table, paths)
