"""One row with one seed: build, transform, train, pack, save, reload, measure, log."""

from __future__ import annotations

import copy
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models import build
from quantization_utils import pack_
from quantization_utils.file_format import ModelFileError, read_file
from quantization_utils.storage import load_model, save_model

from . import distributed
from .checkpoint import load_weights, save_weights
from .cli import Arguments
from .dataset import ImageDataset
from .evaluate import accuracy_pct, agreement_pct, predict
from .logbook import Logbook
from .measure import code_zero_fraction, count_macs, ideal_bytes, latency_beside, weight_bits
from .output import say
from .recipe import Recipe
from .record import commit, device_name, versions
from .row_folder import claim, locked, owner_of
from .rows import Row, calibration_images, config_hash, describe, folder_hashes, is_named, pruned_text, transformed
from .train import Setup, train

WORTH_COMPILING = 500  # steps of a training: compilation takes a minute
LIBRARIES = ("torch", "transformers", "numpy")  # that figures depend on


class Run:
    """One row with one seed."""

    def __init__(
        self, model_name: str, options: dict[str, Any], row: Row, parent: Run | None, seed: int,
        data: ImageDataset, arguments: Arguments, folder: Path,
    ) -> None:  # fmt: skip
        self.model_name, self.options, self.row, self.parent = model_name, options, row, parent
        self.seed, self.data, self.arguments = seed, data, arguments
        self.config = {
            "model": model_name, "options": options, "dataset": data.name, "data_fingerprint": data.fingerprint,
            "row": describe(row), "seed": seed, "budget": arguments.budget, "precision": str(arguments.precision),
            "parent": parent.hash if parent else None,
        }  # fmt: skip
        if folders := folder_hashes(options):  # a checkpoint that was written anew under its name makes another row
            self.config["folders"] = folders
        if distributed.world_size() > 1:  # each has random numbers of its own
            self.config["processes"] = distributed.world_size()
        self.hash = config_hash(self.config)
        alike = {k: v for k, v in self.config.items() if k != "seed"} | {"parent": parent.line_hash if parent else None}
        self.line_hash = config_hash(alike)  # the same for all seeds
        self.folder = folder / f"{row.name}-seed{seed}"
        self.file = self.folder / "model.safetensors"
        self.checkpoint = self.folder / "checkpoint.safetensors"

    def line(self, logbook: Logbook) -> dict[str, Any] | None:
        """Do what of the row is still to be done, and return its line.

        None if it has not been trained and `--measure-again` asks for rows that have.
        """
        line = self.recall(logbook)
        if line is None:
            return None if self.arguments.measure_again else self.execute(logbook)
        again = self.arguments.measure_again if is_named(self.row, self.arguments.only) else None
        if distributed.first_decides(lambda: self.is_damaged(line)) or again == "everything":
            return self.measure_again(logbook, line)
        return self.time_again(logbook, line) if again == "latency" else line

    def recall(self, logbook: Logbook) -> dict[str, Any] | None:
        """The row's line if it has been done with this very configuration and its weights are still there, else None.

        Where another configuration has taken the row's folder since, its results are moved aside and those of this one
        come back (`claim`), and so does its line in the table.
        """
        if not distributed.first_decides(lambda: logbook.done(self.hash) is not None):
            return None
        claim(self.folder, self.hash)
        if not distributed.first_decides(self.checkpoint.exists):
            return None
        line = (logbook.done(self.hash) or {}) | {"line_hash": self.line_hash}  # older lines have none
        if distributed.rank() == 0:
            with suppress(OSError):  # finished rows can be shown from a read-only disk
                (self.folder / "last.pt").unlink(missing_ok=True)  # left by a kill just after the row was recorded
            logbook.recall(line)
            say(f"{self.row.name}, seed {self.seed}: done before ({line['test_accuracy_pct']:.2f}%)")
        return line

    def is_damaged(self, line: dict[str, Any]) -> bool:
        """Whether the packed file of a finished row is gone, damaged or names other classes; prints which."""
        why = "is gone or damaged"
        with suppress(OSError, ModelFileError):
            own, _ = read_file(self.file)  # which checks it against its hash
            if self.file.stat().st_size == line["file_bytes"]:
                if json.loads(own["metadata"]).get("classes") == list(self.data.class_names):
                    return False
                why = "has other names of classes"
        print(f"{self.file} {why}: the row is packed and measured again", file=sys.stderr)
        return True

    def execute(self, logbook: Logbook) -> dict[str, Any]:
        """Do the row and append its line to the logbook."""
        if distributed.rank() == 0:
            say(f"{self.row.name}, seed {self.seed}: started")
        with self._ancestors_kept():
            model = self.start()
            began = time.monotonic()
            model = self.transformed(model)  # before claim: options that make no model must not move results aside
            transform_seconds = round(time.monotonic() - began, 3)
            claim(self.folder, self.hash)
            with self._alone():
                done = self.recall(logbook)  # another process may have done it while this one transformed the model
                return done or self._train_and_record(logbook, model, transform_seconds)

    @contextmanager
    def _ancestors_kept(self) -> Iterator[None]:
        """Keep other processes from replacing the results that this row starts from and is compared with."""
        with ExitStack() as stack:
            ancestor = self.parent
            while ancestor is not None and distributed.rank() == 0:
                stack.enter_context(locked(ancestor.folder, shared=True))
                ancestor._refuse_taken()
                ancestor = ancestor.parent
            yield

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes out of the row's folder, which has to be this row's still."""
        if distributed.rank() > 0:
            yield
            return
        with locked(self.folder):
            self._refuse_taken()
            yield

    def _refuse_taken(self) -> None:
        if owner_of(self.folder) != self.hash:
            raise ValueError(f"{self.folder} was taken by another process with other options: start again")

    def _train_and_record(self, logbook: Logbook, model: nn.Module, transform_seconds: float) -> dict[str, Any]:
        logbook.start_row(self.folder.name, self.config, "train" if self.row.recipe else "post-training")
        train_seconds = self._train(logbook, model, self.row.recipe) if self.row.recipe else 0.0
        if distributed.rank() == 0:
            save_weights(model, self.checkpoint, self.hash)
        return self._record(logbook, model, {"train_seconds": train_seconds, "transform_seconds": transform_seconds})

    def _train(self, logbook: Logbook, model: nn.Module, recipe: Recipe) -> float | None:
        """Train the model in place; return how many seconds that took, those before an interruption included.

        None if the training had ended before an interruption, and its last epoch is in no file.
        """
        args = self.arguments
        compiled = args.compile and recipe.steps(len(self.data.train), args.budget) >= WORTH_COMPILING
        setup = Setup(args.device, args.precision, compiled, args.checkpoint_seconds)
        teacher = self.parent.trained() if self.parent and recipe.distill else None
        seconds: float | None = None

        def on_epoch(record: dict[str, Any]) -> None:
            nonlocal seconds
            seconds = record["train_seconds"]
            logbook.epoch(record)

        train(
            model, self.data, recipe, setup, seed=self.seed, budget=args.budget, teacher=teacher,
            state_path=self.folder / "last.pt", title=f"{self.row.name} seed {self.seed}", on_epoch=on_epoch,
        )  # fmt: skip
        if seconds is None:  # all epochs were done before an interruption; only the row's line was missing
            seconds = (logbook.resume_at_the_end() or {}).get("train_seconds")
        return seconds

    def measure_again(self, logbook: Logbook, line: dict[str, Any]) -> dict[str, Any]:
        """A new line for a row that is done, without training; it counts in place of the former one.

        Its `device`, `commit` and `versions` are those of this measurement, and with `trained_` before them of the
        training.
        """
        with self._ancestors_kept(), self._alone():
            logbook.start_row(self.folder.name, self.config, "measure-again")
            kept = {field: line.get(field) for field in ("train_seconds", "transform_seconds")}
            for field in ("device", "commit", "versions"):
                kept[f"trained_{field}"] = line.get(f"trained_{field}", line.get(field))
            return self._record(logbook, self.trained(), kept)

    def time_again(self, logbook: Logbook, line: dict[str, Any]) -> dict[str, Any]:
        """As `measure_again`, for latency and throughput alone, which takes seconds: the other figures stay."""
        with self._ancestors_kept(), self._alone():
            logbook.start_row(self.folder.name, self.config, "measure-again")
            if distributed.rank() == 0:
                now = {"latency_commit": commit(), "latency_versions": versions(*LIBRARIES)}
                logbook.row(line | self.timed(load_model(self.file)[0]) | now)
            distributed.barrier()
            return logbook.done(self.hash) or {}

    def _record(self, logbook: Logbook, model: nn.Module, more: dict[str, Any]) -> dict[str, Any]:
        """Measure the model, append the figures and `more` to the logbook as the row's line, and return it."""
        if distributed.rank() == 0:
            line = self.measured(model) | more
            logbook.row(line)
            say(f"{self.row.name}, seed {self.seed}: {line['test_accuracy_pct']:.2f}%")
            (self.folder / "last.pt").unlink(missing_ok=True)
        distributed.barrier()
        return logbook.done(self.hash) or {}

    def start(self) -> nn.Module:
        """The parent's trained model, or a fresh one."""
        if self.parent is not None:
            return self.parent.trained()
        torch.manual_seed(self.seed)
        return build(self.model_name, len(self.data.class_names), **self.options)

    def transformed(self, model: nn.Module, structure_only: bool = False) -> nn.Module:
        return transformed(self.row, model, self.data.train.images, self.seed, structure_only)

    def trained(self) -> nn.Module:
        """This row's model as it was trained (its structure rebuilt, its weights from the checkpoint)."""
        model = self.transformed(self.start(), structure_only=True)
        load_weights(model, self.checkpoint, self.hash)
        return model.eval()

    def measured(self, model: nn.Module) -> dict[str, Any]:
        """The row's line. Its figures are taken from the file, which is saved and loaded again.

        Only the zero fraction is the trained model's: the file no longer has the channels that pruning has silenced.
        """
        args, test, path = self.arguments, self.data.test, self.file
        trainable_logits = predict(model.to(args.device), test.images)
        packed = pack_(copy.deepcopy(model).cpu())
        metadata = {
            "classes": list(self.data.class_names), "trained": self.config, "commit": commit(),
            "accuracy_of_trainable_pct": accuracy_pct(trainable_logits, test.labels),
        }  # fmt: skip
        save_model(packed, path, metadata, calibration_images(self.data.train.images, self.seed).cpu())
        packed, _ = load_model(path)
        logits = predict(packed if args.device.type == "cpu" else load_model(path, str(args.device))[0], test.images)
        stored, _ = load_model(path, str(args.device), backend="reference")
        agreement, in_float64 = agreement_pct(model, stored, test.images, trainable_logits, logits)
        return {
            "model": self.model_name, "dataset": self.data.name, "row": self.row.name, "seed": self.seed,
            "options": self.options, "parent": self.row.parent,
            "epochs": self.row.recipe.epochs if self.row.recipe else 0, "pruned": pruned_text(self.row),
            "transforms": [str(t) for t in self.row.transforms],
            "test_accuracy_pct": round(accuracy_pct(logits, test.labels), 3), "test_images": len(test),
            "reload_agreement_pct": round(agreement, 3), "reload_agreement_float64_pct": round(in_float64, 3),
            "file_bytes": os.path.getsize(path), "float_file_bytes": os.path.getsize(self.origin.file),
            "ideal_bytes": ideal_bytes(packed), "zero_fraction": round(code_zero_fraction(model), 5),
            "weight_bits": weight_bits(packed), "macs": count_macs(packed),
            **self.timed(packed), "device": device_name(args.device), "budget": args.budget,
            "precision": str(args.precision).removeprefix("torch."),
            "config_hash": self.hash, "line_hash": self.line_hash, "data_fingerprint": self.data.fingerprint,
            "command": f"{distributed.launcher()} {shlex.join(sys.argv)}", "commit": commit(),
            "versions": versions(*LIBRARIES),
            "finished_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }  # fmt: skip

    def timed(self, packed: nn.Module) -> dict[str, Any]:
        """Latency fields of the row's line: on the CPU, where the integer kernels run, beside the float model's."""
        floating, _ = load_model(self.origin.file)
        return {
            **latency_beside(floating, packed, seconds=1.0 if self.arguments.quick else 6.0),
            "latency_device": device_name(torch.device("cpu")), "threads": torch.get_num_threads(),
            "backend": backend_of(packed),
        }  # fmt: skip

    @property
    def origin(self) -> Run:
        """The row of the float model that this one descends from."""
        return self if self.parent is None else self.parent.origin


def backend_of(model: nn.Module) -> str:
    """Which kernels run a loaded model: of its packed network, or of its packed layers; "torch" if it has none."""
    if hasattr(model, "executor"):
        return model.executor.backend
    runners = {m._runner.backend for m in model.modules() if hasattr(getattr(m, "_runner", None), "backend")}
    runners |= {m.encoder.backend for m in model.modules() if getattr(getattr(m, "encoder", None), "backend", None)}
    return "+".join(sorted(runners)) or "torch"
