"""Not a script; what the command lines of benchmarks have in common: a mistake is one sentence."""

from __future__ import annotations

import argparse

from train_test_utils.cli import Parser


def make_parser(description: str | None) -> Parser:
    """Its help is the script's docstring, as it stands."""
    return Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def count(text: str) -> int:
    """A whole number from 1 on.

    Raises:
        argparse.ArgumentTypeError: it is another.
    """
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"a whole number from 1 on, not {text!r}")
    return int(text)
