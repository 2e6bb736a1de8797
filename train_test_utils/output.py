"""Printing that never ends a run when the output is closed or full, and the first line of an error."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any


class Losable:
    """A stream that drops what can't be written any more because its reader has gone or the disk is full."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError:
            self._lose()
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            self._lose()

    def _lose(self) -> None:
        with suppress(OSError, ValueError):  # a stream in memory has no descriptor
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def prepare_output() -> None:
    """Make standard output and error `Losable`, and print "?" for characters that the output's encoding lacks."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w")  # noqa: SIM115
        if not isinstance(stream, Losable):
            setattr(sys, name, Losable(stream))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without a full stop; its type if there is no message, as with EOFError."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)
