"""The record of a table: `rows.jsonl` first, Weights & Biases as a mirror that may fail without harm.

A row exists when its line is on the disk: one JSON object a line, only ever appended, flushed and synchronised before
anything else happens. Curves lie beside it, one line an epoch, in `<row>-seed<k>/curves.jsonl`.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantization_utils.file_format import replacing

from . import distributed
from .table import lines_of
from .wandb_mirror import Mirror


def read_rows(path: str | os.PathLike[str], warn: bool = True) -> list[dict[str, Any]]:
    """The rows in a file, oldest first; [] if there is no file.

    Lines that are no JSON object are skipped; with `warn` their numbers are printed.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            row = _parsed(line)
            if row is not None:
                rows.append(row)
            elif warn:
                print(f"{path}: line {number} is not a row and is left out", file=sys.stderr)
    return rows


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON line and force it to the disk; on an error (no space left) the file is as it was.

    If the file ends in an incomplete line, of a process that was killed, the record starts a line of its own after it.

    Raises:
        OSError: the line could not be written.
        ValueError: the record is not JSON (NaN and infinity are not).
    """
    line = json.dumps(record, allow_nan=False).encode() + b"\n"
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # two scripts may share a table
        before = os.fstat(descriptor).st_size
        if before and os.pread(descriptor, 1, before - 1) != b"\n":
            line = b"\n" + line
        try:
            if os.write(descriptor, line) != len(line):
                raise OSError(errno.ENOSPC, "no space left for a line", os.fspath(path))
            os.fsync(descriptor)
        except OSError as error:
            os.ftruncate(descriptor, before)
            error.filename = os.fspath(path)  # what is written to a descriptor has no name
            raise
    finally:
        os.close(descriptor)


def mend(path: Path) -> None:
    """Move a last line that a kill left incomplete to `<path>.torn`, so that the next record gets its own line."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EACCES, errno.EROFS):  # finished rows can be shown where none is added
            return
        raise
    with os.fdopen(descriptor, "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        content = file.read()
        kept, newline, tail = content.rpartition(b"\n")
        if not tail:
            return
        if _parsed(tail) is not None:  # complete, only its newline is missing
            file.write(b"\n")
        else:
            torn = path.with_name(path.name + ".torn")
            with open(torn, "ab") as aside:
                aside.write(tail + b"\n")
                aside.flush()
                os.fsync(aside.fileno())
            file.truncate(len(kept + newline))
            print(
                f"{path}: the last line was cut short (a kill?); its {len(tail)} bytes are now in {torn.name}",
                file=sys.stderr,
            )
        file.flush()
        os.fsync(file.fileno())


class Logbook:
    """`rows.jsonl` of one table, and its mirror. In a run of several processes only the first writes; all can read."""

    def __init__(self, path: str | os.PathLike[str], wandb_mode: str) -> None:
        """`wandb_mode`: "online" (goes offline by itself without a key or a network), "offline", "disabled"."""
        self.path = Path(path)
        self.folder = self.path.parent
        self._row_name = ""
        self._mirror: Mirror | None = None
        self._curves_continue = False
        if distributed.rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            mend(self.path)
            read_rows(self.path)  # says once what it leaves out
            self._mirror = Mirror(wandb_mode, self.folder)

    def rows(self) -> list[dict[str, Any]]:
        """Every row in the file, oldest first."""
        return read_rows(self.path, warn=False)

    def done(self, config_hash: str) -> dict[str, Any] | None:
        """The last row with this configuration, or None."""
        return next((row for row in reversed(self.rows()) if row.get("config_hash") == config_hash), None)

    def start_row(self, name: str, config: Mapping[str, Any], job_type: str = "train") -> None:
        """Begin the row whose files lie in `<folder>/<name>`; `config`: its full configuration."""
        self._row_name, self._curves_continue = name, False
        if self._mirror is not None:
            self._mirror.start(name, config, job_type)

    def epoch(self, record: Mapping[str, Any]) -> None:
        """One point of the row's curves: {"epoch", "train_loss", …}.

        The first one that this process writes removes from the file its own and all later epochs: they are done again.
        """
        if self._mirror is None:
            return
        path = self.folder / self._row_name / "curves.jsonl"
        if not self._curves_continue:
            self._curves_continue = True
            for earlier in _restart_curves(path, record):
                self._mirror.epoch(earlier)
        append_line(path, record)
        self._mirror.epoch(record)

    def resume_at_the_end(self) -> dict[str, Any] | None:
        """Mirror the curves of a row that was interrupted after its last epoch; return the last point, if any."""
        curves = read_curves(self.folder / self._row_name)
        for record in curves if self._mirror is not None else ():
            self._mirror.epoch(record)
        return curves[-1] if curves else None

    def row(self, row: Mapping[str, Any]) -> None:
        """Write a finished row, then mirror it."""
        if self._mirror is not None:
            append_line(self.path, row)
            self._mirror.end(row)

    def recall(self, row: Mapping[str, Any]) -> None:
        """Append a finished row again if it does not count any more: its recipe was edited, and then edited back."""
        counting = (shown.get("config_hash") for line in lines_of(self.rows()) for shown in line.rows)
        if self._mirror is not None and row.get("config_hash") not in counting:
            append_line(self.path, row)

    def close(self, table: Sequence[Mapping[str, Any]], files: Sequence[str | os.PathLike[str]] = ()) -> None:
        """Mirror the whole table with its report (`files`), the rows and the packed models, and print where it is."""
        if self._mirror is None:
            return
        packed = [
            self.folder / f"{row.get('row')}-seed{row.get('seed')}" / "model.safetensors"
            for row in table
            if row.get("weight_bits") != 32  # float models are large, and anybody can train them again
        ]
        self._mirror.close(table, [self.path, *map(Path, files)], packed)

    def finish(self) -> None:
        """End what is open (a row that failed or was interrupted is marked so). Call it last, whatever happened."""
        if self._mirror is not None:
            self._mirror.finish()


def read_curves(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The epochs in a row's `curves.jsonl`, in order; of an epoch that was repeated the last."""
    by_epoch = {record.get("epoch"): record for record in read_rows(Path(folder) / "curves.jsonl")}
    return [by_epoch[e] for e in sorted(e for e in by_epoch if isinstance(e, (int, float)))]


def _restart_curves(path: Path, first: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Drop from a row's curves the epochs that are about to be repeated; return those that stay."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mend(path)
    stay = [r for r in read_curves(path.parent) if r["epoch"] < first.get("epoch", 0)]
    with replacing(path) as file:
        file.write("".join(json.dumps(r) + "\n" for r in stay).encode())
    return stay


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:  # UnicodeDecodeError is one too
        return None
    return row if isinstance(row, dict) else None
