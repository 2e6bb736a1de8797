"""The first step of every model: from pixels in [0, 1] to zero mean and unit scale."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def require_pixels(images: Tensor) -> None:
    """Refuse what is no floating-point tensor: bytes would be taken for pixels 255 times as bright.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(images, Tensor):
        raise ValueError(f"images are one tensor (B, C, H, W), not a {type(images).__name__}")
    if not images.is_floating_point():
        raise ValueError(f"images are floating-point numbers in [0, 1], not {images.dtype}")


class Normalize(nn.Module):
    """(x - mean_c) / std_c.

    The defaults are CIFAR-10's statistics with each mean rounded to an integer number of 1/255 and one standard
    deviation for all channels, so that a packed network can take the 8-bit pixels as they are: 255·(x - mean) is an
    integer, zero padding of the normalised image is padding of the pixels with 255·mean, and the rest goes into the
    first layer's scale and bias without changing a code.
    """

    mean_C11: Tensor
    std_C11: Tensor

    def __init__(self, mean: Sequence[float] = (125, 123, 114), std: Sequence[float] = (63, 63, 63)) -> None:
        """`mean` and `std` per channel, in units of 1/255.

        Raises:
            ValueError: not as many of the one as of the other, or a deviation that is not above 0.
        """
        super().__init__()
        if len(mean) != len(std) or not all(s > 0 for s in std):
            raise ValueError(f"a mean and a deviation above 0 are wanted for each channel, not {mean} and {std}")
        self.mean, self.std = tuple(mean), tuple(std)
        # Not persistent: they are constructor arguments, and travel as such.
        self.register_buffer("mean_C11", torch.tensor(self.mean).view(-1, 1, 1) / 255, persistent=False)
        self.register_buffer("std_C11", torch.tensor(self.std).view(-1, 1, 1) / 255, persistent=False)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        require_pixels(images_NCHW)
        if images_NCHW.dim() < 3 or len(self.mean) not in (1, images_NCHW.shape[-3]):
            raise ValueError(f"images have {len(self.mean)} channels, (…, C, H, W), and not {tuple(images_NCHW.shape)}")
        return (images_NCHW.to(self.mean_C11.dtype) - self.mean_C11) / self.std_C11

    def extra_repr(self) -> str:
        return f"mean={self.mean}/255, std={self.std}/255"
