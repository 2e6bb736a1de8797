"""Physical removal of channels that carry nothing from a packed network: smaller, faster, and the same bit for bit.

A channel goes if it is 0 for every image (a pruned filter), or if nothing that reaches the logits reads it. Its codes,
gain and bias go from the node that makes it, and the matching input columns from every node that reads it. Neither
changes an accumulator, which is an integer sum of what is left, nor any float operation of another channel.

Channels of nodes that are joined by a residual addition or a pool have the same index and can only go together. The
image's channels and the logits stay, and so does one channel of every node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .nodes import IMAGE, Node


def remove_dead_channels(nodes: Sequence[Node]) -> list[Node]:
    """Return nodes that compute the same logits, bit for bit, without channels that are always 0 or never used.

    The nodes given, of which only convolutions read the image (`network.to_nodes`), are not changed; tensors that lose
    nothing are shared with them.
    """
    slim = list(nodes)
    while True:
        kept = _kept_channels(slim)
        if all(bool(k.all()) for k in kept):
            return slim
        # Again afterwards: a channel whose only reader has gone is unused now.
        slim = [_slice(node, kept[i], None if node.input == IMAGE else kept[node.input]) for i, node in enumerate(slim)]


def _kept_channels(nodes: list[Node]) -> list[Tensor]:
    """For each node, a bool mask (N,) of its output channels that stay."""
    zero = _always_zero(nodes)
    used = _used(nodes, zero)
    group = _joined(nodes)
    kept: dict[int, Tensor] = {}
    for i, root in enumerate(group):
        needed_N = used[i] & ~zero[i]
        kept[root] = kept[root] | needed_N if root in kept else needed_N
    for root, mask_N in kept.items():
        if group[-1] == root:
            mask_N.fill_(True)
        elif not mask_N.any():
            mask_N[0] = True
    return [kept[root] for root in group]


def _always_zero(nodes: list[Node]) -> list[Tensor]:
    """For each node, a bool mask (N,) of the output channels that are 0 for every image."""
    zero: list[Tensor] = []
    for node in nodes:
        if node.op in ("max_pool", "avg_pool"):
            zero.append(zero[node.input])
            continue
        assert node.codes is not None and node.gain is not None and node.bias is not None
        value_N = node.bias.cpu()  # where all codes are 0, y = 0 · gain + bias
        value_N = value_N.clamp_min(0) if node.relu else value_N
        value_N = value_N if node.out_max is None else value_N.round().clamp(0, node.out_max)
        zero_N = ~node.codes.flatten(1).any(1).cpu() & (value_N == 0) & node.gain.cpu().isfinite()
        if node.residual is not None:
            zero_N &= zero[node.residual]
        zero.append(zero_N)
    return zero


def _used(nodes: list[Node], zero: list[Tensor]) -> list[Tensor]:
    """For each node, a bool mask (N,) of the output channels that a convolution or linear layer reads.

    Pools and additions read too, but share their fate with what they read (`_joined`).
    """
    used = [torch.zeros_like(zero_N) for zero_N in zero]
    for node in nodes:
        if node.input != IMAGE and node.codes is not None:
            channels = len(zero[node.input])
            used[node.input] |= node.codes.any(0).reshape(channels, -1).any(1).cpu()
    return used


def _joined(nodes: list[Node]) -> list[int]:
    """For each node, the smallest index of the nodes that must keep the same channels as it."""
    group: list[int] = []
    for i, node in enumerate(nodes):
        partner = node.input if node.codes is None else node.residual  # a pool adds nothing
        group.append(i if partner is None else group[partner])
    return group


def _slice(node: Node, kept_N: Tensor, kept_C: Tensor | None) -> Node:
    """The node with only the output channels `kept_N` and, unless None, the input channels `kept_C`."""
    codes = node.codes
    if codes is None:
        return node
    assert node.gain is not None and node.bias is not None
    if kept_C is not None and not bool(kept_C.all()):
        columns = kept_C.to(codes.device)
        if node.op == "linear":  # (N, K) is (N, C, H·W), flattened
            columns = columns.repeat_interleave(codes.shape[1] // len(kept_C))
        codes = codes[:, columns].contiguous()
    if bool(kept_N.all()):
        return node if codes is node.codes else replace(node, codes=codes)
    rows = kept_N.to(codes.device)
    return replace(node, codes=codes[rows], gain=node.gain[rows], bias=node.bias[rows])
