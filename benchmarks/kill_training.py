"""Kills a script at random moments, again and again, and compares what it ends in with an uninterrupted run.

    python3 benchmarks/kill_training.py [--kills 20] [--script resnet_18_experiments.py]

The rows are a float model, one quantized after training and one during it, on the handwritten digits. Weights must be
identical byte for byte, packed files and rows too, but for what measures time. Appends to
results/files/kill_training.jsonl.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.command_line import count, make_parser
from train_test_utils.record import append_record

ROWS = ("float", "ptq_all", "qat_all")
# Parts of names of fields that may differ:
TIMED = ("latency", "throughput", "seconds", "finished_at", "command", "commit")


def command(script: str, out: Path) -> list[str]:
    return [
        sys.executable, str(ROOT / script), "--quick", "--only", *ROWS, "--budget", "0.02", "--device", "cpu",
        "--wandb", "disabled", "--checkpoint-seconds", "0.5", "--out", str(out),
    ]  # fmt: skip


def outcome(out: Path) -> dict[str, object]:
    """Digests of the trained and the packed files, and the rows without what depends on the clock."""
    folder = next(out.iterdir())
    files = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.safetensors"))
    }
    lines = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    return {
        "files": files,
        "rows": [{k: v for k, v in line.items() if not any(t in k for t in TIMED)} for line in lines],
    }


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--kills", type=count, default=20)
    parser.add_argument("--script", default="resnet_18_experiments.py")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    randomness = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, broken = Path(folder) / "whole", Path(folder) / "broken"
        began = time.monotonic()
        first = subprocess.run(command(args.script, whole), check=False, capture_output=True, text=True)
        if first.returncode:
            parser.error(f"{args.script} failed: {first.stderr.strip().splitlines()[-1]}")
        seconds = time.monotonic() - began
        kills = starts = 0
        while True:
            starts += 1
            run = subprocess.Popen(
                command(args.script, broken), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
            )
            try:
                # Soon enough for many kills before the end, late enough to get on; after the last it may finish.
                _, errors = run.communicate(
                    timeout=randomness.uniform(2, 0.4 * seconds) if kills < args.kills else None
                )
            except subprocess.TimeoutExpired:
                os.killpg(run.pid, signal.SIGKILL)
                run.communicate()
                kills += 1
                continue
            if run.returncode:
                sys.exit(f"start {starts} failed: {errors.decode().strip().splitlines()[-1]}")
            break
        same = outcome(whole) == outcome(broken)
    print(
        f"{args.script}: killed {kills} times in {starts} starts; {'identical' if same else 'DIFFERENT'} weights and "
        "rows"
    )
    append_record(
        "files/kill_training",
        {"script": args.script, "kills": kills, "starts": starts, "identical": same, "seed": args.seed},
    )
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
