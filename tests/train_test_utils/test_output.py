"""Output that nobody reads, or that lacks characters, ends no work."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
from train_test_utils.output import prepare_output, say
prepare_output()
say("é " * 100_000)
say("more")
open("done", "w").close()
"""


@pytest.mark.parametrize("redirection", [">&-", "2>&-", ">&- 2>&-", "| true"])
def test_what_nobody_reads(redirection, tmp_path):
    environment = {"PYTHONPATH": ":".join(path for path in sys.path if path), "PYTHONIOENCODING": "ascii"}
    shell = f"'{sys.executable}' -c '{SCRIPT}' {redirection}"
    done = subprocess.run(shell, shell=True, cwd=tmp_path, env=environment, check=True, stderr=subprocess.PIPE)
    assert (tmp_path / "done").exists() and done.stderr == b""
