"""Builds and loads the C++ kernels: once per source, flags, torch version and kind of machine, in a cache folder."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import sys
import tempfile
import threading
import time
from functools import cache
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "cpu"
# No contraction: what is rounded once, and what is not, is written down, as in the reference.
FLAGS = ["-O3", "-std=c++20", "-ffp-contract=off", "-fno-math-errno", "-pthread"]


class BuildError(RuntimeError):
    """The kernels could not be compiled here; the message says why."""


_LOADING = threading.Lock()  # operators can be registered once, and a cache alone lets two threads through


def load() -> None:
    """Load the operators `torch.ops.ternary.*`, compiling them if this source was never compiled on this machine.

    Raises:
        BuildError: there is no C++ compiler, or it failed. (Kept: a second call raises without trying again.)
    """
    with _LOADING:
        error = _load()
    if error:
        raise BuildError(error)


@cache
def _load() -> str:
    """What went wrong, or nothing."""
    try:
        flags = [*FLAGS, *_openmp(), *os.environ.get("TERNARY_CXXFLAGS", "").split()]
        library = _cache_folder() / _fingerprint(flags) / "ternary_kernels.so"
        try:
            torch.ops.load_library(str(library))
        except OSError:  # it is not there, or cut off, or of a machine with other libraries that shares the folder
            _compile_and_load(library, flags)
    except Exception as error:  # every cause means the same: these kernels cannot be used here
        lines = str(error).strip().splitlines() or [""]
        telling = ("error", "not found", "cannot find")  # in lines of the compiler, the linker and the shell
        reasons = (line for line in lines if any(w in line.lower() for w in telling) and "Error building" not in line)
        return f"{type(error).__name__}: {next(reasons, lines[0])}"
    from . import ops

    ops.register()
    return ""


def _openmp() -> list[str]:
    """Flags for PyTorch's own OpenMP threads: the library in its folder, or the compiler's; none without GNU's."""
    compiler = os.environ.get("CXX", "c++")
    if sys.platform != "linux" or "clang" in os.path.realpath(shutil.which(compiler) or compiler):
        return []  # threads are made for each call: clang would call functions that GNU's library does not have
    bundled = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    return ["-fopenmp", *(str(path.resolve()) for path in bundled[:1])]  # one, by whatever link one comes to it


def _cache_folder() -> Path:
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(root or Path.home() / ".cache") / "ternary_kernels"
    except RuntimeError as error:  # an unknown user in a container
        raise FileNotFoundError("there is no home folder: set TORCH_EXTENSIONS_DIR to one for the kernels") from error


def _fingerprint(flags: list[str]) -> str:
    digest = hashlib.sha256(f"{torch.__version__} {sys.version_info[:2]} {platform.machine()} {flags}".encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _link_flags(flags: list[str]) -> list[str]:
    """Of all flags the linker's: -fopenmp only where PyTorch brings no library, for it would link a second one."""
    bundled = any(flag.startswith("/") for flag in flags)
    return [f for f in flags if f.startswith(("-fsanitize", "-pthread", "/")) or (f == "-fopenmp" and not bundled)]


def _compile_and_load(library: Path, flags: list[str]) -> None:
    """Operators can be registered once: what was compiled here stays loaded, whoever put the same at `library`."""
    from torch.utils import cpp_extension

    if not shutil.which("c++") and shutil.which("g++"):
        os.environ.setdefault("CXX", "g++")  # PyTorch would call the other
    compiler = os.environ.get("CXX", "c++")
    if not shutil.which(compiler.split()[0]):
        raise FileNotFoundError(f"no C++ compiler was found as {compiler!r} (on Debian or Ubuntu: apt install g++)")
    # ninja lives beside the interpreter, which is not on the path when the environment is not activated.
    os.environ["PATH"] = os.environ.get("PATH", os.defpath) + os.pathsep + str(Path(sys.executable).parent)
    print(f"compiling the CPU kernels into {library.parent}, once …", end=" ", file=sys.stderr, flush=True)
    start = time.time()
    library.parent.mkdir(parents=True, exist_ok=True)
    outcome = "failed"
    try:
        # Compiled elsewhere and moved, so that an interrupted or a simultaneous build never leaves half a file.
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            cpp_extension.load(
                name="ternary_kernels", sources=[str(p) for p in sorted(SOURCES.glob("*.cpp"))],
                extra_cflags=[f for f in flags if f.startswith("-")], extra_ldflags=_link_flags(flags),
                build_directory=folder, is_python_module=False, is_standalone=False, verbose=False,
            )  # fmt: skip
            os.replace(Path(folder) / "ternary_kernels.so", library)
        outcome = f"done in {time.time() - start:.0f} s"
    finally:
        print(outcome, file=sys.stderr, flush=True)
