"""Threads: results do not depend on how many there are, nor on calls from several at a time; how they share images."""

from __future__ import annotations

import itertools
import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

from quantization_utils import kernels
from quantization_utils.kernels import reference
from quantization_utils.nodes import Node
from tests.nodes import BACKENDS, assert_equals_reference, codes_of, conv, encoder_of, images_of

pytestmark = pytest.mark.skipif("cpu" not in kernels.available_backends(), reason="no C++ compiler")


def test_results_do_not_depend_on_threads() -> None:
    nodes = [conv(-1, 64, 3), conv(0, 128, 64, 3, 2), conv(1, 128, 128, out_max=None)]
    images, results = images_of(15, 15, 15), []
    reused = kernels.make_executor(nodes, "cpu")
    for threads in (1, 2, 5, 7):  # 7: layer by layer; the others share out images
        torch.set_num_threads(threads)
        executor = kernels.make_executor(nodes, "cpu")
        results.append(executor(images))
        assert torch.equal(executor(images), results[0]) and torch.equal(reused(images), results[0])
        for batch in (1, 2, 11):
            assert torch.equal(executor(images[:batch]), results[0][:batch])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("top", "stride"), [(63, 1), (63, 2), (255, 1)])
def test_threads_share_the_channels_of_few_winograd_tiles(
    backend: str, top: int, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So many at a time that the last ones are fewer; with 7 threads also several groups of tiles."""
    monkeypatch.setenv("TERNARY_ALGORITHM", "winograd")
    nodes = [conv(-1, 64, 3, out_max=top), conv(0, 267, 64, 3, stride, out_max=None)]
    for threads in (2, 7):
        torch.set_num_threads(threads)
        for size in ((3, 10), (2 * stride, 2 * stride)):
            assert_equals_reference(nodes, images_of(1, *size), backend)


def test_calls_from_several_threads_do_not_disturb_each_other() -> None:
    """Of one network, layer or encoder, whose memory is one call's at a time, and of all three."""
    runs = [
        (kernels.make_executor([conv(-1, 32, 3), conv(0, 40, 32, out_max=None)], "cpu"), images_of(16, 9, 9)),
        (kernels.make_linear(codes_of((70, 500)), torch.rand(70), None, 8, "cpu"), torch.randn(16, 300, 500)),
        (partial(encoder_of(), kept=65), torch.randn(16, 65, 32)),
    ]
    calls = [[(run, item, run(item)) for item in items.split(1)] * 10 for run, items in runs]
    calls.append(list(itertools.chain(*zip(*calls, strict=True))))
    for threads in (1, 2):
        with ThreadPoolExecutor(4, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
            for some in calls:
                assert all(pool.map(lambda call: torch.equal(call[0](call[1]), call[2]), some))


def test_threads_take_more_images_at_a_time_where_weights_are_many() -> None:
    torch.manual_seed(1)
    nodes = [conv(-1, 16, 3), conv(0, 96, 16, 3, 2), conv(1, 96, 96, 3, 2),
             conv(2, 96, 96, residual=2, residual_gain=0.5), conv(3, 96, 96, residual=3, residual_gain=0.5),
             conv(4, 320, 96, 3, 2), conv(5, 320, 320, 3, 2)]  # fmt: skip
    last = Node("linear", 6, codes=codes_of((5, 320)), gain=torch.rand(5), bias=torch.randn(5))
    images = images_of(33, 16, 16)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for used in (nodes, [*nodes, last]):
            executor = kernels.make_executor(used, "cpu")
            found, expected = executor(images), reference.NetworkExecutor(used)(images)
            assert torch.equal(found, expected) and torch.equal(executor(images), expected)
            at_a_time = [step["images"] for step in executor.plan(33, 16, 16)]
            assert at_a_time[0] == 1 < at_a_time[4] < at_a_time[6] and at_a_time[7:] in ([], [0])


def test_a_shortcut_around_three_layers_stays_in_one_part() -> None:
    """Though the first of them has so many more weights that it alone would have more images at a time."""
    nodes = [conv(-1, 16, 3), conv(0, 96, 16, 3, 2), conv(1, 96, 96), conv(2, 4, 96, 1, 1, 0),
             conv(3, 96, 4, residual=1, residual_gain=0.5), conv(4, 5, 96, out_max=None)]  # fmt: skip
    images = images_of(32, 8, 8)
    torch.set_num_threads(1)
    assert_equals_reference(nodes, images, BACKENDS[0])
    executor = kernels.make_executor(nodes, BACKENDS[0])
    executor(images)
    at_a_time = [step["images"] for step in executor.plan(32, 8, 8)]
    assert at_a_time[1] < at_a_time[2] == at_a_time[4] > at_a_time[5]


def test_plans_of_the_last_sizes_are_kept_whatever_the_threads() -> None:
    executor = kernels.make_executor([conv(-1, 8, 3), Node("avg_pool", 0, gain=torch.tensor([0.1]))], "cpu")
    images = images_of(20, 8, 8)
    for batch, threads in ((2, 2), (1, 1)):
        torch.set_num_threads(threads)
        executor(images[:batch])
    assert executor.plan(2, 8, 8)[0]["direct_us"] > 0 < executor.plan(1, 8, 8)[0]["direct_us"]
    for batch in range(3, 20):
        executor(images[:batch])
    assert executor.plan(19, 8, 8) and executor.plan(4, 8, 8)
    with pytest.raises(ValueError, match="no batch of 1 images of 8 x 8 has run lately"):
        executor.plan(1, 8, 8)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux only")
def test_threads_that_were_asleep_may_still_run_everywhere() -> None:
    """Those that are woken on the processor of another one move away from it, and no more than once."""

    executor = kernels.make_executor([conv(-1, 64, 3), conv(0, 64, 64)], "cpu")
    images = images_of(1, 32, 32)
    torch.set_num_threads(2)
    expected = executor(images)
    for _ in range(100):
        time.sleep(0.03)  # OpenMP's threads have gone to sleep
        assert torch.equal(executor(images), expected)
    allowed = {frozenset(os.sched_getaffinity(int(thread))) for thread in os.listdir("/proc/self/task")}
    assert allowed == {frozenset(os.sched_getaffinity(0))}
