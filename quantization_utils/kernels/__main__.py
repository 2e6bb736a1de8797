"""Compiles the C++ kernels, unless that was done before, and says which backends run here: `make kernels`."""

from __future__ import annotations

import sys

from . import available_backends, build

if __name__ == "__main__":
    try:
        build.load()
    except build.BuildError as error:
        sys.exit(f"the C++ kernels cannot be compiled here, packed models run on the reference ({error})")
    print("backends: " + ", ".join(available_backends()))
