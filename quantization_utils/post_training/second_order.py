"""Ternary codes that keep a layer's output: rounding weighted by the second moments of the layer's inputs.

For inputs x with H = E[x xᵀ], replacing the weight row w by s·q changes the output by (w - s·q)·x, whose mean square is
(w - s·q) H (w - s·q)ᵀ. `feed_back` rounds one column at a time and lets the later columns make up for its error,
`search` keeps several ways to do so, `descend` then improves single codes, `fit_scale` is the best scale of given
codes. Rows are independent of each other.

References: E. Frantar, S. Ashkboos, T. Hoefler, D. Alistarh, "GPTQ", arXiv 2210.17323; J. Chen, Y. Shabanzadeh,
E. Crnčević, T. Hoefler, D. Alistarh, "The Geometry of LLM Quantization: GPTQ as Babai's Nearest Plane Algorithm",
arXiv 2507.18553; Z. Guo, P. Nilsson, "Algorithm and Implementation of the K-Best Sphere Decoding for MIMO Detection",
IEEE JSAC 24(3), 2006 (the search); K. Behdin et al., "QuantEase", arXiv 2309.01885 (coordinate descent).

Legend: N output channels, K weights of a channel, B columns of a block, W ways to round that are kept for a channel.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ..quantizers import TINY, mse_optimal

BLOCK = 64  # columns rounded between two matrix products
ROWS, GPU_ROWS = 2**11, 2**20  # at once: small steps stay in a core's cache, and a GPU's time goes by their number
MOST_WAYS = 256  # that `search` keeps for a channel: more gain next to nothing
CODES = -1.0, 0.0, 1.0


def damped(moment_KK: Tensor, damping: float) -> Tensor:
    """H + damping · (mean of its diagonal) · I; 1 on the diagonal where no input was ever different from 0."""
    damped_KK = moment_KK.clone()
    diagonal_K = damped_KK.diagonal()
    mean = float(diagonal_K.mean())
    diagonal_K.add_(damping * mean if mean > 0 else 1.0)
    return damped_KK


def cholesky(moment_KK: Tensor, damping: float) -> Tensor:
    """The lower L with L Lᵀ = H + damping · mean · I; if there is none, more damping, with a warning."""
    for attempt in range(4):
        factor_KK, failed = torch.linalg.cholesky_ex(damped(moment_KK, damping * 10**attempt))
        if not failed:
            if attempt:
                raised = f"damping was raised to {damping * 10**attempt:g}"
                warnings.warn(f"the inputs' covariance has no full rank: {raised}", stacklevel=2)
            return factor_KK
    raise ValueError("the inputs' covariance has no Cholesky factor, however damped: are there non-finite activations?")


def matching_weight(weight_NK: Tensor, moment_KK: Tensor, target_NK: Tensor, damping: float) -> Tensor:
    """The float weight v whose output on the inputs at hand is nearest to targets t: min E|v·x - t|² + λ |v - w|².

    `moment_KK` = E[x xᵀ], `target_NK` = E[t xᵀ], λ = damping · mean diagonal: v = (E[t xᵀ] + λ w)(E[x xᵀ] + λ I)⁻¹.
    With the inputs of the quantized network and the outputs of the float one, v makes up for errors of earlier layers.

    Reference: J. Zhang, Y. Zhou, R. Saab, "Post-training Quantization for Neural Networks with Provable Guarantees",
    arXiv 2201.11113 (GPFQ's target); Y. Li et al., "GPTAQ", arXiv 2504.02692.
    """
    change_NK = target_NK - weight_NK @ moment_KK  # v = w + (E[t xᵀ] - w E[x xᵀ]) (E[x xᵀ] + λ I)⁻¹
    return weight_NK + torch.cholesky_solve(change_NK.T, cholesky(moment_KK, damping)).T


def feed_back(weight_NK: Tensor, factor_KK: Tensor, scale_N: Tensor, kept_NK: Tensor) -> Tensor:
    """Round column after column from the last to the first; columns to come make up for the error. Codes int8 (N, K).

    With H = L Lᵀ and the error r = w - s·q, r H rᵀ = Σ_j (Σ_{i≥j} r_i L_ij)². At column j all r_i with i > j are known,
    so the j-th square is least for s·q_j nearest to w_j + Σ_{i>j} r_i L_ij / L_jj. That is what re-solving for the
    columns left over, after every column, would give. `kept_NK`: false where the code must be 0.
    """
    weight_KN, kept_KN = weight_NK.T.contiguous(), kept_NK.T.contiguous()
    error_KN, codes_KN = torch.zeros_like(weight_KN), torch.zeros_like(weight_KN)
    for end in range(len(weight_KN), 0, -BLOCK):
        start = max(0, end - BLOCK)
        factor_BB = factor_KK[start:end, start:end]
        carried_BN = factor_KK[end:, start:end].T @ error_KN[end:]
        for j in range(end - start - 1, -1, -1):
            wanted_N = weight_KN[start + j] + carried_BN[j] / factor_BB[j, j]
            code_N = (wanted_N / scale_N).round_().clamp_(-1, 1).mul_(kept_KN[start + j])
            codes_KN[start + j] = code_N
            error_KN[start + j] = weight_KN[start + j] - scale_N * code_N
            carried_BN[:j].addr_(factor_BB[j, :j], error_KN[start + j])
    return codes_KN.T.to(torch.int8)


def search(weight_NK: Tensor, factor_KK: Tensor, scale_N: Tensor, kept_NK: Tensor, width: int) -> Tensor:
    """`feed_back` that keeps the best `width` ways to round the columns so far, not the best one. Codes int8 (N, K).

    A way's error so far is the sum of the squares of its columns. Each goes on with every code of the next column, and
    of all the channel's ways then those of least error are kept. With a width of 1 this is `feed_back`.
    """
    (count, size), device = weight_NK.shape, weight_NK.device
    codes_3 = torch.tensor(CODES, dtype=weight_NK.dtype, device=device)
    rounded_N3, nonzero_3 = scale_N[:, None] * codes_3, codes_3 != 0
    first_N1 = width * torch.arange(count, device=device)[:, None]  # where a channel's ways begin among all, P = N · W
    square_NW = weight_NK.new_full((count, width), torch.inf)
    square_NW[:, 0] = 0  # there is one way to round no column
    error_PK = weight_NK.new_zeros(count * width, size)
    for end in range(size, 0, -BLOCK):
        start = max(0, end - BLOCK)
        factor_BB = factor_KK[start:end, start:end]
        way_PB = error_PK[:, end:] @ factor_KK[end:, start:end]  # what is carried to columns, then errors in its place
        origin_P = torch.arange(count * width, device=device)  # of the ways at the block's end, the one it goes back to
        for j in range(end - start - 1, -1, -1):
            error_N3 = weight_NK[:, start + j, None] - rounded_N3
            step_NW3 = way_PB[:, j].view(count, width, 1) + factor_BB[j, j] * error_N3[:, None]
            grown_NW3 = square_NW[:, :, None] + step_NW3.square_()
            grown_NW3.masked_fill_((~kept_NK[:, start + j, None] & nonzero_3)[:, None], torch.inf)
            square_NW, chosen_NW = grown_NW3.flatten(1).topk(width, largest=False, sorted=False)
            parent_P = (chosen_NW // len(CODES) + first_N1).flatten()
            error_P = error_N3.gather(1, chosen_NW % len(CODES)).flatten()
            way_PB, origin_P = way_PB.index_select(0, parent_P), origin_P[parent_P]
            way_PB[:, j] = error_P
            way_PB[:, :j].addcmul_(error_P[:, None], factor_BB[j, :j])
        error_PK[:, end:] = error_PK[origin_P, end:]
        error_PK[:, start:end] = way_PB
    best_N = square_NW.argmin(1) + first_N1[:, 0]
    return ((weight_NK - error_PK[best_N]) / scale_N[:, None]).round_().to(torch.int8)


def descend(codes_NK: Tensor, weight_NK: Tensor, moment_KK: Tensor, scale_N: Tensor, kept_NK: Tensor) -> Tensor:
    """One sweep over all columns, each code set to the best given all others: the error never grows. Codes int8 (N, K).

    With g = r H, the best code is the nearest to q_j + g_j / (s · H_jj).
    """
    codes_KN, kept_KN = codes_NK.T.to(weight_NK.dtype).contiguous(), kept_NK.T.contiguous()
    slope_KN = moment_KK @ (weight_NK.T - codes_KN * scale_N)
    for start in range(0, len(codes_KN), BLOCK):
        moment_BB = moment_KK[start : start + BLOCK, start : start + BLOCK]
        slope_BN = slope_KN[start : start + BLOCK]  # changed in place: after its block it is not read again
        before_BN = codes_KN[start : start + BLOCK].clone()
        for j in range(len(moment_BB)):
            old_N = before_BN[j]
            new_N = (old_N + slope_BN[j] / (moment_BB[j, j] * scale_N)).round_().clamp_(-1, 1).mul_(kept_KN[start + j])
            slope_BN.addr_(moment_BB[j], (old_N - new_N) * scale_N)
            codes_KN[start + j] = new_N
        change_BN = (before_BN - codes_KN[start : start + BLOCK]) * scale_N
        slope_KN.addmm_(moment_KK[:, start : start + BLOCK], change_BN)
    return codes_KN.T.to(torch.int8)


def fit_scale(codes_NK: Tensor, weight_NK: Tensor, moment_KK: Tensor, scale_N: Tensor) -> Tensor:
    """The scale of least error for given codes, s = q H wᵀ / q H qᵀ; `scale_N` stays where that is not positive."""
    weighted_NK = codes_NK.to(weight_NK.dtype) @ moment_KK
    fitted_N = (weighted_NK * weight_NK).sum(1) / (weighted_NK * codes_NK).sum(1).clamp_min(TINY)
    return fitted_N.where(fitted_N > TINY, scale_N)


def output_error(codes_NK: Tensor, weight_NK: Tensor, moment_KK: Tensor, scale_N: Tensor) -> Tensor:
    """(w - s·q) H (w - s·q)ᵀ for each output channel, (N,)."""
    error_NK = weight_NK - codes_NK * scale_N[:, None]
    return ((error_NK @ moment_KK) * error_NK).sum(1)


def ternarize(
    weight_NK: Tensor, moment_KK: Tensor, damping: float, kept_NK: Tensor,
    factors: tuple[float, ...] = (0.8, 1.0, 1.25), sweeps: int = 4, ways: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Codes int8 (N, K) and scale (N,) of small output error: error feedback, then descent and scale in turns.

    Columns are rounded by falling input energy. Each channel starts from the best of several scales: `factors` times
    the one of least squared error of the weights alone. `ways` / K is the width of the `search`, so that it is wide
    where a channel has few weights and one more way gains most, and all layers take about as long.
    """
    order_K = moment_KK.diagonal().argsort(stable=True)  # the last is rounded first
    moment_KK = damped(moment_KK, damping)[order_K][:, order_K]
    factor_KK = cholesky(moment_KK, 1e-6)
    width = max(1, min(MOST_WAYS, ways // len(order_K)))
    rows = GPU_ROWS if weight_NK.is_cuda else max(1, ROWS // width)
    done = [
        _ternarize_rows(weight_RK[:, order_K], moment_KK, factor_KK, kept_RK[:, order_K], factors, sweeps, width)
        for weight_RK, kept_RK in zip(weight_NK.split(rows), kept_NK.split(rows), strict=True)
    ]
    codes_NK, scale_N = torch.cat([codes for codes, _ in done]), torch.cat([scale for _, scale in done])
    return torch.empty_like(codes_NK).index_copy_(1, order_K, codes_NK), scale_N


def _ternarize_rows(
    weight_NK: Tensor, moment_KK: Tensor, factor_KK: Tensor, kept_NK: Tensor, factors: tuple[float, ...], sweeps: int,
    width: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    nearest_N = mse_optimal(weight_NK * kept_NK)[1].to(weight_NK.dtype)
    best_N = torch.full_like(nearest_N, torch.inf)
    codes_NK, scale_N = torch.zeros_like(weight_NK, dtype=torch.int8), nearest_N
    for factor in factors:
        given = weight_NK, factor_KK, factor * nearest_N, kept_NK
        tried_NK = search(*given, width) if width > 1 else feed_back(*given)
        fitted_N = fit_scale(tried_NK, weight_NK, moment_KK, nearest_N)
        error_N = output_error(tried_NK, weight_NK, moment_KK, fitted_N)
        better_N = error_N < best_N
        best_N = error_N.where(better_N, best_N)
        codes_NK, scale_N = tried_NK.where(better_N[:, None], codes_NK), fitted_N.where(better_N, scale_N)
    for _ in range(sweeps):
        codes_NK = descend(codes_NK, weight_NK, moment_KK, scale_N, kept_NK)
        scale_N = fit_scale(codes_NK, weight_NK, moment_KK, scale_N)
    return codes_NK, scale_N
