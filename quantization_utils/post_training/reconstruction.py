"""Rounding learned block by block: ternary codes and scales that bring a block's outputs to those of the float network.

Every weight w of a block keeps a latent code z; the block runs with scale · round(z), the gradient passes straight
through the rounding, and Adam moves z and the scale towards the outputs that the float network's block has on the same
images. No label is used, and what a block has to make up for is what the ternary blocks before it did.

References: M. Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", arXiv 2004.10568 (rounding
is learned from outputs); Y. Li et al., "BRECQ", arXiv 2102.05426 (block by block); M. Chen et al., "EfficientQAT",
arXiv 2407.11062 (straight-through training of a block's weights and scales, used here in the place of AdaRound's
annealed sigmoids: codes stay codes throughout, so that few steps do).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parametrize

from .layer_inputs import Call, Stream

EDGE = 0.49  # farthest that a latent code starts from its code, so that it rounds to it


@dataclass(frozen=True)
class Reconstruction:
    """How long and how fast a block's rounding is learned; chosen on training images outside of the calibration."""

    steps: int = 300  # of a batch each, for every block
    lr: float = 3e-3  # of latent codes (in codes) and scales (relative), falling to 0 as a half cosine
    seed: int = 0  # of the order of the batches


DEFAULT = Reconstruction()


class LatentCodes:
    """A ternary weight (N, …) that can be trained: latent codes and a relative scale per channel."""

    def __init__(self, ternary: Tensor, wanted: Tensor) -> None:
        """`ternary`: codes · scale to start from; `wanted`: the float weight, pruned where it is exactly 0.

        A latent code starts half-way between the code and the float weight, so that doubtful ones change first.
        """
        flat_NK = ternary.flatten(1)
        scale_N = flat_NK.abs().amax(1)
        self.scale = scale_N.where(scale_N > 0, 1.0).view(-1, *[1] * (ternary.dim() - 1))
        self.kept = wanted != 0
        codes = ternary.sign()
        between = (codes + (wanted / self.scale).clamp(-1, 1)) / 2
        self.latent = between.clamp(codes - EDGE, codes + EDGE).requires_grad_()
        self.log_gain = torch.zeros_like(self.scale, requires_grad=True)

    def weight(self) -> Tensor:
        """codes · scale, with the gradient passed straight through to the latent codes."""
        codes = self.latent + (self.latent.round() - self.latent).detach()
        return codes * self.kept * (self.scale * self.log_gain.exp())


def reconstruct_block(
    reference: Stream, stream: Stream, name: str, layers: Sequence[str], settings: Reconstruction = DEFAULT
) -> dict[str, Tensor]:
    """Better ternary weights, by name, for the ternary `layers` of the block `name` that both streams have entered.

    The outputs that `reference`'s block has on its own inputs are the target, in mean squared error. If what is learned
    is no nearer to them than what was there, nothing is returned.
    """
    block, float_block = stream.model.get_submodule(name), reference.model.get_submodule(name)
    with torch.no_grad():
        targets = [_output(float_block, call) for call in reference.calls]
    latent_codes: dict[str, LatentCodes] = {}
    for layer_name in layers:
        layer: Any = stream.model.get_submodule(layer_name)
        float_layer: Any = reference.model.get_submodule(layer_name)
        tensor = "parametrizations.weight.original" if parametrize.is_parametrized(layer, "weight") else "weight"
        inside = f"{layer_name}.{tensor}".removeprefix(f"{name}.")
        latent_codes[inside] = LatentCodes(layer.weight.detach(), float_layer.weight.detach())

    def weights() -> dict[str, Tensor]:
        return {key: codes.weight() for key, codes in latent_codes.items()}

    before = _error(block, {}, stream.calls, targets)
    parameters = [p for codes in latent_codes.values() for p in (codes.latent, codes.log_gain)]
    optimizer = torch.optim.Adam(parameters, lr=settings.lr)
    generator = torch.Generator().manual_seed(settings.seed)
    order: list[int] = []
    for step in range(settings.steps):
        optimizer.param_groups[0]["lr"] = settings.lr * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        order = order or torch.randperm(len(targets), generator=generator).tolist()
        batch = order.pop()
        with torch.enable_grad():
            loss = F.mse_loss(_output(block, stream.calls[batch], weights()), targets[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for codes in latent_codes.values():
            codes.latent.data.clamp_(-1, 1)  # where the gradient can still bring it back

    learned = {key: weight.detach() for key, weight in weights().items()}
    better = _error(block, learned, stream.calls, targets) < before
    return dict(zip(layers, learned.values(), strict=True)) if better else {}


@torch.no_grad()
def _error(block: nn.Module, weights: dict[str, Tensor], calls: list[Call], targets: list[Tensor]) -> float:
    """Squared error of the block's outputs, summed over all batches."""
    return sum(
        float((_output(block, call, weights) - target).square().sum())
        for call, target in zip(calls, targets, strict=True)
    )


def _output(block: nn.Module, call: Call, weights: dict[str, Tensor] | None = None) -> Tensor:
    """The output of one call, with `weights` in the place of the block's own; the first of a tuple.

    A module that the block holds under two names is given its weight once: twice, it would be put back once.
    """
    output = functional_call(block, weights or {}, call.args, call.kwargs, tie_weights=False)
    return output[0] if isinstance(output, tuple) else output
