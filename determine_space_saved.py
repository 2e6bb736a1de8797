"""How much smaller a model gets, measured on files.

    python3 determine_space_saved.py                       # each model of the study, packed and really saved
    python3 determine_space_saved.py --layers              # ... with a line for each layer
    python3 determine_space_saved.py runs/*/*/model.safetensors   # what these packed files hold, checked byte for byte

Without files nothing is trained or downloaded: weights are random, and a third of their codes is zero, as after
training.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from models import build
from quantization_utils import calibrate_, pack_, quantize_
from quantization_utils.inspection import FileReport, gzip_float_bytes, inspect_file
from quantization_utils.storage import ModelFileError, save_model
from train_test_utils.cli import Parser, sentence
from train_test_utils.output import prepare_output
from train_test_utils.record import append_record

VIT_B_16 = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
    "image_size": 224, "patch_size": 16, "num_labels": 10,
}  # fmt: skip
MODELS: list[tuple[str, str, dict[str, Any]]] = [
    ("AlexNet", "alexnet", {}),
    ("ResNet-18", "resnet_18", {}),
    ("ViT, compact", "vit", {}),
    ("ViT-B/16", "vit", {"config": VIT_B_16}),
]


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.3f} MB"


def measure_model(name: str, options: dict[str, Any], folder: str) -> FileReport:
    """Quantize, pack and save a freshly initialised model; report on its file."""
    torch.manual_seed(0)
    model = quantize_(build(name, 10, **options).eval())
    calibrate_(model, torch.rand(1, 3, 32, 32))
    path = Path(folder) / f"{name}.safetensors"
    save_model(pack_(model), path)
    return inspect_file(path)


def print_models(show_layers: bool) -> dict[str, FileReport]:
    """Print the table of the study's models; return the reports by model."""
    reports = {}
    columns = ("model", "weights", "float32", "packed file", "log2(3) bits", "entropy", "file/entropy", "smaller")
    print("{:<13}{:>12}{:>15}{:>14}{:>14}{:>14}{:>14}{:>9}".format(*columns))
    with tempfile.TemporaryDirectory() as folder:
        for title, name, options in MODELS:
            report = measure_model(name, options, folder)
            reports[title] = report
            sizes = (report.file_bytes, report.log2_3_bytes, report.ideal_bytes)
            print(f"{title:<13}{report.weights:>12,}{megabytes(report.float_bytes):>15}"
                  f"{''.join(f'{megabytes(size):>14}' for size in sizes)}"
                  f"{report.file_bytes / report.ideal_bytes:>14.3f}"
                  f"{report.float_bytes / report.file_bytes:>8.1f}×")  # fmt: skip
            if show_layers:
                print_layers(report)
    print("log2(3) and entropy: the same codes at 1.585 bits, and at the entropy of a layer's codes; all sizes but "
          "float32's with the tensors that stay as they are")  # fmt: skip
    return reports


def record(reports: dict[str, FileReport]) -> None:
    """Append the sizes to results/files/sizes.jsonl, where the README's table comes from."""
    for title, report in reports.items():
        sizes = ("weights", "float_bytes", "file_bytes", "log2_3_bytes", "ideal_bytes")
        figures = {"model": title} | {name: int(getattr(report, name)) for name in sizes}
        figures["file_over_ideal"] = round(report.file_bytes / report.ideal_bytes, 4)
        append_record("files/sizes", figures | {"saving": round(report.float_bytes / report.file_bytes, 2)})


def print_layers(report: FileReport) -> None:
    print(f"  {'layer':<52}{'shape':<20}{'encoding':<12}{'bytes':>12}{'bits/weight':>12}{'entropy':>9}{'zeros':>8}")
    for layer in report.layers:
        shape, weights = "×".join(map(str, layer.shape)), max(layer.weights, 1)
        print(f"  {layer.name:<52}{shape:<20}{layer.encoding:<12}{layer.file_bytes:>12,}"
              f"{8 * layer.file_bytes / weights:>12.3f}{layer.ideal_bits / weights:>9.3f}"
              f"{layer.zeros / weights:>8.1%}")  # fmt: skip
    count = sum(layer.weights for layer in report.others)
    print(f"  {f'{len(report.others)} tensors stored as they are, {count:,} numbers':<84}{report.other_bytes:>12,}")


def print_file(path: str) -> None:
    report = inspect_file(path)
    hashed = len(report.layers) + len(report.others)
    print(f"{path}: {report.kind}, {report.file_bytes:,} bytes, SHA-256 of the file and of {hashed} tensors verified")
    print_layers(report)
    if report.weights:
        code_bytes = sum(layer.file_bytes for layer in report.layers)
        header_bytes = report.file_bytes - code_bytes - report.other_bytes
        print(f"  {report.weights:,} packed weights, {report.zero_fraction:.1%} zeros, "
              f"{8 * code_bytes / report.weights:.3f} bits each; {header_bytes:,} bytes of header")  # fmt: skip
    sizes = {
        "this file": report.file_bytes, "ideal: entropy of the codes": report.ideal_bytes,
        "ideal: log2(3) bits": report.log2_3_bytes, "int8": report.bytes_at(1, 4), "float16": report.bytes_at(2, 2),
        "float32, the network as it is": report.float_bytes, "float32, gzip": gzip_float_bytes(path),
    }  # fmt: skip
    for title, size in sizes.items():
        print(f"  {title:<30}{megabytes(size):>16}{size / report.file_bytes:>9.2f}×")
    print()


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="packed model files; none: the models of the study")
    parser.add_argument("--layers", action="store_true", help="a line for each layer (always shown for files)")
    parser.add_argument("--record", action="store_true", help="append the sizes to results/files/sizes.jsonl")
    prepare_output()
    torch.set_num_threads(1)  # one takes no longer: two would wait for one another, and beside other work for minutes
    options = parser.parse_args(arguments)
    if options.record and options.files:
        parser.error("--record is for the models of the study: leave the files out")

    def study() -> None:
        reports = print_models(options.layers)
        if options.record:
            record(reports)

    code = 0
    for report in [partial(print_file, path) for path in options.files] or [study]:
        try:
            report()
        except (ModelFileError, OSError) as error:
            print(f"determine_space_saved.py: {sentence(error)}", file=sys.stderr)
            code = 2
    return code


if __name__ == "__main__":
    sys.exit(main())
