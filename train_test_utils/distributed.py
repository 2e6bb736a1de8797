"""Several processes, one model: `torchrun --nproc_per_node=4 SCRIPT`. Alone, everything here does nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def rank() -> int:
    """This process's number, from 0; the first one writes and prints."""
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def world_size() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launcher() -> str:
    """The beginning of the command that starts as many processes."""
    return "python3" if world_size() == 1 else f"torchrun --nproc_per_node={world_size()}"


def start(device: torch.device) -> torch.device:
    """Join the process group that torchrun describes, if any; return this process's device."""
    if world_size() == 1:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # While the first process downloads, packs and measures, the others wait, maybe longer than the usual ten minutes.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))
    return device


def stop() -> None:
    """Leave the process group, if any."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for the other processes."""
    if world_size() > 1:
        dist.barrier()


@contextmanager
def first_alone() -> Iterator[None]:
    """The first process runs the block alone; then the others do, and find what it has downloaded.

    If it fails there, which it reports itself, the others end with code 2.
    """
    if rank() > 0:
        if not first_decides(lambda: True):  # waits for the first one's answer below; this one's does not count
            raise SystemExit(2)
        yield
        return
    succeeded = False
    try:
        yield
        succeeded = True
    finally:
        first_decides(lambda: succeeded)


def summed(figures: Tensor) -> Tensor:
    """The sum over the processes, the same in all of them."""
    if world_size() > 1:
        dist.all_reduce(figures)
    return figures


def first_decides(decide: Callable[[], bool]) -> bool:
    """The first process's decision, in all of them: each for itself might find files that have changed meanwhile."""
    on_gpu = world_size() > 1 and dist.get_backend() == "nccl"
    decision = torch.tensor(float(rank() == 0 and decide()), device="cuda" if on_gpu else "cpu")
    return bool(summed(decision).item())


def wrapped(model: nn.Module) -> nn.Module:
    """The model as training calls it: gradients averaged over the processes."""
    return DistributedDataParallel(model) if world_size() > 1 else model
