"""First and second moments of a layer's inputs and of the outputs that are wanted from it.

Legend: N output channels, K weights of a channel, B images, P positions of all images (pixels, tokens).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MAX_COLUMNS = 25_000  # positions that enter a layer's moments; a random part of more, but of an image no fewer than
LEAST_OF_AN_IMAGE = 24


def images_wanted(positions: int) -> int:
    """How many images it takes for `MAX_COLUMNS` positions, in a layer that has so many in each."""
    return math.ceil(MAX_COLUMNS / min(positions, LEAST_OF_AN_IMAGE))


@dataclass
class Moments:
    """Means over positions and images of a layer's inputs x, and of its targets t (its outputs without bias)."""

    inputs_KK: Tensor  # E[x xᵀ]
    mean_K: Tensor  # E[x]
    cross_NK: Tensor  # E[t xᵀ]
    target_mean_N: Tensor  # E[t]
    columns: int  # P

    def centred(self) -> Moments:
        """Those of x - E[x] and t - E[t]: central second moments, and means of 0."""
        inputs_KK = self.inputs_KK - torch.outer(self.mean_K, self.mean_K)
        cross_NK = self.cross_NK - torch.outer(self.target_mean_N, self.mean_K)
        return Moments(inputs_KK, 0 * self.mean_K, cross_NK, 0 * self.target_mean_N, self.columns)

    def output_mean(self, weight_NK: Tensor) -> Tensor:
        """E[w·x] for each output channel, (N,)."""
        return weight_NK @ self.mean_K

    def output_variance(self, weight_NK: Tensor) -> Tensor:
        """Var[w·x] for each output channel, (N,); rounding may leave a little less than 0."""
        return ((weight_NK @ self.inputs_KK) * weight_NK).sum(1) - self.output_mean(weight_NK).square()

    def covariance(self, weight_NK: Tensor) -> Tensor:
        """Cov[w·x, t] for each output channel, (N,)."""
        return (self.cross_NK * weight_NK).sum(1) - self.output_mean(weight_NK) * self.target_mean_N


class MomentSum:
    """Adds up the moments of a layer over batches."""

    def __init__(self, layer: nn.Module, images: int) -> None:
        """`images`: how many will be added, to thin their positions out evenly."""
        self.layer, self.per_image = layer, max(LEAST_OF_AN_IMAGE, MAX_COLUMNS // images)
        self.generator = torch.Generator().manual_seed(0)
        self.sums: list[Tensor] = []
        self.columns = 0

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """`inputs` of the layer (B, …), and `targets` in the shape of its output."""
        x_KP, t_NP = self._columns(inputs.float(), targets.float())
        if not self.sums:
            sizes = (len(x_KP), len(x_KP)), len(x_KP), (len(t_NP), len(x_KP)), len(t_NP)
            self.sums = [x_KP.new_zeros(size) for size in sizes]
        inputs_KK, mean_K, cross_NK, target_mean_N = self.sums
        inputs_KK.addmm_(x_KP, x_KP.T)  # in place: of many inputs it is hundreds of megabytes
        cross_NK.addmm_(t_NP, x_KP.T)
        mean_K += x_KP.sum(1)
        target_mean_N += t_NP.sum(1)
        self.columns += x_KP.shape[1]

    def result(self) -> Moments:
        """The means over all that was added."""
        inputs_KK, mean_K, cross_NK, target_mean_N = (s / self.columns for s in self.sums)
        return Moments(inputs_KK, mean_K, cross_NK, target_mean_N, self.columns)

    def _columns(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        layer = self.layer
        if isinstance(layer, nn.Conv2d):
            x_BKL = F.unfold(inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # type: ignore[arg-type]
            t_BNL = targets.flatten(2)
        else:  # (B, …, K): tokens are positions
            x_BKL = inputs.reshape(len(inputs), -1, inputs.shape[-1]).transpose(1, 2)
            t_BNL = targets.reshape(len(targets), -1, targets.shape[-1]).transpose(1, 2)
        if x_BKL.shape[2] > self.per_image:
            chosen = torch.randperm(x_BKL.shape[2], generator=self.generator)[: self.per_image].to(inputs.device)
            x_BKL, t_BNL = x_BKL[:, :, chosen], t_BNL[:, :, chosen]
        return x_BKL.transpose(0, 1).flatten(1), t_BNL.transpose(0, 1).flatten(1)
