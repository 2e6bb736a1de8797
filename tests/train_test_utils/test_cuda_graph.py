"""When a function is called, when a graph is taken of it and when that is replayed, with a pretended CUDA."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from train_test_utils.cuda_graph import Replayed


@pytest.fixture
def events(monkeypatch) -> list[str]:
    """What happened, in order; a function's own calls are "run"."""
    happened: list[str] = []

    class Stream:
        def wait_stream(self, other: Stream) -> None:
            happened.append("wait")

    class Graph:
        def replay(self) -> None:
            happened.append("replay")

    @contextmanager
    def taking(graph: Graph, stream: Stream):
        happened.append("take")
        yield

    @contextmanager
    def on(stream: Stream):
        yield

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", taking)
    return happened


def test_three_calls_then_a_graph_that_is_replayed_and_another_variant_anew(events):
    repeated = Replayed(lambda: events.append("run"))
    eager = ["wait", "run", "wait"] * 3  # the graph's stream waits for the caller's, and the caller's for it
    for variant in (0.5, 1.0):
        for _ in range(5):
            repeated(variant)
        assert events == [*eager, "take", "run", "replay", "replay"]
        events.clear()
