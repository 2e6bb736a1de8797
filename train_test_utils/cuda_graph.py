"""A training step as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Replayed:
    """A function without arguments or result, all of whose work is on the GPU, recorded as a CUDA graph and replayed.

    A training step is hundreds of short kernels, and a GPU would wait for Python to start them one by one; those of a
    graph start at once. A graph repeats the same kernels on the same memory, so whatever changes from call to call has
    to be in tensors that stay where they are (random numbers follow `torch.manual_seed`). For another `variant` a new
    graph is recorded.

    Reference: PyTorch's notes on CUDA semantics, "CUDA Graphs".
    """

    EAGER_CALLS = 3  # before a graph is taken: compilers and libraries choose kernels, optimizers make their state

    def __init__(self, function: Callable[[], None]) -> None:
        self.function, self.stream = function, torch.cuda.Stream()
        self.graph: torch.cuda.CUDAGraph | None = None
        self.variant, self.calls = None, 0

    def __call__(self, variant: Any = None) -> None:
        if variant != self.variant:
            self.graph, self.variant, self.calls = None, variant, 0
        self.calls += 1
        if self.calls > self.EAGER_CALLS:
            if self.graph is None:
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph, stream=self.stream):  # which does nothing yet
                    self.function()
            self.graph.replay()
            return
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            self.function()
        current.wait_stream(self.stream)
