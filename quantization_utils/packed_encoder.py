"""The encoder of a packed ViT as one operator: only attention needs all tokens, so all else stays in the cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from models.vit import ViT

from . import kernels
from .bit_layers import PackedLinear

HEAD_MULTIPLE = 16  # the kernels take heads of whole vectors


class PackedEncoder:
    """The layers of a ViT's encoder: hidden states float32 (B, T, D) → of the first `kept` tokens, (B, kept, D).

    On the fused kernels, where the last layer computes no more than these need, or one by one. It reads the modules at
    its first call on the CPU, and again after `reset`.
    """

    def __init__(self, layers: Any, heads: int, epsilon: float) -> None:
        self.layers, self.heads, self.epsilon = layers, heads, epsilon
        self._runner: Any = None

    def __call__(self, hidden_BTD: Tensor, kept: int) -> Tensor:
        if self._runner is None:
            self._runner = self._fused() or self._one_by_one
        return self._runner(hidden_BTD, kept)

    def reset(self) -> None:
        self._runner = None

    @property
    def backend(self) -> str | None:
        """The kernels of the fused encoder; None where its layers run one by one."""
        return getattr(self._runner, "backend", None)

    def _one_by_one(self, hidden_BTD: Tensor, kept: int) -> Tensor:
        for layer in self.layers:
            hidden_BTD = layer(hidden_BTD)
        return hidden_BTD[:, :kept]

    def _fused(self) -> Any:
        first = self.layers[0].attention.q_proj
        layers = []
        for layer in self.layers:
            queries, keys, values, *others = linear_layers(layer)
            biases = [layer.bias for layer in (queries, keys, values)]
            qkv = (
                torch.cat([layer.codes for layer in (queries, keys, values)]),
                torch.cat([layer.scale for layer in (queries, keys, values)]),
                None if any(bias is None for bias in biases) else torch.cat(biases),  # type: ignore[arg-type]
            )
            norms = (layer.layernorm_before, layer.layernorm_after)
            layers.append(
                (qkv, *((o.codes, o.scale, o.bias) for o in others), [t for n in norms for t in (n.weight, n.bias)])
            )
        return kernels.make_encoder(layers, self.heads, self.epsilon, first.act_bits, first.backend)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_runner": None}


def linear_layers(layer: Any) -> list[Any]:
    """Of a `transformers` ViT layer: queries, keys, values, output of attention, first and second of the MLP."""
    attention, mlp = layer.attention, layer.mlp
    return [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, mlp.fc1, mlp.fc2]


def mlp_layers(model: nn.Module) -> list[tuple[str, str]]:
    """Names of the first and the second linear layer of each MLP of a ViT; none of other models."""
    network: Any = getattr(model, "network", None)
    if not isinstance(model, ViT) or network.config.hidden_act != "gelu":
        return []
    names = {module: name for name, module in model.named_modules()}
    try:
        return [(names[layer.mlp.fc1], names[layer.mlp.fc2]) for layer in network.vit.layers]
    except AttributeError:  # a version of transformers that names its modules in another way
        return []


def remove_dead_neurons_(model: nn.Module) -> nn.Module:
    """Take the neurons of a packed ViT's MLPs away that are always 0, as pruned filters are; return the model.

    GELU(0) = 0 changes neither a token's largest magnitude nor a sum of integers, so the logits stay the same bit for
    bit. Neurons that nobody reads stay: they take part in the scale of their token. One of each MLP stays, too.
    """
    for first, second in mlp_layers(model):
        fc1, fc2 = model.get_submodule(first), model.get_submodule(second)
        if not (isinstance(fc1, PackedLinear) and isinstance(fc2, PackedLinear)):
            continue
        alive_N = fc1.codes.any(1) if fc1.bias is None else fc1.codes.any(1) | (fc1.bias != 0)
        alive_N[0] |= not alive_N.any()
        fc1.codes, fc1.scale, fc2.codes = fc1.codes[alive_N], fc1.scale[alive_N], fc2.codes[:, alive_N].contiguous()
        fc1.bias = None if fc1.bias is None else fc1.bias[alive_N]
    return model


def fuse_encoder_(model: nn.Module) -> nn.Module:
    """Let a packed ViT run its encoder as one operator, if it is built as the kernels expect; return the model."""
    if isinstance(model, ViT):
        network: Any = model.network
        try:
            config, layers = network.config, network.vit.layers
            packed = [linear for layer in layers for linear in linear_layers(layer)]
        except AttributeError:  # a version of transformers that names its modules in another way
            return model
        bits = {linear.act_bits if isinstance(linear, PackedLinear) else None for linear in packed}
        heads = config.num_attention_heads
        fits = config.hidden_act == "gelu" and config.hidden_size % (heads * HEAD_MULTIPLE) == 0
        if fits and len(bits) == 1 and None not in bits:
            model.encoder = PackedEncoder(layers, heads, config.layer_norm_eps)
    return model


@contextmanager
def layer_by_layer(model: nn.Module) -> Iterator[None]:
    """The encoder of a packed ViT runs its modules one by one, so that hooks on them are called."""
    encoders = [module.encoder for module in model.modules() if isinstance(module, ViT) and module.encoder is not None]
    before = [encoder._runner for encoder in encoders]
    for encoder in encoders:
        encoder._runner = encoder._one_by_one
    try:
        yield
    finally:
        for encoder, runner in zip(encoders, before, strict=True):
            encoder._runner = runner
