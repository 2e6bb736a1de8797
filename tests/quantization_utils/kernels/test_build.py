"""What is compiled, linked and loaded, without a compiler: what it would have made is pretended."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import cpp_extension

from quantization_utils.kernels import build, ops


def test_kernels_are_loaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the compilation, which loads what it made, or from the cache, if what is there can be loaded; a second
    registration would be an error."""
    loaded: list[str] = []

    def compile_and_load(name: str, build_directory: str, **options: Any) -> None:
        (Path(build_directory) / f"{name}.so").write_bytes(b"made")
        loaded.append("compiled")

    def load_library(path: str) -> None:
        if not Path(path).exists() or Path(path).read_bytes() != b"made":
            raise OSError("file too short")
        loaded.append("from the cache")

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "true")
    monkeypatch.setattr(cpp_extension, "load", compile_and_load)
    monkeypatch.setattr(torch.ops, "load_library", load_library)
    monkeypatch.setattr(ops, "register", lambda: None)
    assert build._load.__wrapped__() == "" and loaded == ["compiled"]
    assert build._load.__wrapped__() == "" and loaded == ["compiled", "from the cache"]
    (library,) = tmp_path.rglob("ternary_kernels.so")
    library.write_bytes(b"")  # cut off
    assert build._load.__wrapped__() == "" and loaded == ["compiled", "from the cache", "compiled"]


def test_without_a_place_for_a_cache_there_are_no_kernels_and_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", home)
    assert "there is no home folder: set TORCH_EXTENSIONS_DIR" in build._load.__wrapped__()


def test_the_compilers_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(**options: Any) -> None:
        raise RuntimeError("Error building extension 'k': [1/9] c++ …\nx.cpp:1: error: no such thing\nninja: stopped.")

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.delenv("PATH")
    monkeypatch.setattr(cpp_extension, "load", fails)
    assert build._load.__wrapped__() == "RuntimeError: x.cpp:1: error: no such thing"


def test_a_compiler_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "nothing++ -m64")
    assert "no C++ compiler was found as 'nothing++ -m64'" in build._load.__wrapped__()


def test_another_name_of_the_compiler_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(build_directory: str, **options: Any) -> None:
        compiler = os.environ["CXX"]
        raise RuntimeError(f"Error building extension 'k': [1/9] {compiler} …\nsh: {compiler}: not found")

    (tmp_path / "g++").symlink_to("/bin/true")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "")  # so that what is set meanwhile is undone
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(cpp_extension, "load", load)
    assert build._load.__wrapped__() == "RuntimeError: sh: g++: not found"


def test_clang_is_not_linked_with_the_library_of_another_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "clang-14").write_text("#!/bin/sh\n")
    (tmp_path / "clang-14").chmod(0o755)
    (tmp_path / "c++").symlink_to(tmp_path / "clang-14")
    monkeypatch.setenv("CXX", str(tmp_path / "c++"))
    assert build._openmp() == []


def test_openmp_is_linked_once() -> None:
    """PyTorch's library if it brings one, else the compiler's."""
    assert build._link_flags(["-O3", "-pthread", "-fopenmp"]) == ["-pthread", "-fopenmp"]
    bundled = ["-O3", "-fsanitize=thread", "-pthread", "-fopenmp", "/torch/lib/libgomp.so.1"]
    assert build._link_flags(bundled) == ["-fsanitize=thread", "-pthread", "/torch/lib/libgomp.so.1"]


def test_machines_that_share_a_home_share_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    here = build._fingerprint([])
    monkeypatch.setattr(platform, "machine", lambda: "another")
    assert build._fingerprint([]) != here


def test_what_is_compiled_anew_is_told_by_sources_flags_and_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.cpp").write_text("int a;")
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    seen = {build._fingerprint([]), build._fingerprint(["-g"])}
    (tmp_path / "a.cpp").write_text("int b;")
    seen.add(build._fingerprint([]))
    (tmp_path / "a.cpp").rename(tmp_path / "b.cpp")
    seen.add(build._fingerprint([]))
    monkeypatch.setattr(torch, "__version__", "1.0")
    assert len(seen | {build._fingerprint([])}) == 5


def test_the_folder_of_extensions_goes_before_that_of_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert build._cache_folder() == tmp_path / "a" / "ternary_kernels"
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    assert build._cache_folder() == tmp_path / "b" / "ternary_kernels"


def test_flags_of_the_environment_and_ninja_beside_python_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def load(extra_cflags: list[str], extra_ldflags: list[str], **options: Any) -> None:
        seen.update(compiled=extra_cflags, linked=extra_ldflags, path=os.environ["PATH"])
        raise RuntimeError("no")

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("TERNARY_CXXFLAGS", "-g -fsanitize=thread")
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.setattr(cpp_extension, "load", load)
    build._load.__wrapped__()
    assert seen["compiled"][-2:] == ["-g", "-fsanitize=thread"] and "-fsanitize=thread" in seen["linked"]
    assert seen["path"].split(os.pathsep) == ["/usr/bin", str(Path(sys.executable).parent)]


def test_one_openmp_library_is_linked_whatever_links_lead_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lib").mkdir()
    for name in ("libgomp.so.1", "libgomp.so.1.0.0"):
        (tmp_path / "lib" / name).touch()
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setenv("CXX", "g++")
    if sys.platform == "linux":
        assert build._openmp() == ["-fopenmp", str(tmp_path / "lib" / "libgomp.so.1")]
