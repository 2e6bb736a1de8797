"""Figures of a benchmark, with what one needs to repeat it: one JSON line in results/."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def append_record(name: str, figures: dict[str, Any], packages: tuple[str, ...] = ()) -> Path:
    """Append `figures` and their circumstances to results/<name>.jsonl; return that path.

    `packages`: whose versions matter too, if they are installed.
    """
    path = ROOT / "results" / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    line = {**figures, **circumstances(packages)}
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")
    return path


def circumstances(packages: tuple[str, ...] = ()) -> dict[str, Any]:
    """Commit, command, versions, device, time."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    versions = {name: _version(name) for name in ("torch", "numpy", "zstandard", "transformers", *packages)}
    return {
        "commit": commit or None, "command": " ".join(["python3", *_relative(sys.argv)]),
        "versions": {"python": platform.python_version(), **{name: v for name, v in versions.items() if v}},
        "device": _processor(),
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _relative(arguments: list[str]) -> list[str]:
    script = Path(arguments[0]).resolve()
    return [str(script.relative_to(ROOT)) if script.is_relative_to(ROOT) else script.name, *arguments[1:]]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0] if names else platform.machine()}, {len(names) or '?'} threads"
