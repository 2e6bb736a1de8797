"""What is printed: it may be lost, and the work goes on; and of an error, the first line."""

from __future__ import annotations

import os
import sys


def prepare_output() -> None:
    """Let output that is closed swallow what is printed, and put "?" for the characters that it lacks."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")


def first_line(error: BaseException) -> str:
    """Of its message, without a full stop; its type if it has none (EOFError of an empty file)."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def say(text: str) -> None:
    """Print a line, and go on if whoever read has gone."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
