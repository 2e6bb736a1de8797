"""Latency of packed models beside other engines: one process, the same threads, the same images, engines in turn.

    python3 -m venv peers && peers/bin/pip install -r benchmarks/requirements.txt
    peers/bin/python benchmarks/latency_vs_peers.py [--cases alexnet resnet_18 vit fc] [--batches 1 32] [--passes 2]

In every round each engine runs a few times, in a new order. A round's figure is the median of its runs, so that slow
spells of a shared machine meet all engines alike. A slow spell may last for minutes, longer than a table takes. So with
several passes, all tables are measured that many times, one after the other, and a table has the rounds of all passes.
Ratios are medians of per-round ratios, with a bootstrap interval of 95%. Times are medians of all runs, as on a machine
in use; the tables of single layers (networks.py, kernels.py) take the second smallest of nine runs instead, which is
near the best that the machine can do.

"flushed": 64 MiB are written between runs, so that weights come from memory. The direct limit is the time of the
multiply-adds that our engine executes, by the plain algorithm and without padding taps, at the measured rate of the
processor. In a ViT's last layer, our engine computes the output of attention and the MLP for the class token only;
"model_multiply_adds" counts them for all tokens, as other engines may. "ours" of convolution networks has 6-bit
activations, "ours_8bit" as many bits as int8 engines have.

Appends to results/latency/peers.jsonl. On a processor with AMX or without AVX-512 VNNI, where other int8 engines are
used, it is peers_amx.jsonl or peers_avx2.jsonl. Nothing is recorded if engines are left out or their packages are
missing. Of lines with the same case, batch and "flushed" the READMEs' tables show the last.
"""

from __future__ import annotations

import copy
import os
import random
import sys
import tempfile
import time
import traceback
import warnings
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.command_line import count, make_parser
from benchmarks.limits import machine_limits
from train_test_utils.record import append_record

LEAST_ROUNDS = 12  # that an interval of 95% is of
KINDS = {"float": peers.FLOAT, "int8": peers.INT8, "2bit": peers.TWO_BIT}
# What the kernels are built to reach with warm caches on AVX-512 VNNI: times the best engine of each kind,
# percent of the direct limit.
AIMS: dict[tuple[str, int], dict[str, float]] = {
    ("fc", 1): {"float": 12, "int8": 6, "2bit": 1.5, "of_direct_limit_pct": 60},
    ("alexnet", 1): {"float": 10, "int8": 4.5, "of_direct_limit_pct": 100},
    ("resnet_18", 1): {"float": 3.5, "int8": 1.8, "of_direct_limit_pct": 135},
    ("vit", 1): {"float": 2, "int8": 1.35, "of_direct_limit_pct": 65},
    ("alexnet", 32): {"float": 3, "int8": 1.5, "of_direct_limit_pct": 130},
    ("resnet_18", 32): {"float": 3, "int8": 1.6, "of_direct_limit_pct": 130},
    ("vit", 32): {"float": 1.8, "int8": 1.2, "of_direct_limit_pct": 85},
}


def float_model(case: str) -> nn.Module:
    import models

    torch.manual_seed(0)
    if case == "fc":
        return nn.Sequential(nn.Linear(9216, 4096, bias=False), nn.ReLU(), nn.Linear(4096, 4096, bias=False)).eval()
    model = models.build(case, 10).eval()
    return model.requires_grad_(False)


def packed_model(model: nn.Module, case: str, act_bits: int) -> nn.Module:
    from quantization_utils import absmean
    from quantization_utils.bit_layers import BitLinear, PackedLinear
    from quantization_utils.transform import calibrate_, pack_, quantize_

    packed = quantize_(copy.deepcopy(model), absmean, act_bits=act_bits)
    if case == "fc":  # layers alone: activations quantized per token
        return nn.Sequential(*(PackedLinear.from_bit_layer(m, 8) if isinstance(m, BitLinear) else m for m in packed))
    calibrate_(packed, torch.rand(32, 3, 32, 32))
    return pack_(packed)


def multiply_adds(model: nn.Module, x: Tensor) -> tuple[int, int]:
    """Multiply-adds of one forward pass: (those that our engine executes in integers, all of the model's).

    Attention of a ViT and the unread tokens of its last layer count in the second only. Taps that fall on padding do
    not count.
    """
    from models.vit import ViT
    from quantization_utils.packed_encoder import linear_layers

    executed = total = 0
    of_one_token = linear_layers(model.network.vit.layers[-1])[3:] if isinstance(model, ViT) else []

    def count(layer: nn.Module, args: Any, out: Tensor) -> None:
        nonlocal executed, total
        if isinstance(layer, nn.Linear):
            total += out.numel() * layer.in_features
            executed += (out[:, 0] if any(layer is m for m in of_one_token) else out).numel() * layer.in_features
            return
        ones = torch.ones_like(args[0][:1, :1])
        kernel = torch.ones(1, 1, *layer.kernel_size)
        taps = torch.nn.functional.conv2d(ones, kernel, stride=layer.stride, padding=layer.padding).sum()
        products = int(taps) * layer.in_channels * layer.out_channels * len(out)
        executed, total = executed + products, total + products

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    model(x)
    for hook in hooks:
        hook.remove()
    if isinstance(model, ViT):
        config, tokens = model.network.config, model.network.vit.embeddings.position_embeddings.shape[1]
        total += 2 * config.num_hidden_layers * len(x) * tokens**2 * config.hidden_size
    return executed, total


def build(builder: peers.Builder, case: str, model: nn.Module, x: Tensor, folder: Path) -> peers.Run:
    """Build an engine and run it once. PyTorch's get convolution networks in NHWC, in which they are faster."""
    channels_last = case in ("alexnet", "resnet_18") and "torch" in builder.__name__
    layout = torch.channels_last if channels_last else torch.contiguous_format
    if x.dim() == 4:
        model, x = copy.deepcopy(model).to(memory_format=layout), x.contiguous(memory_format=layout)
    run = builder(model, x, folder)
    run()
    return run


def prepare(
    case: str, batch: int, wanted: list[str], act_bits: int
) -> tuple[dict[str, peers.Run], dict[str, str], tuple[int, int]]:
    """(engines that run here, why each of the others does not, `multiply_adds`), by the engines' names."""
    torch._dynamo.reset()  # else, after the eighth shape and type, PyTorch would run a model as it is and only warn
    model = float_model(case)
    x = torch.rand(batch, 9216) if case == "fc" else torch.rand(batch, 3, 32, 32)
    ours = {"ours": packed_model(model, case, act_bits)}
    if act_bits < 8:
        ours["ours_8bit"] = packed_model(model, case, 8)
    engines: dict[str, peers.Run] = {name: partial(packed, x) for name, packed in ours.items()}
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for builder in (b for kind in KINDS.values() for b in kind):
            if builder in peers.TWO_BIT and case != "fc":
                continue
            if builder is peers.ort_int8_dynamic and case not in ("vit", "fc"):
                continue  # dynamic quantization is for transformers; convolutions have the static engine
            if wanted and builder.__name__ not in wanted:
                missing[builder.__name__] = "not asked for"
                continue
            try:
                engines[builder.__name__] = build(builder, case, model, x, Path(folder))
            except Exception as error:  # an engine that is absent or fails is a line in the table, not the end of it
                missing[builder.__name__] = (
                    f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error) else ''}"
                )
                if os.environ.get("DEBUG"):
                    traceback.print_exc()
    return engines, missing, multiply_adds(model, x)


def measure(
    engines: dict[str, peers.Run], rounds: int, warm_ups: int, repetitions: int, flushed: bool, seconds: float
) -> dict[str, np.ndarray]:
    """Milliseconds of each engine: (rounds, repetitions)."""
    waste = np.zeros(64 << 20, np.uint8)
    runs = {name: [] for name in engines}
    order = list(engines)
    begin = time.perf_counter()
    for round_index in range(rounds + 1):
        if round_index > LEAST_ROUNDS and time.perf_counter() - begin > seconds:
            break
        random.Random(round_index).shuffle(order)
        for name in order:
            run, times = engines[name], []
            time.sleep(0.03)  # threads of what ran before stop spinning, and leave this engine the cores
            for _ in range(warm_ups):
                run()
            for _ in range(repetitions):
                if flushed:
                    waste += 1  # by NumPy, on one thread: those of PyTorch would spin beside engines with other ones
                start = time.perf_counter()
                run()
                times.append((time.perf_counter() - start) * 1e3)
            if round_index > 0:  # the first warms up
                runs[name].append(times)
    return {name: np.array(times) for name, times in runs.items()}


def ratio(theirs: np.ndarray, ours: np.ndarray) -> list[float]:
    """Median of the rounds' ratios of medians and a bootstrap interval of 95%."""
    ratios = np.median(theirs, 1) / np.median(ours, 1)
    picks = np.random.default_rng(0).integers(0, len(ratios), (2000, len(ratios)))
    medians = np.median(ratios[picks], 1)
    return [round(float(v), 2) for v in (np.median(ratios), np.quantile(medians, 0.025), np.quantile(medians, 0.975))]


def report(case: str, batch: int, flushed: bool, times: dict[str, np.ndarray], limit_ms: float) -> dict[str, Any]:
    """Print one table; return its figures."""
    ours = times["ours"]
    print(f"\n{case}, batch {batch}{', caches flushed' if flushed else ''}; direct limit {limit_ms:.3f} ms")
    engines = {}
    for name, t in sorted(times.items(), key=lambda item: np.median(item[1])):
        engines[name] = {
            "p50_ms": round(float(np.median(t)), 4),
            "p90_ms": round(float(np.quantile(t, 0.9)), 4),
            "ratio": ratio(t, ours),
        }
        r = engines[name]["ratio"]
        print(
            f"  {name:22} p50 {engines[name]['p50_ms']:9.3f} ms   p90 {engines[name]['p90_ms']:9.3f}   {r[0]:6.2f}× "
            f"of ours ({r[1]} – {r[2]})"
        )
    best = {}
    for kind, builders in KINDS.items():
        names = [b.__name__ for b in builders if b.__name__ in engines]
        if names:
            best[kind] = min(names, key=lambda n: engines[n]["p50_ms"])
            print(f"  best {kind:6} {best[kind]}: {engines[best[kind]]['ratio'][0]}×")
    percent = 100 * limit_ms / engines["ours"]["p50_ms"]
    print(f"  of the direct limit: {percent:.0f}%", flush=True)
    return {
        "case": case,
        "batch": batch,
        "flushed": flushed,
        "rounds": len(ours),
        "engines": engines,
        "best": best,
        "vs": {kind: engines[name]["ratio"] for kind, name in best.items()},
        "int8_vs_ours_8bit": ratio(times[best["int8"]], times.get("ours_8bit", ours)) if "int8" in best else None,
        "limit_ms": limit_ms,
        "of_direct_limit_pct": round(percent, 1),
    }


def pooled(passes: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The rounds of all passes, of the engines that were in each."""
    common = [name for name in passes[0] if all(name in times for times in passes)]
    return {name: np.concatenate([times[name] for times in passes]) for name in common}


def main() -> None:
    parser = make_parser(__doc__)
    names = [builder.__name__ for kind in KINDS.values() for builder in kind]
    cases = ["fc", "alexnet", "resnet_18", "vit"]
    parser.add_argument("--cases", nargs="+", default=cases, choices=cases)
    parser.add_argument("--batches", nargs="+", type=count, default=[1, 32])
    parser.add_argument("--rounds", type=count, default=30)
    parser.add_argument("--passes", type=count, default=1)
    parser.add_argument("--seconds", type=float, default=60,
                        help=f"a table ends with the round that passes this, but has {LEAST_ROUNDS}")  # fmt: skip
    parser.add_argument("--engines", nargs="+", default=[], choices=names, metavar="NAME",
                        help=f"peers: {', '.join(names)}; all by default")  # fmt: skip
    parser.add_argument("--act-bits", type=int, default=6, choices=range(2, 9), metavar="BITS",
                        help="activations of AlexNet and ResNet-18, 2 to 8")  # fmt: skip
    parser.add_argument("--no-flushed", action="store_true")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    limits = machine_limits()
    is_aimed_at = limits["isa"] == "avx512vnni"
    record_name = "latency/peers" if is_aimed_at else f"latency/peers_{limits['isa']}"
    torch.set_grad_enabled(False)
    measured: dict[tuple[str, int, bool], list[dict[str, np.ndarray]]] = {}  # times of each pass
    for number, case, batch in product(range(1, args.passes + 1), args.cases, args.batches):
        act_bits = 8 if case in ("vit", "fc") else args.act_bits
        engines, missing, (work, model_work) = prepare(case, batch, args.engines, act_bits)
        for engine, why in missing.items():
            print(f"NOT MEASURED in {case}, batch {batch}: {engine} ({why})", flush=True)
        complete = not any(why.startswith(("not asked for", "ModuleNotFoundError")) for why in missing.values())
        if not complete:
            print("NOT RECORDED: that needs every engine of benchmarks/requirements.txt", flush=True)
        for flushed in [False] if args.no_flushed or batch > 1 else [False, True]:
            # Ten runs bring the weights back into the outer cache, after other engines; a large batch does so itself.
            warm_ups, repetitions = (0, 5) if flushed else (10, 10) if batch == 1 else (1, 2)
            passes = measured.setdefault((case, batch, flushed), [])
            passes.append(measure(engines, args.rounds, warm_ups, repetitions, flushed, args.seconds))
            if number < args.passes:
                continue
            figures = report(case, batch, flushed, pooled(passes), work / limits["peak_multiply_adds_per_s"] * 1e3)
            if not complete:
                continue
            append_record(record_name, {
                **figures, "aims": AIMS.get((case, batch), {}) if is_aimed_at and not flushed else {}, **limits,
                "missing": missing, "act_bits": act_bits, "multiply_adds": work, "model_multiply_adds": model_work,
                "of_plain_limit_pct": round(figures["of_direct_limit_pct"] * model_work / work, 1),
            }, peers.PACKAGES)  # fmt: skip


if __name__ == "__main__":
    main()
