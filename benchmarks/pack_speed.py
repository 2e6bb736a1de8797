"""How long packing, saving and loading take, how much memory, and how close to Shannon's bound the files come.

    python3 benchmarks/pack_speed.py

First ViT-B/16 (86M weights): time and memory of `save_model` and `load_model`, each in a process of its own, imports
not counted, median of `--repeats`. Then files of a network with 3.6M weights at several zero fractions, zeros spread
at random or in whole filters.
"""

from __future__ import annotations

import resource
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.command_line import count, make_parser
from determine_space_saved import VIT_B_16
from models import build
from quantization_utils import pack_, quantize_
from quantization_utils.inspection import inspect_file
from quantization_utils.network import PackedNetwork
from quantization_utils.nodes import Node
from quantization_utils.storage import load_model, save_model
from train_test_utils.record import append_record

ZERO_FRACTIONS = (0.33, 0.5, 0.7, 0.8, 0.9, 0.95)


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def measured(work: Any) -> dict[str, float]:
    """Seconds of work(), and by how many MB the process grew at most meanwhile (looked at every millisecond)."""
    peak, done, start_mb = [0.0], threading.Event(), resident_mb()

    def watch() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], resident_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    peak[0] = max(peak[0], resident_mb())
    done.set()
    watcher.join()
    del result
    return {"seconds": seconds, "peak_mb": peak[0] - start_mb}


def _save(path: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model = quantize_(build("vit", 10, config=VIT_B_16).eval())
    packing = measured(lambda: pack_(model))
    return {"pack_": packing, "save_model": measured(lambda: save_model(model, path))}


def _load(path: str) -> dict[str, Any]:
    build("vit", 2, depth=1, width=64)  # imports transformers
    return {"load_model": measured(lambda: load_model(path))}


def in_a_process(work: Callable[[str], dict[str, Any]], path: str) -> dict[str, Any]:
    """work(path) in a process of its own. Raises BrokenProcessPool if that is killed, say for want of memory."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, path).result()


def vit_b_16(repeats: int, folder: str) -> dict[str, Any]:
    path = str(Path(folder) / "vit.safetensors")
    runs = [in_a_process(_save, path) | in_a_process(_load, path) for _ in range(repeats)]
    report = inspect_file(path)
    figures: dict[str, Any] = {"model": "ViT-B/16", "codes_mb": report.weights / 1e6, "file_bytes": report.file_bytes,
                               "ideal_bytes": round(report.ideal_bytes)}  # fmt: skip
    for step in ("pack_", "save_model", "load_model"):
        for unit in ("seconds", "peak_mb"):
            figures[f"{step}_{unit}"] = round(statistics.median(run[step][unit] for run in runs), 3)
    return figures


def network_with_zeros(zero_fraction: float, filters: bool) -> PackedNetwork:
    """A chain of convolutions whose codes are zero with this probability, singly or filter by filter."""
    generator = torch.Generator().manual_seed(0)
    nodes, channels = [], 3
    for index, width in enumerate((64, 128, 256, 512, 512)):
        shape = (width, channels, 3, 3)
        codes = torch.randint(0, 2, shape, generator=generator, dtype=torch.int8) * 2 - 1
        drawn = (width, 1, 1, 1) if filters else shape
        codes *= torch.rand(drawn, generator=generator) >= zero_fraction
        nodes.append(Node("conv", index - 1, codes=codes, gain=torch.rand(width, generator=generator),
                          bias=torch.rand(width, generator=generator), relu=True, out_max=255, kernel=(3, 3),
                          padding=(1, 1)))  # fmt: skip
        channels = width
    nodes.append(Node("avg_pool", len(nodes) - 1, gain=torch.ones(1), out_max=255))
    codes = torch.randint(-1, 2, (10, channels), generator=generator, dtype=torch.int8)
    return PackedNetwork(
        [*nodes, Node("linear", len(nodes) - 1, codes=codes, gain=torch.rand(10), bias=torch.rand(10))]
    )


def sizes(folder: str) -> list[dict[str, Any]]:
    rows = []
    for filters in (False, True):
        for fraction in ZERO_FRACTIONS:
            path = Path(folder) / "network.safetensors"
            save_model(network_with_zeros(fraction, filters), path)
            report = inspect_file(path)
            rows.append({"zeros": "filters" if filters else "single", "zero_fraction": round(report.zero_fraction, 4),
                         "bits_per_weight": round(8 * sum(x.file_bytes for x in report.layers) / report.weights, 4),
                         "entropy_bits": round(sum(x.ideal_bits for x in report.layers) / report.weights, 4),
                         "file_bytes": report.file_bytes,
                         "file_over_ideal": round(report.file_bytes / report.ideal_bytes, 4)})  # fmt: skip
    return rows


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--repeats", type=count, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        vit, rows = vit_b_16(options.repeats, folder), sizes(folder)
    print(
        f"ViT-B/16: {vit['codes_mb']:.1f}M codes, file {vit['file_bytes'] / 1e6:.2f} MB "
        f"({vit['file_bytes'] / vit['ideal_bytes']:.3f} of ideal)"
    )
    for step in ("pack_", "save_model", "load_model"):
        print(
            f"    {step:<12}{vit[f'{step}_seconds']:>7.2f} s  at most {vit[f'{step}_peak_mb']:>6.0f} MB more than "
            "before"
        )
    print(f"{'zeros':<10}{'fraction':>9}{'bits/weight':>13}{'entropy':>9}{'file bytes':>12}{'file/ideal':>12}")
    for row in rows:
        print(f"{row['zeros']:<10}{row['zero_fraction']:>9.3f}{row['bits_per_weight']:>13.3f}"
              f"{row['entropy_bits']:>9.3f}"
              f"{row['file_bytes']:>12,}{row['file_over_ideal']:>12.3f}")  # fmt: skip
    append_record("files/pack_speed", {"vit": vit, "sizes": rows, "threads": torch.get_num_threads()})
    good = vit["pack__seconds"] + vit["save_model_seconds"] < 5 and vit["load_model_seconds"] < 1
    return 0 if good and all(row["file_over_ideal"] < 1.05 for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
