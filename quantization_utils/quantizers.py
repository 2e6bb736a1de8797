"""From a float weight to ternary codes and a scale: pure functions.

A quantizer maps `weight` (N, ...) to `codes` int8 of the same shape, in {-1, 0, +1}, and `scale` float32 (N,), one per
output channel, so that `weight ≈ codes · scale`. An entry that is exactly 0 is a pruned weight: its code is 0 and it
does not enter the scale. Scales are positive and finite, also for a channel without a single weight left (scale 1), but
for a channel with a weight that is not finite: that must not be hidden, so its scale is not finite either.

Legend: N output channels, K weights of a channel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

Quantizer = Callable[[Tensor], tuple[Tensor, Tensor]]

TINY = 1e-12  # smallest scale


def block_length(x: Tensor) -> int:
    """So many entries of dimension 0 at once: on a CPU few enough that what is computed of them stays in the cache."""
    return max(1, len(x) if x.is_cuda else 2**17 * len(x) // max(1, x.numel()))


def in_blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Blocks of all these, which are equally long, as `block_length` has them for the first."""
    length = block_length(tensors[0])
    return zip(*(tensor.split(length) for tensor in tensors), strict=True)


def by_blocks(quantizer: Quantizer) -> Quantizer:
    """Apply a quantizer, one that takes every channel for itself, to blocks of channels on a CPU: memory bounds it.

    For AlexNet's 57 million weights that takes a sixth of the time, and it is done in every step of a training.
    """

    @functools.wraps(quantizer)
    def blockwise(weight: Tensor) -> tuple[Tensor, Tensor]:
        length = block_length(weight)
        if len(weight) <= length:
            return quantizer(weight)
        codes, scale_N = zip(*map(quantizer, weight.split(length)), strict=True)
        return torch.cat(codes), torch.cat(scale_N)

    return blockwise


@by_blocks
def absmean(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Absmean per output channel: codes = clip(round(w / s), -1, 1) with s = mean |w| of the channel.

    Reference: S. Ma et al., "The Era of 1-bit LLMs", arXiv 2402.17764, eq. 1-3; there with one s for the whole tensor.
    """
    weight_NK = weight.flatten(1)
    scale_N = _mean_magnitude(weight_NK)
    return _round_to_ternary(weight_NK, scale_N).view_as(weight), scale_N


def absmean_per_tensor(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Absmean with one scale for the whole tensor, as in BitNet b1.58: arXiv 2402.17764, eq. 1-3."""
    weight_1K = weight.reshape(1, -1)
    scale_1 = _mean_magnitude(weight_1K)
    return _round_to_ternary(weight_1K, scale_1).view_as(weight), scale_1.expand(len(weight)).contiguous()


@by_blocks
def absmean_fitted(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The codes of `absmean`, with the scale that fits them best: s = <w, codes> / <codes, codes>, per output channel.

    Departs from arXiv 2402.17764 in the scale only, which there is the threshold's. Least squares, so never worse.
    """
    codes, _ = absmean(weight)
    return codes, _fitted_scale(weight, codes)


def absmedian(weight: Tensor) -> tuple[Tensor, Tensor]:
    """As `absmean_fitted`, with the median of |w| in the place of the mean."""
    weight_NK = weight.flatten(1)
    magnitude_NK = weight_NK.abs().float()
    scale_N = magnitude_NK.where(weight_NK != 0, torch.nan).nanmedian(1).values.nan_to_num(1.0).clamp_min(TINY)
    codes = _round_to_ternary(weight_NK, scale_N).view_as(weight)
    return codes, _fitted_scale(weight, codes)


@by_blocks
def twn(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Ternary weight networks: threshold 0.7 · mean |w|, scale = mean |w| above it, per output channel.

    Reference: F. Li, B. Liu et al., "Ternary Weight Networks", arXiv 1605.04711, eq. 6; there per layer.
    """
    weight_NK = weight.flatten(1)
    threshold_N = 0.7 * _mean_magnitude(weight_NK)
    codes_NK = (weight_NK.sign() * (weight_NK.abs() > threshold_N[:, None])).to(torch.int8)
    return codes_NK.view_as(weight), _fitted_scale(weight, codes_NK.view_as(weight))


@by_blocks
def mse_optimal(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The codes and scale of least squared error, per output channel, exactly.

    The best codes keep the k largest magnitudes, with scale S_k / k where S_k is their sum; the error is then
    |w|² - S_k² / k, so the best k maximises S_k² / k. All k are tried.
    """
    weight_NK = weight.flatten(1).float()
    magnitude_NK = weight_NK.abs()
    sorted_NK = _descending(magnitude_NK)
    count_K = torch.arange(1, weight_NK.shape[1] + 1, device=weight.device, dtype=torch.float64)
    gain_NK = sorted_NK.cumsum(1, dtype=torch.float64).square_().div_(count_K)
    smallest_N1 = sorted_NK.gather(1, gain_NK.argmax(1, keepdim=True))  # of equal ones the best k keeps all or none
    codes_NK = (weight_NK.sign() * (magnitude_NK >= smallest_N1)).to(torch.int8)
    return codes_NK.view_as(weight), _fitted_scale(weight, codes_NK.view_as(weight))


def as_is(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The codes of a weight that is ternary already (0 or ± one value per channel), as post-training leaves it."""
    weight_NK = weight.flatten(1).float()
    scale_N = weight_NK.abs().amax(1)
    return weight_NK.sign().to(torch.int8).view_as(weight), scale_N.where(scale_N != 0, 1.0)  # what is no number stays


def int8_absmax(weight: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit symmetric codes in [-127, 127], scale = max |w| / 127 per output channel: for layers kept at 8 bits."""
    weight_NK = weight.flatten(1).float()
    scale_N = weight_NK.abs().amax(1) / 127
    scale_N = scale_N.clamp_min(TINY).where(scale_N != 0, 1.0)  # what is no number stays visible
    return (weight_NK / scale_N[:, None]).round().to(torch.int8).view_as(weight), scale_N


TERNARY = (absmean, absmean_per_tensor, absmean_fitted, absmedian, twn, mse_optimal)


def fits_int32(inputs: int, weight_bits: int | str) -> bool:
    """Whether any sum over so many inputs is a 32-bit integer: activations of 8 bits, codes up to 1 or 127."""
    return inputs * (1 if weight_bits == "ternary" else 127) * 255 < 2**31


def is_finite(tensor: Tensor) -> bool:
    """Whether it holds numbers alone. A finite sum says so, many times faster; any other may be of large numbers."""
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def dequantize(codes: Tensor, scale_N: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """codes · scale, with the scale of each output channel (dimension 0), in the wider type and rounded to `dtype`."""
    scale = scale_N.to(torch.promote_types(scale_N.dtype, dtype)).view(-1, *[1] * (codes.dim() - 1))
    weight = torch.empty_like(codes, dtype=dtype)
    for codes_B, scale_B, weight_B in in_blocks(codes, scale, weight):
        torch.mul(codes_B, scale_B, out=weight_B)
    return weight


def _descending(rows_NK: Tensor) -> Tensor:
    """Every row sorted, largest first; on a CPU by NumPy, whose sort without indices takes an eighth of the time."""
    if rows_NK.device.type == "cpu" and not torch.compiler.is_compiling():
        return torch.from_numpy(np.sort(rows_NK.detach().numpy(), axis=1)).flip(1)
    return rows_NK.sort(dim=1, descending=True).values


def _mean_magnitude(weight_NK: Tensor) -> Tensor:
    """Mean |w| over the nonzero entries of each row (what is pruned has no say), 1 where there is none."""
    magnitude_NK = weight_NK.abs().float()
    count_N = magnitude_NK.sign().sum(1)  # in a quarter of the time of (weight_NK != 0).sum(1)
    total_N = magnitude_NK.sum(1)
    return (total_N / count_N.clamp_min(1)).clamp_min(TINY).where(total_N != 0, 1.0)


def _round_to_ternary(weight_NK: Tensor, scale_N: Tensor) -> Tensor:
    return (weight_NK.float() / scale_N[:, None]).round_().clamp_(-1, 1).to(torch.int8)


def _fitted_scale(weight: Tensor, codes: Tensor) -> Tensor:
    """The least-squares scale of given ternary codes: mean of w · code over the non-zero codes, per output channel."""
    codes_NK = codes.flatten(1).float()
    count_N = codes_NK.abs().sum(1)
    fitted_N = (weight.flatten(1).float() * codes_NK).sum(1) / count_N.clamp_min(1)
    return fitted_N.clamp_min(TINY).where((count_N > 0) | fitted_N.isnan(), 1.0)  # what is no number stays visible
