"""What each node of a packed network costs, and what removed filters and zero blocks give back.

    python3 benchmarks/networks.py layers     each node: time within the network, algorithm, percent of the limit
    python3 benchmarks/networks.py pruned     networks whose filters were pruned and are gone, beside the full one
    python3 benchmarks/networks.py zero_blocks     networks whose single weights were pruned: what skipping saves
    python3 benchmarks/networks.py overhead   a whole call beside that of its one operator: what Python and PyTorch add
    python3 benchmarks/networks.py pauses     calls after pauses in which threads go to sleep, on all threads and on one

The direct limit of a node is the time of its multiply-adds at the measured rate of the processor, or that of reading
its 2-bit weights at the measured rate, whichever is longer. Winograd's algorithm takes the time of 2.25 times fewer
multiply-adds (stride 2: 1.44; 8-bit activations: 2), so it can pass the limit. The time of a node is the second
smallest of nine runs of the network, near the best that the machine can do; latency_vs_peers.py takes medians. Appends
to results/latency/<the table's name>.jsonl; of lines that measure the same the tables show the last.

zero_blocks: a block is one input of as many output channels as a vector register has lanes, the least that a kernel can
skip. Of each network, and for each way of pruning, the convolution and the linear layer with the most zero blocks are
measured. Weights are those of the networks in runs/ where there are any, else untrained. In the last layers zero blocks
of 16 inputs are made on purpose.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor, nn

import models
from benchmarks.command_line import count, make_parser
from benchmarks.kernels import stem
from benchmarks.limits import Limits, machine_limits
from models.select import select_layers
from pruning_utils import l1, l1_global, l2_filters, prune_, random
from quantization_utils import calibrate_, pack_, quantize_
from quantization_utils.kernels import cpu
from quantization_utils.nodes import Node
from quantization_utils.quantizers import absmean
from train_test_utils.checkpoint import load_weights
from train_test_utils.record import ROOT, append_record

FRACTIONS = (0.0, 0.3, 0.5, 0.7, 0.9)
LANES = {"amx": 16, "avx512vnni": 16, "avx2": 8, "portable": 4}
WORTH_MEASURING = 0.125  # as the kernels do: with fewer zero blocks they do not try to skip


def untrained(name: str) -> nn.Module:
    torch.manual_seed(0)
    return models.build(name, 10).eval()


def packed(name: str, removed: float = 0.0, act_bits: int = 6) -> nn.Module:
    """A packed network with untrained weights: the time does not depend on them. `removed`: fraction of the filters."""
    model = untrained(name)
    if removed:
        prune_(model, l2_filters, removed, only=nn.Conv2d)
    act_bits = 8 if name == "vit" else act_bits
    return pack_(calibrate_(quantize_(model, act_bits=act_bits), torch.rand(16, 3, 32, 32)))


def milliseconds(run: Callable[[Tensor], Any], images: Tensor) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    run(images)
    return (time.perf_counter() - start) * 1e3


def layers(batch: int, limits: Limits) -> None:
    for name, act_bits in product(("resnet_18", "alexnet"), (6, 8)):
        model = packed(name, act_bits=act_bits)
        images = torch.rand(batch, 3, 32, 32)
        model(images)
        rows = model.executor.plan(batch)
        print(f"\n{name}, {act_bits}-bit activations, batch {batch}")
        for row, node in zip(rows, model.nodes, strict=True):
            micros = row["direct_us" if row["algorithm"] == "pool" else f"{row['algorithm']}_us"]
            weight_bytes = 0 if node.codes is None else node.codes.numel() / 4
            limit = 1e6 * max(
                row["multiply_adds"] / limits["peak_multiply_adds_per_s"],
                weight_bytes / limits["read_13MiB_bytes_per_s"],
            )
            shape = None if node.codes is None else list(node.codes.shape)
            row |= {"shape": shape, "stride": node.stride[0], "us": micros,
                    "of_direct_limit_pct": round(100 * limit / micros, 1) if limit else None}  # fmt: skip
            print(
                f"  {row['node']:2} {row['op']:8} {shape!s:20} /{row['stride']} {row['algorithm']:8} {micros:9.1f} µs"
                f" (direct {row['direct_us'] or 0:9.1f}) {row['of_direct_limit_pct'] or 0:6.1f}% of the limit"
            )
        append_record("latency/layers", {"model": name, "act_bits": act_bits, "batch": batch, "nodes": rows, **limits})


def pruned(batch: int, limits: Limits) -> None:
    for name in ("resnet_18", "alexnet"):
        networks = {fraction: packed(name, fraction) for fraction in FRACTIONS}
        images = torch.rand(batch, 3, 32, 32)
        times: dict[float, list[float]] = {fraction: [] for fraction in FRACTIONS}
        for round_index in range(16):
            for fraction, network in networks.items():
                runs = [milliseconds(network, images) for _ in range(12 if batch == 1 else 3)]
                if round_index:  # the first round warms up
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


@torch.no_grad()
def overhead(batch: int, limits: Limits) -> None:
    for name in ("resnet_18", "alexnet", "vit"):
        model, images = packed(name), torch.rand(batch, 3, 32, 32)
        operator = model.encoder.classify if name == "vit" else model.executor
        pairs = [
            (1e3 * milliseconds(operator, images), 1e3 * milliseconds(model, images))
            for _ in range(200 if batch == 1 else 40)
        ][10:]  # the first ten warm up
        operator_us, whole_us = (median(micros) for micros in zip(*pairs, strict=True))
        outside_us = median(whole - operator for operator, whole in pairs)
        figures = {
            "model": name, "batch": batch, "whole_us": round(whole_us, 1), "operator_us": round(operator_us, 1),
            "outside_us": round(outside_us, 1), "outside_pct": round(100 * outside_us / whole_us, 1),
        }  # fmt: skip
        print(*(f"{key} {value}" for key, value in figures.items()))
        append_record("latency/overhead", {**figures, **limits})


@torch.no_grad()
def pauses(batch: int, limits: Limits) -> None:
    all_threads = torch.get_num_threads()
    for name in ("resnet_18", "alexnet", "vit"):
        model, images = packed(name), torch.rand(batch, 3, 32, 32)
        for threads, pause_ms in product((all_threads, 1), (0, 1, 5, 30)):
            torch.set_num_threads(threads)
            model(images)
            times = []
            for _ in range(100):
                time.sleep(pause_ms / 1e3)
                times.append(milliseconds(model, images))
            figures = {
                "model": name, "batch": batch, "threads_of_call": threads, "pause_ms": pause_ms,
                "p50_ms": round(median(times), 3), "p90_ms": round(float(np.quantile(times, 0.9)), 3),
            }  # fmt: skip
            print(*(f"{key} {value}" for key, value in figures.items()), flush=True)
            append_record("latency/pauses", {**figures, **limits})
        torch.set_num_threads(all_threads)


def zero_share(codes: Tensor) -> float:
    """The fraction of zero blocks in codes (N, K) or (N, C, kh, kw)."""
    lanes = LANES[cpu.choose_isa("cpu")]
    used_NK = nn.functional.pad(codes.flatten(1).ne(0), (0, 0, 0, -len(codes) % lanes))
    return 1 - used_NK.view(-1, lanes, used_NK.shape[1]).any(1).float().mean().item()


def pruned_layers(name: str) -> Iterator[tuple[dict[str, Any], Tensor, int]]:
    """For each score and amount, the linear layer and the convolution with most zero blocks: (figures, codes, side).

    `side`: of the layer's input, in pixels.
    """
    model = untrained(name)
    checkpoint = ROOT / "runs" / f"{name}-cifar10" / "float-seed0" / "checkpoint.safetensors"
    weights = "trained" if checkpoint.exists() else "untrained"
    if checkpoint.exists():
        load_weights(model, checkpoint)
    sides: dict[str, int] = {}
    for layer_name, layer in select_layers(model, None):
        layer.register_forward_hook(lambda _, x, __, key=layer_name: sides.update({key: x[0].shape[-1]}))
    with torch.no_grad():
        model(torch.rand(1, 3, 32, 32))
    for score in (random, l1, l1_global):
        for amount in (0.3, 0.5, 0.7, 0.9, 0.95):
            pruned_model = prune_(copy.deepcopy(model), score, amount)
            ternary = [(key, absmean(la.weight.detach())[0]) for key, la in select_layers(pruned_model, None)]
            for dim, kind in ((2, "linear"), (4, "conv")):
                of_kind = [t for t in ternary if t[1].dim() == dim]
                key, codes = max(of_kind, key=lambda t: (zero_share(t[1]) * t[1].numel(), t[1].numel()))
                figures = {"model": name, "weights": weights, "score": score.__name__, "pruned": amount, "op": kind}
                yield figures, codes, sides[key] if dim == 4 else 1


def made_layers() -> Iterator[tuple[dict[str, Any], Tensor, int]]:
    """As `pruned_layers`: AlexNet's first linear layer with several shares of zero blocks of 16 inputs and outputs."""
    for share in (0.25, 0.5, 0.75, 0.9):
        torch.manual_seed(0)
        block = torch.rand(4096 // 16, 9216 // 16).ge(share).to(torch.int8)
        codes = torch.randint(0, 2, (4096, 9216), dtype=torch.int8) * 2 - 1
        codes *= block.repeat_interleave(16, 0).repeat_interleave(16, 1)
        yield {"model": "zero blocks of 16×16", "weights": "made", "op": "linear"}, codes, 1


def tried_micros(node: Node, images: int, side: int) -> dict[str, float]:
    """Microseconds of a node by each algorithm that the kernels tried for so many images of `side` pixels a side."""
    executor = cpu.NetworkExecutor([stem(node.codes.shape[1]), node])
    executor(torch.rand(images, 1, side, side))
    plan = executor.plan(images, side, side)[1]
    return {key: plan[key] for key in ("direct_us", "winograd_us", "skipping_us") if plan[key]}


def micros_by_algorithm(codes: Tensor, side: int, batches: list[int]) -> dict[int, dict[str, float]]:
    """For each batch, microseconds of the layer by each algorithm: medians of three measurements.

    The kernels do not skip zero blocks in convolutions. What that would take at least is measured as the linear layer
    of all pixels, whose patches are gathered already.
    """
    fields = {"gain": torch.rand(len(codes)) / 100, "bias": torch.rand(len(codes)), "out_max": 63}
    linear = Node("linear", 0, codes=codes.flatten(1), **fields)
    found: dict[int, dict[str, list[float]]] = {batch: {} for batch in batches}
    for batch in batches * 3:
        micros = tried_micros(linear, batch * side * side, 1)
        if codes.dim() == 4:
            kernel, padding = (codes.shape[2],) * 2, (codes.shape[2] // 2,) * 2
            conv = Node("conv", 0, codes=codes, **fields, kernel=kernel, padding=padding)
            micros = tried_micros(conv, batch, side) | {"skipping_us": micros["skipping_us"]}
        for key, value in micros.items():
            found[batch].setdefault(key, []).append(value)
    return {batch: {key: median(values) for key, values in by_key.items()} for batch, by_key in found.items()}


def zero_blocks(batches: list[int]) -> None:
    layers = [*pruned_layers("resnet_18"), *pruned_layers("alexnet"), *made_layers()]
    shares = [zero_share(codes) for _, codes, _ in layers]
    for (figures, codes, side), share in zip(layers, shares, strict=True):
        figures |= {"shape": list(codes.shape), "zeros_pct": round(100 * codes.eq(0).float().mean().item(), 1),
                    "zero_blocks_pct": round(100 * share, 1)}  # fmt: skip
        measured = micros_by_algorithm(codes, side, batches) if share >= WORTH_MEASURING else {None: {}}
        for batch, micros in measured.items():
            if micros:
                dense = min(us for key, us in micros.items() if key != "skipping_us")
                micros["times_faster"] = round(dense / micros["skipping_us"], 2)
            print(*figures.values(), batch, *(f"{key} {value}" for key, value in micros.items()), flush=True)
            append_record("latency/zero_blocks", {**figures, "batch": batch, **micros})


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("what", choices=["layers", "pruned", "zero_blocks", "overhead", "pauses"])
    parser.add_argument("--batches", nargs="+", type=count, default=[1, 32])
    args = parser.parse_args()
    if args.what == "zero_blocks":
        zero_blocks(args.batches)
    else:
        limits = machine_limits()
        for batch in args.batches:
            {"layers": layers, "pruned": pruned, "overhead": overhead, "pauses": pauses}[args.what](batch, limits)


if __name__ == "__main__":
    main()
