"""What torch must know of the C++ operators besides their code: the shape of what they return."""

from __future__ import annotations

import torch
from torch import Tensor


def register() -> None:
    """Register fakes, so that torch.compile and torch.export take a packed model; once, after loading."""

    @torch.library.register_fake("ternary::network_run")
    def network_run(images: Tensor, handle: int, tail: list[int]) -> Tensor:
        return images.new_empty((images.shape[0], *tail), dtype=torch.float32)

    @torch.library.register_fake("ternary::linear_run")
    def linear_run(x: Tensor, handle: int, n: int) -> Tensor:
        return x.new_empty((*x.shape[:-1], n), dtype=torch.float32)

    @torch.library.register_fake("ternary::patches_run")
    def patches_run(images: Tensor, handle: int, patch: list[int], n: int) -> Tensor:
        batch, _, height, width = images.shape
        return images.new_empty((batch, height // patch[0], width // patch[1], n), dtype=torch.float32)

    @torch.library.register_fake("ternary::encoder_run")
    def encoder_run(x: Tensor, handle: int, tail: list[int]) -> Tensor:
        return x.new_empty((x.shape[0], *tail), dtype=torch.float32)
