"""Mutated model files: none may crash the reader, hang it, take much memory, or load as something it is not.

    python3 benchmarks/fuzz_files.py --files 10000

For each model family (small instances: an AlexNet-like chain, a ResNet-like chain, a ViT) files are damaged: bits
flipped, cut off, blocks zeroed, bytes added, tensors swapped, numbers in the header replaced by huge ones. Half of
them are forged: the header or the data is changed and all hashes are made right again, so that only the checks behind
the hashes are left. Every damaged file has to raise ModelFileError. A forged one may also load, if it then is a sound
model: codes in range, finite, positive scales, logits of the right shape; everything else counts as a failure.
Appends to results/files/fuzz.jsonl.
"""

from __future__ import annotations

import copy
import hashlib
import json
import multiprocessing
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn

from benchmarks.command_line import count, make_parser
from models import build
from models.normalize import Normalize
from models.resnet_18 import BasicBlock
from quantization_utils import calibrate_, pack_, quantize_
from quantization_utils.bit_layers import PackedConv2d, PackedLinear
from quantization_utils.network import PackedNetwork
from quantization_utils.storage import ModelFileError, load_model, save_model
from train_test_utils.record import append_record

SECONDS_PER_100_FILES = 20
MEMORY_BYTES = 1 << 30  # address space beyond what the process has before it reads
JSON_KEYS = ("constructor", "normalization", "tensors", "network", "modules", "metadata")
NASTY = [0, -1, 1, 3, 255, 256, 2**16, 2**31, 2**32, 2**40, 2**63, 2**64, 10**19, -(2**63), 0.5, 1e-45, 1e308, -1e39,
         True,
         None, "", "x", "../../etc/passwd", "https://example.org/x", [], {}, [2**40] * 4, [1] * 9,
         {"a": 1}]  # fmt: skip


def small_models() -> dict[str, nn.Module]:
    """A packed model of each family, with a few thousand weights."""
    torch.manual_seed(0)
    alexnet = nn.Sequential(
        Normalize(), nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2, 2),
        nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 4), nn.Flatten(), nn.Dropout(0.2),
        nn.Linear(192, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 10),
    )  # fmt: skip
    resnet = nn.Sequential(
        Normalize(), nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), BasicBlock(8, 8, 1),
        BasicBlock(8, 16, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip
    for model in (alexnet, resnet):
        with torch.no_grad():
            for module in model.modules():  # many zeros in one layer, so that all encodings are in the files
                if isinstance(module, nn.Conv2d) and module.in_channels == 8:
                    module.weight[torch.rand_like(module.weight) < 0.9] = 0
        calibrate_(quantize_(model.eval()), torch.rand(4, 3, 32, 32))
    vit = quantize_(build("vit", 10, width=64, depth=1, patch_size=16).eval())
    return {"alexnet": pack_(alexnet), "resnet_18": pack_(resnet), "vit": pack_(vit)}


def damaged(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """(what was done, the file after an accident that knows nothing of hashes)."""
    (length,) = struct.unpack("<Q", data[:8])
    kind = rng.choice(["bit flips", "cut off", "zeroed block", "bytes added", "swapped tensors", "huge counts"])
    out = bytearray(data)
    if kind == "bit flips":
        for _ in range(rng.choice([1, 1, 1, 2, 8])):
            # Half of them in the header, which is the smaller and the more dangerous part.
            at = rng.randrange(8 + length if rng.random() < 0.5 else len(out))
            out[at] ^= 1 << rng.randrange(8)
    elif kind == "cut off":
        del out[rng.choice([rng.randrange(len(out)), rng.randrange(8 + length), len(out) - 1]) :]
    elif kind == "zeroed block":
        at, size = rng.randrange(len(out)), rng.choice([1, 16, 512, 4096])
        out[at : at + size] = bytes(len(out[at : at + size]))
    elif kind == "bytes added":
        at = rng.choice([len(out), rng.randrange(len(out))])
        out[at:at] = rng.randbytes(rng.choice([1, 8, 1000]))
    elif kind == "swapped tensors":
        header = json.loads(data[8 : 8 + length])
        spans = [v["data_offsets"] for k, v in header.items() if k != "__metadata__"]
        a, b = rng.choice([(a, b) for a in spans for b in spans if a[0] < b[0] and a[1] - a[0] == b[1] - b[0]])
        a, b = (slice(8 + length + s[0], 8 + length + s[1]) for s in (a, b))
        out[a], out[b] = out[b], out[a]
    elif rng.random() < 0.2:
        out[:8] = struct.pack("<Q", rng.choice([2**63, 2**40, 2**32, length + 8, len(data), 0, 1]))
    else:
        header = json.loads(data[8 : 8 + length])
        entry = header[rng.choice([k for k in header if k != "__metadata__"])]
        huge = rng.choice([2**31, 2**40, 2**62, 2**64, 10**30, -1])
        entry[rng.choice(["shape", "data_offsets"])] = rng.choice([[huge], [0, huge], [huge] * 4, [huge, huge]])
        out = bytearray(_join(header, data[8 + length :]))
    return kind, bytes(out)


def forged(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """(what was done, a file changed by somebody who then made all hashes right)."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    metadata = header["__metadata__"]
    for key in set(JSON_KEYS) & set(metadata):
        metadata[key] = json.loads(metadata[key])
    kind = rng.choice(
        ["forged values", "forged values", "forged members", "forged data", "forged swap", "forged nesting"]
    )
    if kind == "forged values":
        for _ in range(rng.choice([1, 1, 2])):
            parent, key = rng.choice(_leaves(header))
            parent[key] = copy.deepcopy(rng.choice(NASTY))
    elif kind == "forged members":
        parent, key = rng.choice(_members(header))
        parent.pop(key) if rng.random() < 0.5 else parent.update({f"{key}2": copy.deepcopy(parent[key])})
    elif kind == "forged data":
        for _ in range(rng.choice([1, 1, 4, 100])):
            body[rng.randrange(len(body))] = rng.choice([0, 255, 243, 127, 128, rng.randrange(256)])
    elif kind == "forged swap":
        (one, a), (two, b) = rng.choice(_leaves(header)), rng.choice(_leaves(header))
        one[a], two[b] = two[b], one[a]
    else:
        parent, key = rng.choice(_leaves(header))
        parent[key] = "@NEST@"
    _rehash(header, body)
    for key in set(JSON_KEYS) & set(metadata if isinstance(metadata, dict) else ()):
        metadata[key] = json.dumps(metadata[key], sort_keys=True, separators=(",", ":"))
    return kind, _with_file_hash(_join(header, bytes(body)))


def _members(value: Any) -> list[tuple[Any, Any]]:
    """(object, key) of every member of every object in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    own = [(value, key) for key, _ in items] if isinstance(value, dict) else []
    return own + [m for _, item in items for m in _members(item)]


def _leaves(value: Any) -> list[tuple[Any, Any]]:
    """(container, key or index) of every number, word or truth value in a JSON value."""
    found = []
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        found += _leaves(item) if isinstance(item, (dict, list)) and item else [(value, key)]
    return found


def _rehash(header: dict[str, Any], body: bytes | bytearray) -> None:
    """Make every tensor's hash right, where the header still is such that it has one."""
    metadata = header.get("__metadata__")
    listed = metadata.get("tensors") if isinstance(metadata, dict) else None
    for name, entry in header.items():
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        known = isinstance(listed, dict) and isinstance(listed.get(name), dict)
        if not known or not isinstance(offsets, list) or len(offsets) != 2:
            continue
        if all(type(o) is int and 0 <= o <= len(body) for o in offsets):
            listed[name]["sha256"] = hashlib.sha256(body[offsets[0] : offsets[1]]).hexdigest()


def _join(header: dict[str, Any], body: bytes) -> bytes:
    text = json.dumps(header, separators=(",", ":"))
    nested = "[" * 100_000 + "]" * 100_000
    encoded = text.replace('\\"@NEST@\\"', nested).replace('"@NEST@"', nested).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded + body


def _with_file_hash(data: bytes) -> bytes:
    mark = b'"file_sha256":"'
    at = data.find(mark) + len(mark)
    if at < len(mark):
        return data
    zeroed = data[:at] + b"0" * 64 + data[at + 64 :]
    return data[:at] + hashlib.sha256(zeroed).hexdigest().encode() + data[at + 64 :]


def judge(path: Path) -> str:
    """Load the file: "refused", "sound" (it loads and is a sound model), or what went wrong."""
    try:
        model, _ = load_model(path, backend="reference")
    except ModelFileError:
        return "refused"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:100]}"
    for codes, bits, scale in _codes(model):
        limit = 1 if bits == "ternary" else 127
        if codes.numel() and (int(codes.min()) < -limit or int(codes.max()) > limit):
            return "codes out of range"
        if not bool(scale.isfinite().all()) or (not isinstance(model, PackedNetwork) and not bool((scale > 0).all())):
            return "scales not right"
    try:
        logits = model(torch.zeros(1, *getattr(model, "image_shape", (3, 32, 32))))  # a forged one may be another
    except Exception as error:
        return f"runs into {type(error).__name__}: {str(error)[:100]}"
    return "sound" if logits.dim() == 2 and len(logits) == 1 else "logits of a wrong shape"


def _codes(model: nn.Module) -> list[tuple[torch.Tensor, Any, torch.Tensor]]:
    if isinstance(model, PackedNetwork):
        return [(n.codes, n.weight_bits, n.gain) for n in model.nodes if n.codes is not None]
    return [(m.codes, m.weight_bits, m.scale) for m in model.modules() if isinstance(m, (PackedLinear, PackedConv2d))]


def fuzz(model: nn.Module, folder: Path, files: int, seed: int) -> dict[str, Any]:
    """Judge `files` mutations of a model's file; return counts by outcome and by kind, and the failures."""
    rng = random.Random(seed)
    original = folder / "original.safetensors"
    save_model(model, original, {"classes": [str(i) for i in range(10)], "accuracy_pct": 90.5})
    data, path = original.read_bytes(), folder / "mutated.safetensors"
    outcomes = Counter(refused=0, sound=0, failure=0)
    kinds: Counter[str] = Counter()
    failures, slowest = [], 0.0
    while sum(outcomes.values()) < files:
        is_forged = rng.random() < 0.5
        kind, mutated = (forged if is_forged else damaged)(data, rng)
        if mutated == data:
            continue
        path.write_bytes(mutated)
        start = time.perf_counter()
        outcome = judge(path)
        slowest = max(slowest, time.perf_counter() - start)
        kinds[kind] += 1
        good = outcome == "refused" or (outcome == "sound" and is_forged)
        outcomes[outcome if good else "failure"] += 1
        if not good:
            failures.append(f"{kind}: {outcome}")
            (folder / f"failure-{len(failures)}.safetensors").write_bytes(mutated)
    return {"file_bytes": len(data), "outcomes": dict(outcomes), "kinds": dict(kinds), "failures": failures[:20],
            "slowest_seconds": round(slowest, 3)}  # fmt: skip


def _limited_fuzz(name: str, folder: str, files: int, seed: int, results: Any) -> None:
    """In a process of its own: a crash, a hang or a greedy read ends that process and nothing else."""
    torch.set_num_threads(1)
    model = small_models()[name]
    fuzz(model, Path(folder), 30, seed + 1)  # everything is imported and warm
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(max(60, files * SECONDS_PER_100_FILES // 100))
    figures = fuzz(model, Path(folder), files, seed)
    figures["memory_growth_mb"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    results.put(figures)


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--files", type=count, default=10_000, help="mutated files per model family")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", help="folder to copy the files that fail to")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    bad = 0
    print(f"{'family':<12}{'files':>8}{'refused':>9}{'sound':>7}{'failures':>9}{'slowest s':>11}{'memory +MB':>12}")
    for name in ("alexnet", "resnet_18", "vit"):
        with tempfile.TemporaryDirectory() as folder:
            results = context.SimpleQueue()
            process = context.Process(target=_limited_fuzz, args=(name, folder, options.files, options.seed, results))
            start = time.perf_counter()
            process.start()
            process.join()
            if process.exitcode != 0:
                print(f"{name:<12} the reading process ended with {process.exitcode}")
                bad += 1
                continue
            figures = results.get()
            if options.keep and figures["failures"]:
                shutil.copytree(folder, Path(options.keep) / name, dirs_exist_ok=True)
        counts = figures["outcomes"]
        bad += counts["failure"]
        print(f"{name:<12}{options.files:>8}{counts['refused']:>9}{counts['sound']:>7}{counts['failure']:>9}"
              f"{figures['slowest_seconds']:>11}{figures['memory_growth_mb']:>12}", flush=True)  # fmt: skip
        for failure in figures["failures"]:
            print(f"    {failure}")
        seconds = round(time.perf_counter() - start, 1)
        append_record(
            "files/fuzz", {"family": name, "files": options.files, "seed": options.seed, "seconds": seconds, **figures}
        )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
