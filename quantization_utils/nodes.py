"""What a packed convolution network is made of, for the file that stores it and the kernels that run it.

A node is a convolution or linear layer with all that follows it up to the next quantizer: batch norm, residual
addition, ReLU, requantization to 8, 6 or 4 bits. `kernels/reference.py` says exactly what a node computes.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

IMAGE = -1  # the index that stands for the input image in `Node.input`
IMAGE_SHAPE = (3, 32, 32)  # (C, H, W) of the images that networks are packed for


@dataclass
class Node:
    """One step of a packed network. N output and C input channels."""

    op: str  # "conv", "linear", "max_pool", "avg_pool" (over the whole image)
    input: int  # index of the producing node, or IMAGE
    residual: int | None = None  # index of the node that is added before the ReLU
    codes: Tensor | None = None  # int8 (N, C, kh, kw) or (N, K), K flattened as (C, H, W)
    weight_bits: int | str = "ternary"  # or 8
    gain: Tensor | None = None  # float32 (N,); average pool: (1,)
    bias: Tensor | None = None  # float32 (N,)
    residual_gain: float = 0.0
    relu: bool = False
    out_max: int | None = None  # largest output code (uint8); None: float32 output
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    pad_values: Tensor | None = None  # uint8 (C,): what surrounds the image; None: zeros
