"""The kernels' portable path on another processor, under emulation: the same bytes as here?

    apt install g++-aarch64-linux-gnu qemu-user
    python3 benchmarks/other_processors.py

Compiles the kernels, without PyTorch, with other_processors.cpp for this processor and for 64-bit ARM, runs both, and
compares a hash of what each case computes; takes no options. Writes results/files/other_processors.jsonl anew.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.command_line import make_parser
from quantization_utils.kernels.build import FLAGS, SOURCES
from train_test_utils.record import ROOT, append_record

TARGETS = {"x86_64": ("g++", []), "aarch64": ("aarch64-linux-gnu-g++", ["qemu-aarch64"])}  # compiler, what runs it


def hashes(compiler: str, runner: list[str], folder: Path) -> list[str]:
    """A line for each case, as the program prints them."""
    program = folder / compiler
    sources = [*(p for p in sorted(SOURCES.glob("*.cpp")) if p.name != "bindings.cpp"),
               Path(__file__).with_suffix(".cpp")]  # fmt: skip
    subprocess.run([compiler, *FLAGS, "-static", f"-I{SOURCES}", *map(str, sources), "-o", str(program)], check=True)
    return subprocess.run([*runner, str(program)], check=True, capture_output=True, text=True).stdout.splitlines()


def main() -> None:
    make_parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        here, there = (hashes(compiler, runner, Path(folder)) for compiler, runner in TARGETS.values())
    (ROOT / "results" / "files" / "other_processors.jsonl").unlink(missing_ok=True)
    for kind in ("network", "linear", "encoder", "vit"):
        pairs = [pair for pair in zip(here, there, strict=True) if pair[0].startswith(kind)]
        same = sum(one == other for one, other in pairs)
        print(f"{kind}: {same} of {len(pairs)} cases give the same bytes")
        append_record("files/other_processors", {"processor": "aarch64, emulated", "kernels": "portable", "of": kind,
                                                 "cases": len(pairs), "the_same_bytes": same})  # fmt: skip


if __name__ == "__main__":
    main()
