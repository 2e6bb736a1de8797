"""Per-shape table of the packed kernels: time, algorithm and percent of this machine's measured limits.

    python3 benchmarks/kernels.py [--batches 1 32]

Convolutions and linear layers of the study's models and odd shapes between them (no shape may fall off a cliff). The
limit of a shape is the larger of its multiply-adds at the measured `vpdpbusd` rate and its 2-bit weights at the
measured reading rate; Winograd may pass it. Appends to results/latency/kernels.jsonl.
"""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.command_line import count, make_parser
from benchmarks.limits import machine_limits
from quantization_utils.kernels import cpu
from quantization_utils.nodes import Node
from train_test_utils.record import append_record

#        channels in, out, size, kernel, stride
CONVOLUTIONS = [
    (64, 64, 32, 3, 1), (64, 128, 32, 3, 2), (64, 128, 32, 1, 2), (128, 128, 16, 3, 1), (256, 256, 8, 3, 1),
    (512, 512, 4, 3, 1), (64, 192, 16, 3, 1), (192, 384, 8, 3, 1), (384, 256, 8, 3, 1), (256, 256, 8, 3, 1),
    (16, 16, 32, 3, 1), (17, 33, 31, 3, 1), (63, 65, 15, 3, 1), (97, 97, 9, 3, 1), (100, 64, 32, 1, 1),
    (257, 257, 7, 3, 1),
    (64, 64, 33, 5, 1), (64, 64, 33, 7, 2), (128, 1, 16, 3, 1),
]  # fmt: skip
#        inputs (channels, side), outputs
LINEAR = [(256, 6, 4096), (4096, 1, 4096), (4096, 1, 10), (512, 1, 10), (384, 1, 1536), (97, 1, 1025), (1, 1, 1)]


def ternary(*shape: int) -> torch.Tensor:
    return torch.randint(-1, 2, shape, dtype=torch.int8)


def stem(channels: int, top: int = 63) -> Node:
    """Makes activations of 0 to `top`, of the wanted number of channels, from an image."""
    codes, gain, bias = ternary(channels, 1, 1, 1), torch.rand(channels), torch.zeros(channels)
    return Node("conv", -1, codes=codes, gain=gain, bias=bias, relu=True, out_max=top)


def layer(shape: tuple[int, ...]) -> tuple[Node, int]:
    """The node of a shape in `LINEAR` or `CONVOLUTIONS`, and how many pixels a side its input has."""
    if len(shape) == 3:
        c, side, n = shape
        codes, gain, bias = ternary(n, c * side * side), torch.rand(n), torch.rand(n)
        return Node("linear", 0, codes=codes, gain=gain, bias=bias, relu=True, out_max=63), side
    c, n, side, kernel, stride = shape
    codes, gain, bias = ternary(n, c, kernel, kernel), torch.rand(n) / 100, torch.rand(n)
    geometry = {"kernel": (kernel, kernel), "stride": (stride, stride), "padding": (kernel // 2, kernel // 2)}
    return Node("conv", 0, codes=codes, gain=gain, bias=bias, relu=True, out_max=63, **geometry), side


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--batches", nargs="+", type=count, default=[1, 32])
    args = parser.parse_args()
    limits = machine_limits()
    peak, reading = limits["peak_multiply_adds_per_s"], limits["read_13MiB_bytes_per_s"]
    rows = []
    cases = [*product(CONVOLUTIONS, (6, 8)), *product(LINEAR, (8,))]
    for batch in args.batches:
        for shape, act_bits in cases:
            node, size = layer(shape)
            executor = cpu.NetworkExecutor([stem(shape[0], 2**act_bits - 1), node])
            executor(torch.rand(batch, 1, size, size))
            row = executor.plan(batch, size, size)[1]
            micros = row[f"{row['algorithm']}_us"]
            limit = 1e6 * max(row["multiply_adds"] / peak, node.codes.numel() / 4 / reading)
            row |= {"shape": shape, "act_bits": act_bits, "batch": batch,
                    "of_limit_pct": round(100 * limit / micros, 1)}  # fmt: skip
            rows.append(row)
            print(f"batch {batch:3} {node.op:6} {shape!s:24} {act_bits} bits {row['algorithm']:8} {micros:9.1f} µs"
                  f" (direct {row['direct_us']:9.1f})"
                  f" {row['multiply_adds'] / micros / 1e3:7.1f} G/s {row['of_limit_pct']:6.1f}% of the "
                  "limit", flush=True)  # fmt: skip
    append_record("latency/kernels", {**limits, "shapes": rows})


if __name__ == "__main__":
    main()
