"""What is compiled, linked and loaded, without a compiler: what it would have made is pretended."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import cpp_extension

from quantization_utils.kernels import build, ops


def test_kernels_are_loaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the compilation, which loads what it made, or from the cache; a second registration would be an error."""
    loaded: list[str] = []

    def compile_and_load(name: str, build_directory: str, **options: Any) -> None:
        (Path(build_directory) / f"{name}.so").write_bytes(b"made")
        loaded.append("compiled")

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "true")
    monkeypatch.setattr(cpp_extension, "load", compile_and_load)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: loaded.append(Path(path).read_bytes().decode()))
    monkeypatch.setattr(ops, "register", lambda: None)
    assert build._load.__wrapped__() == "" and loaded == ["compiled"]
    assert build._load.__wrapped__() == "" and loaded == ["compiled", "made"]


def test_openmp_is_linked_once() -> None:
    """PyTorch's library if it brings one, else the compiler's."""
    assert build._link_flags(["-O3", "-pthread", "-fopenmp"]) == ["-pthread", "-fopenmp"]
    bundled = ["-O3", "-fsanitize=thread", "-pthread", "-fopenmp", "/torch/lib/libgomp.so.1"]
    assert build._link_flags(bundled) == ["-fsanitize=thread", "-pthread", "/torch/lib/libgomp.so.1"]


def test_machines_that_share_a_home_share_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    here = build._fingerprint([])
    monkeypatch.setattr(platform, "machine", lambda: "another")
    assert build._fingerprint([]) != here
