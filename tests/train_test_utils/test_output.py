"""Output that nobody reads, or that lacks characters, ends no work."""

from __future__ import annotations

import subprocess
import sys

import pytest

from train_test_utils.output import first_line

SCRIPT = """
import sys
from train_test_utils.output import prepare_output, say
prepare_output()
say("é " * 100_000)
say("more")
print("é " * 100_000, file=sys.stderr, flush=True)
open("done", "w").close()
"""


@pytest.mark.parametrize("redirection", [">&-", "2>&-", ">&- 2>&-", "2>&1 | true", ">/dev/full 2>&1"])
def test_what_nobody_reads(redirection, tmp_path):
    environment = {"PYTHONPATH": ":".join(path for path in sys.path if path), "PYTHONIOENCODING": "ascii"}
    shell = f"'{sys.executable}' -c '{SCRIPT}' {redirection}"
    done = subprocess.run(shell, shell=True, cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert (tmp_path / "done").exists() and b"Error" not in done.stderr


def test_the_first_line_of_an_error():
    assert first_line(ValueError("\nNo such thing.\nMore of it.")) == "No such thing"
    assert first_line(EOFError()) == "EOFError"
