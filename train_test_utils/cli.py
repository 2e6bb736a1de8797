"""The command line that the three scripts share."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from models import check_options, option_names

QUICK_BUDGET = 0.015  # of the recipes' steps: ResNet-18 learns the digits, in under four minutes on two cores


@dataclass(frozen=True)
class Arguments:
    """What the user asked for."""

    dataset: tuple[str, ...]
    data_dir: Path
    only: tuple[str, ...]
    list: bool
    seeds: tuple[int, ...]
    quick: bool
    budget: float
    holdout: float
    measure_again: str | None
    device: torch.device
    precision: torch.dtype
    compile: bool
    checkpoint_seconds: float
    out: Path
    wandb: str
    options: dict[str, Any]


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the usage before it, and takes no abbreviated options."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)  # READMEs join recorded commands by the names of options

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists all options)\n")


def parse_arguments(model_name: str, words: list[str], quick_budget: float = QUICK_BUDGET) -> Arguments:
    """Parse the command line; exits with code 2 and one sentence on a mistake. `quick_budget`: that of `--quick`."""
    parser = Parser(description=f"1.58-bit weights and pruning of {model_name}: its table.")
    add, several = parser.add_argument, {"nargs": "+", "action": "extend"}  # given twice, both count
    add("--dataset", **several, metavar="NAME",
        help="cifar10, cifar100, digits, or a folder of class folders (default: cifar10 cifar100)")  # fmt: skip
    add("--data-dir", type=Path, default=Path("data"), help="where data sets lie or are downloaded to")
    add("--only", **several, metavar="PATTERN", help="rows to run, e.g. 'qat*' (their parents too)")
    add("--list", action="store_true", help="print the table of rows and stop")
    add("--seeds", **several, type=int, help="a run of every row for each (default: 0)")
    add("--quick", action="store_true", help="handwritten digits and a few rows: minutes on a CPU, nothing to download")
    add("--budget", type=float, metavar="FRACTION",
        help="scale every recipe's optimizer steps; recorded in the rows "
             f"(default: 1, with --quick {quick_budget:g})")  # fmt: skip
    add("--holdout", type=float, default=0.0, metavar="FRACTION",
        help="measure on this part of the training split, left out of training: for choosing")  # fmt: skip
    add("--measure-again", nargs="?", const="everything", choices=["everything", "latency"],
        help="measure the named rows that are done anew, or their latency alone, without training")  # fmt: skip
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--precision", default="auto", choices=["auto", "fp32", "fp16", "bf16"],
        help="of training; auto: bf16 where the hardware has it, else fp16 on a GPU, fp32 on a CPU")  # fmt: skip
    add("--checkpoint-seconds", type=float, default=60.0, help="how often an unfinished training is saved")
    add("--out", type=Path, default=Path("runs"), help="where results go (default: runs)")
    add("--wandb", default="online", choices=["online", "offline", "disabled"],
        help="online (default) uploads rows and packed files; without a key or a network it goes offline")  # fmt: skip
    add("--options", **several, metavar="KEY=VALUE",
        help=f"of the model's constructor: {', '.join(option_names(model_name))}")  # fmt: skip
    given = parser.parse_args(words)
    try:
        budget = given.budget if given.budget is not None else (quick_budget if given.quick else 1.0)
        if not 0 < budget <= 100:
            raise ValueError(f"--budget is from above 0 to 100, 1 for the full recipes, not {budget:g}")
        if not 0 <= given.holdout < 1:
            raise ValueError(f"--holdout is a fraction in [0, 1), 0 for the test split, not {given.holdout:g}")
        seeds = tuple(dict.fromkeys(given.seeds or [0]))
        if wrong := [seed for seed in seeds if not 0 <= seed < 2**32]:
            raise ValueError(f"--seeds are whole numbers from 0 to 2^32 - 1, not {wrong[0]}")
        if not given.checkpoint_seconds >= 0:
            raise ValueError(f"--checkpoint-seconds is a time from 0 on, not {given.checkpoint_seconds:g}")
        for option, path in (("--out", given.out), ("--data-dir", given.data_dir)):
            if path.exists() and not path.is_dir():
                raise ValueError(f"{option} is a folder, and {path} is a file")
        try:
            str(given.out).encode()
        except UnicodeEncodeError:
            raise ValueError("--out is no name in UTF-8, which safetensors needs: give another") from None
        device = pick_device(given.device)
        options = parse_options(given.options or [])
        check_options(model_name, options)
        dataset = given.dataset or (["digits"] if given.quick else ["cifar10", "cifar100"])
        return Arguments(**vars(given) | {
            "dataset": tuple(dict.fromkeys(dataset)), "only": tuple(given.only or ()), "seeds": seeds, "budget": budget,
            "device": device, "precision": pick_precision(given.precision, device), "compile": can_compile(device),
            "options": options,
        })  # fmt: skip
    except (ValueError, OSError) as error:
        parser.error(sentence(error))


NO_MEMORY = "DefaultCPUAllocator: "  # begins what PyTorch says of it: on a CPU in a RuntimeError of no special type


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out: Python's, PyTorch's on the CPU, or a GPU's."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or NO_MEMORY in str(error)


def sentence(error: Exception) -> str:
    """What went wrong, for a person: the file and the reason of an operating system's error, the words of any other."""
    if NO_MEMORY in str(error):
        return str(error).partition(NO_MEMORY)[2].splitlines()[0]
    if isinstance(error, OSError) and error.strerror:
        return ": ".join(str(part) for part in (error.filename, error.strerror) if part is not None)
    return str(error) or type(error).__name__


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto": CUDA where there is one.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch("cpu|cuda(:[0-9]+)?", name):
        raise ValueError(f"unknown device {name!r}: choose auto, cpu, cuda or cuda:N")
    if name != "cpu" and int(name.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise ValueError(f"this machine has no device {name}: choose --device cpu or auto")
    return torch.device(name)


def can_compile(device: torch.device) -> bool:
    """Whether training is compiled: on a GPU, where it pays, if there is what Triton compiles with."""
    if device.type != "cuda":
        return False
    missing = None
    if not any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang")):
        missing = "C compiler was found, so training is not compiled and slower (apt install gcc)"
    elif not Path(sysconfig.get_path("include"), "Python.h").exists():
        missing = "Python.h was found, so training is not compiled and slower (apt install python3-dev)"
    if missing:
        print(f"no {missing}", file=sys.stderr)
    return not missing


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """Type of autocast; "auto": bf16 where the hardware has it, else fp16 with loss scaling on a GPU, fp32 on a CPU."""
    if name != "auto":
        return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name]
    if device.type == "cuda":
        # Not is_bf16_supported(): it counts emulation, and a T4 (sm_75) emulates.
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return torch.bfloat16 if _cpu_has_bf16() else torch.float32


def _cpu_has_bf16() -> bool:
    try:
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


PYTHON_WORDS = {"none": "null", "true": "true", "false": "false"}  # as JSON has them


def parse_options(words: list[str]) -> dict[str, Any]:
    """{"stem": "maxpool", "width": 192} from KEY=VALUE words; values as JSON or Python writes them, or words.

    Raises:
        ValueError: a word without "=".
    """
    options: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not (key and equals and value):
            raise ValueError(f"--options takes KEY=VALUE words, not {word!r}")
        try:
            options[key] = json.loads(PYTHON_WORDS.get(value.lower(), value))
        except json.JSONDecodeError:
            options[key] = value
    return options
