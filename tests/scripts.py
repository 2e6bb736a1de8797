"""The three scripts, run in this process."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("alexnet", "resnet_18", "vit")


def start(monkeypatch, script: str, *words: str) -> int:
    """Run a script in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", [f"{script}_experiments.py", *words])
    try:
        runpy.run_path(str(ROOT / f"{script}_experiments.py"), run_name="__main__")
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0
