"""What figures depend on besides their configuration: commit, versions, device. Records of benchmarks in results/."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import time
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .logbook import append_line, mend

ROOT = Path(__file__).resolve().parent.parent


@cache
def commit() -> str:
    """The commit of this working copy, with "+changes" if tracked files differ from it; empty outside a checkout.

    Changes in results/ do not count: no figure depends on them. Taken at the first call and kept, since a process goes
    on with the code that it has loaded, whatever is checked out later.
    """

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    if not (ROOT / ".git").exists():  # what is unpacked inside of another repository is not of its commit
        return ""
    try:
        changes = git("status", "--porcelain", "-uno", "--", ".", ":(exclude)results")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changes else "")
    except OSError:  # no git on this machine, or none that can run
        return ""


def versions(*packages: str) -> dict[str, str]:
    """Versions by name: of Python, and of those of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def device_name(device: torch.device) -> str:
    """The device's name as the GPU's driver or /proc/cpuinfo has it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine() or "cpu"


def append_record(name: str, figures: dict[str, Any], packages: tuple[str, ...] = ()) -> Path:
    """Append the figures of the script that runs, with their circumstances, to results/<name>.jsonl; return that path.

    `packages`: whose versions matter too, if they are installed.

    Raises:
        OSError: the line could not be written.
        ValueError: a figure is not JSON (NaN and infinity are not).
    """
    path = ROOT / "results" / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    line = figures | {
        "commit": commit() or None, "command": "python3 " + shlex.join(_relative(sys.argv)),
        "versions": versions("torch", "numpy", "zstandard", "transformers", *packages),
        "device": f"{device_name(torch.device('cpu'))}, {os.cpu_count()} threads",
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip
    mend(path)
    append_line(path, line)
    return path


def _relative(arguments: list[str]) -> list[str]:
    script = Path(arguments[0]).resolve()
    return [str(script.relative_to(ROOT)) if script.is_relative_to(ROOT) else script.name, *arguments[1:]]
