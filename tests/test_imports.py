"""Data flows one way, and importing does nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {  # besides themselves and what is installed
    "models": set(),
    "pruning_utils": {"models"},
    "quantization_utils": {"models"},
    "train_test_utils": {"models", "pruning_utils", "quantization_utils"},
}
OURS = {*MAY_IMPORT, "tests", "benchmarks", *(p.stem for p in ROOT.glob("*.py"))}


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_the_direction_of_imports(package):
    assert files(package)
    for path in files(package):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            elif isinstance(node, ast.ImportFrom):
                depth = len(path.relative_to(ROOT).parent.parts)
                assert node.level <= depth, f"{path}:{node.lineno} leaves its package"
            used = {name.split(".")[0] for name in names} & OURS
            assert used <= MAY_IMPORT[package] | {package}, f"{path}:{node.lineno} imports {used}"


SCRIPT = """
import importlib, os, socket, subprocess, sys
def forbidden(*args, **kwargs):
    raise AssertionError("an import runs a program or opens a connection")
import torch                                   # what the libraries do when they are imported is theirs
import sklearn, matplotlib.font_manager, tqdm, zstandard, safetensors.torch, torch.utils.cpp_extension
before = set(os.listdir("."))
socket.socket.connect = subprocess.Popen.__init__ = os.system = forbidden
environment = dict(os.environ)
for name in sys.argv[1:]:
    importlib.import_module(name)
assert not torch.cuda.is_initialized(), "a CUDA context"
assert not torch.ops.loaded_libraries, "the C++ kernels are loaded"
assert "wandb" not in sys.modules, "wandb is imported"
assert "transformers" not in sys.modules, "transformers is imported, which takes seconds"
assert set(os.listdir(".")) == before, "a file is written"
changed = {k for k, v in os.environ.items() if environment.get(k) != v} - {"KMP_INIT_AT_FORK", "MPLBACKEND"}
assert not changed, f"the environment is changed: {changed}"
"""


def test_importing_anything_has_no_side_effect(tmp_path):
    names = [p.stem for p in ROOT.glob("*.py")]
    for package in MAY_IMPORT:
        for path in files(package):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[-1] != "__main__":
                names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    assert {"models", "quantization_utils.kernels.cpu", "train_test_utils.experiment", "vit_experiments"} <= set(names)
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, *names], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""
