"""Whether other work takes the cores from PyTorch's threads."""

from __future__ import annotations

import time

import torch

CROWDED = 0.75  # alone, threads that wait for one another spin, and so they use nearly all of their cores
WINDOW_SECONDS = 10.0


class Crowding:
    """Compares the time that this process had on cores with what its threads would have had alone."""

    told = False  # once in a process

    def __init__(self) -> None:
        self.began, self.used_before = time.monotonic(), time.process_time()

    def news(self) -> str | None:
        """What the user should know, as soon as it is certain, and only once."""
        seconds, threads = time.monotonic() - self.began, torch.get_num_threads()
        cores = (time.process_time() - self.used_before) / max(seconds, 1e-9)
        if self.told or threads == 1 or seconds < WINDOW_SECONDS or cores >= CROWDED * threads:
            return None
        Crowding.told = True
        return (
            f"other work leaves PyTorch's {threads} threads {cores:.1f} cores, where they wait for one another: with "
            f"OMP_NUM_THREADS={max(1, round(cores))} this may be much faster (stop it, and start it again like that)"
        )
