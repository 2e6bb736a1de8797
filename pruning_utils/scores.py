"""How much a weight or a filter matters: one function per method, pure; what has the least importance is pruned first.

A score maps `weight` (N, ...) to importances: of the same shape, for single weights, or (N,), one for each filter
(output channel). Any function of a weight can be a score; `@scoring` says what it scores if that is not "single
weights, compared within their layer". The importances of single weights can rank filters too: `prune_` adds them up
over a filter.

Ranks alone count, within what is compared: a layer, or with scope "global" all layers that are pruned together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Score = Callable[..., Tensor]
_S = TypeVar("_S", bound=Callable[..., Tensor])


def scoring(granularity: str = "weight", scope: str = "layer", seeded: bool = False) -> Callable[[_S], _S]:
    """Mark what a score is made for: `prune_` takes it where its caller says nothing else.

    `granularity`: "weight" or "filter". `scope`: "layer" or "global". `seeded`: the score takes a random generator as
    its second argument.
    """

    def mark(score: _S) -> _S:
        attributes: dict[str, Any] = {"granularity": granularity, "scope": scope, "seeded": seeded}
        for name, value in attributes.items():
            setattr(score, name, value)
        return score

    return mark


@scoring(seeded=True)
def random(weight: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Importances drawn uniformly from [0, 1): the control that every other score must beat.

    Drawn on the CPU, so that a seed means the same on every device.
    """
    return torch.rand(weight.shape, generator=generator).to(weight.device)


@scoring()
def l1(weight: Tensor) -> Tensor:
    """|w|: small weights go first. Over a filter, its L1 norm.

    Reference: S. Han et al., "Learning both Weights and Connections for Efficient Neural Networks", arXiv 1506.02626;
    filters: H. Li et al., "Pruning Filters for Efficient ConvNets", arXiv 1608.08710.
    """
    return weight.abs().float()


@scoring(scope="global")
def l1_global(weight: Tensor) -> Tensor:
    """|w|, compared over all layers together: wide layers with small weights lose the most.

    Reference: J. Frankle, M. Carbin, "The Lottery Ticket Hypothesis", arXiv 1803.03635, section 4.
    """
    return weight.abs().float()


@scoring()
def l2(weight: Tensor) -> Tensor:
    """w²: ranks single weights as `l1` does; over a filter, its L2 norm squared, which ranks as the norm does."""
    return weight.float().square()


@scoring(granularity="filter")
def l2_filters(weight: Tensor) -> Tensor:
    """The L2 norm of each filter, (N, ...) → (N,).

    Reference: Y. He et al., "Soft Filter Pruning for Accelerating Deep Convolutional Neural Networks",
    arXiv 1808.06866, section 3.2 (p = 2).
    """
    return weight.flatten(1).float().norm(dim=1)
