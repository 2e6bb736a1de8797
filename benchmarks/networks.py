"""What each node of a packed network costs, and what removed filters give back.

    python3 benchmarks/networks.py layers     each node: time within the network, algorithm, percent of the limit
    python3 benchmarks/networks.py pruned     networks whose filters were pruned and are gone, beside the full one

The direct limit of a node is its multiply-adds at the measured rate of the processor, or its 2-bit weights at the
measured reading rate, whichever is longer; Winograd needs 2.25 (stride 2: 1.44) times fewer multiply-adds and may pass
it. Writes results/latency/layers.jsonl and results/latency/pruned.jsonl anew.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import nn

import models
from benchmarks.limits import Limits, machine_limits
from benchmarks.record import ROOT, append_record
from pruning_utils import l2_filters, prune_
from quantization_utils import calibrate_, pack_, quantize_

FRACTIONS = (0.0, 0.3, 0.5, 0.7, 0.9)


def packed(name: str, removed: float = 0.0, act_bits: int = 6) -> nn.Module:
    """Untrained: the time does not depend on what the weights are."""
    torch.manual_seed(0)
    model = models.build(name, 10).eval()
    if removed:
        prune_(model, l2_filters, removed, only=nn.Conv2d)
    return pack_(calibrate_(quantize_(model, act_bits=act_bits), torch.rand(16, 3, 32, 32)))


def layers(batch: int, limits: Limits) -> None:
    for name in ("resnet_18", "alexnet"):
        model = packed(name)
        images = torch.rand(batch, 3, 32, 32)
        model(images)
        rows = model.executor.plan(batch)
        print(f"\n{name}, batch {batch}")
        for row, node in zip(rows, model.nodes, strict=True):
            micros = row["winograd_us" if row["algorithm"] == "winograd" else "direct_us"]
            weight_bytes = 0 if node.codes is None else node.codes.numel() / 4
            limit = 1e6 * max(
                row["multiply_adds"] / limits["peak_multiply_adds_per_s"],
                weight_bytes / limits["read_13MiB_bytes_per_s"],
            )
            shape = None if node.codes is None else list(node.codes.shape)
            row |= {"shape": shape, "stride": node.stride[0], "us": micros,
                    "of_direct_limit_pct": round(100 * limit / micros, 1) if limit else None}  # fmt: skip
            print(f"  {row['node']:2} {row['op']:8} {shape!s:20} /{row['stride']} {row['algorithm']:8} {micros:9.1f} µs"
                  f" (direct {row['direct_us'] or 0:9.1f}) {row['of_direct_limit_pct'] or 0:6.1f}% of the limit")
        append_record("latency/layers", {"model": name, "batch": batch, "nodes": rows, **limits})


def pruned(batch: int, limits: Limits, rounds: int = 15) -> None:
    for name in ("resnet_18", "alexnet"):
        networks = {fraction: packed(name, fraction) for fraction in FRACTIONS}
        images = torch.rand(batch, 3, 32, 32)
        times: dict[float, list[float]] = {fraction: [] for fraction in FRACTIONS}
        for round_index in range(rounds + 1):
            for fraction, network in networks.items():
                runs = []
                for _ in range(12 if batch == 1 else 3):
                    start = time.perf_counter()
                    network(images)
                    runs.append((time.perf_counter() - start) * 1e3)
                if round_index:
                    times[fraction].append(float(np.median(runs)))
        print(f"\n{name}, batch {batch}")
        for fraction, network in networks.items():
            ratios = np.array(times[0.0]) / np.array(times[fraction])
            work = [sum(row["multiply_adds"] for row in n.executor.plan(batch)) for n in (networks[0.0], network)]
            figures: dict[str, Any] = {
                "model": name, "batch": batch, "filters_removed": fraction,
                "p50_ms": round(float(np.median(times[fraction])), 4),
                "times_faster": round(float(np.median(ratios)), 2),
                "times_fewer_multiply_adds": round(work[0] / work[1], 2),
            }  # fmt: skip
            print(f"  {100 * fraction:3.0f}% of the filters removed  {figures['p50_ms']:8.3f} ms"
                  f"  {figures['times_faster']:6.2f}× faster"
                  f"  {figures['times_fewer_multiply_adds']:6.2f}× fewer multiply-adds")  # fmt: skip
            append_record("latency/pruned", {**figures, **limits})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["layers", "pruned"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    args = parser.parse_args()
    limits = machine_limits()
    (ROOT / "results" / "latency" / f"{args.what}.jsonl").unlink(missing_ok=True)
    for batch in args.batches:
        {"layers": layers, "pruned": pruned}[args.what](batch, limits)


if __name__ == "__main__":
    main()
