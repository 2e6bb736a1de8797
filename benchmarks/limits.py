"""What this machine can do at most, measured: int8 multiply-adds a second, bytes read from the cache. Not a script."""

from __future__ import annotations

import time
from typing import TypedDict

import torch

from quantization_utils.kernels import cpu


class Limits(TypedDict):
    isa: str
    threads: int
    peak_multiply_adds_per_s: float
    read_13MiB_bytes_per_s: float


def machine_limits() -> Limits:
    """The highest rates of ten measurements, a tenth of a second apart: neighbours only take. Prints them."""
    isa = cpu.choose_isa("cpu")
    rates = []
    for _ in range(10):
        rates.append(torch.ops.ternary.machine_limits(isa, 13))
        time.sleep(0.1)
    peak, reading = (max(rate) for rate in zip(*rates, strict=True))
    threads = torch.get_num_threads()
    print(f"{isa}, {threads} threads: {peak / 1e9:.0f} G multiply-adds/s; reading 13 MiB {reading / 1e9:.0f} GB/s")
    return {"isa": isa, "threads": threads, "peak_multiply_adds_per_s": peak, "read_13MiB_bytes_per_s": reading}
