"""The folder of a row's results: it belongs to one configuration, and to one process at a time."""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quantization_utils.file_format import replacing

from . import distributed

MARK = "config_hash"


def claim(folder: Path, config_hash: str) -> None:
    """Make the folder this configuration's. Results of another one in it are moved aside, and this one's come back.

    They are moved to, and from, a folder beside it whose name ends in the configuration's hash. `folder` is made where
    it is missing.

    Raises:
        ValueError: another process is at work there.
    """
    if distributed.rank() == 0:
        owner = owner_of(folder) or config_hash
        if owner != config_hash:
            aside = _aside(folder, owner)
            aside = aside.with_name(f"{aside.name}.{time.time_ns()}") if aside.exists() else aside
            with locked(folder):
                folder.rename(aside)
            print(f"{folder} had results of another configuration: they are in {aside.name} now", file=sys.stderr)
        if not folder.exists() and _aside(folder, config_hash).exists():
            _aside(folder, config_hash).rename(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if owner_of(folder) is None:  # else nothing is written: finished rows can be shown from a read-only disk
            with replacing(folder / MARK) as file:
                file.write(f"{config_hash}\n".encode())
    distributed.barrier()


@contextmanager
def locked(folder: Path, shared: bool = False) -> Iterator[None]:
    """Keep other processes from training in the folder, or moving it, during the block; a killed process frees it, too.

    `shared`: others may do the same, but none may write there.

    Raises:
        ValueError: another one is at work there.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is at work in {folder}: let it finish, or give another --out") from None
        yield
    finally:
        os.close(handle)


def owner_of(folder: Path) -> str | None:
    """The hash of the configuration that the folder belongs to; None if there is none yet, or its mark is damaged."""
    mark = folder / MARK
    return (mark.read_text().strip() or None) if mark.exists() else None


def place_of(folder: Path, config_hash: str | None) -> Path:
    """Where the results of a configuration are: in the folder, or moved aside; for an unknown one (None) the folder."""
    return folder if config_hash in (None, owner_of(folder)) else _aside(folder, config_hash)


def _aside(folder: Path, config_hash: str) -> Path:
    return folder.with_name(f"{folder.name}.{config_hash}")
