"""A packed ViT as one operator: only attention needs all tokens of an image, so all else stays in the cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from models.state import has_hooks
from models.vit import ViT

from . import kernels
from .bit_layers import PackedConv2d, PackedLinear

HEAD_MULTIPLE = 16  # the kernels take heads of whole vectors


class PackedEncoder:
    """A packed ViT on the fused kernels, or module by module where these cannot run.

    Called with hidden states float32 (B, T, D) it runs the encoder's layers, and returns those of the first `kept`
    tokens (B, kept, D); the last layer computes no others. `classify` goes all the way from images to logits: patches
    and classifier are part of the operator if they are packed. It reads the modules at its first call on the CPU, and
    again after `reset`.
    """

    def __init__(self, model: ViT) -> None:
        self.network: Any = model.network
        self.normalize = model.normalize
        self._runner: Any = None  # False: module by module

    def __call__(self, hidden_BTD: Tensor, kept: int) -> Tensor:
        runner = self._ready()
        if runner:
            return runner(hidden_BTD, kept)
        for layer in self.network.vit.layers:
            hidden_BTD = layer(hidden_BTD)
        return hidden_BTD[:, :kept]

    def classify(self, images_NCHW: Tensor) -> Tensor:
        """Logits of images in [0, 1] of the network's size."""
        runner = self._ready()
        if not runner:
            return self.network(self.normalize(images_NCHW)).logits
        vit = self.network.vit
        x = images_NCHW if runner.embeds else vit.embeddings(self.normalize(images_NCHW))
        return runner.classify(x) if runner.classes else self.network.classifier(vit.layernorm(runner(x, 1)[:, 0]))

    def reset(self) -> None:
        self._runner = None

    @property
    def backend(self) -> str | None:
        """The kernels of the fused operator; None where modules run one by one."""
        return self._runner.backend if self._runner else None

    def _ready(self) -> Any:
        if self._runner is None:
            self._runner = self._fused() or False
        return self._runner

    def _fused(self) -> Any:
        network = self.network
        first = network.vit.layers[0].attention.q_proj
        layers = []
        for layer in network.vit.layers:
            queries, keys, values, *others = linear_layers(layer)
            three = (queries, keys, values)
            biases = [torch.zeros_like(layer.scale) if layer.bias is None else layer.bias for layer in three]
            codes, scales = ([getattr(layer, name) for layer in three] for name in ("codes", "scale"))
            qkv = tuple(map(torch.cat, (codes, scales, biases)))
            norms = (layer.layernorm_before, layer.layernorm_after)
            layers.append((qkv, *map(_dense, others), [t for n in norms for t in (n.weight, n.bias)]))
        config, act_bits = network.config, first.act_bits
        return kernels.make_encoder(
            layers, config.num_attention_heads, config.layer_norm_eps, act_bits,
            self._embedding(act_bits), self._head(act_bits), first.backend,
        )  # fmt: skip

    def _embedding(self, act_bits: int) -> dict[str, Any] | None:
        embeddings, size = self.network.vit.embeddings, self.network.config.image_size
        patches = embeddings.patch_embeddings.projection
        if not _runs_as(patches, act_bits) or not patches.has_kernel:
            return None
        positions_TD = embeddings.position_embeddings[0].clone()
        positions_TD[0] += embeddings.cls_token[0, 0]
        mean, std = self.normalize.mean_C11.flatten(), self.normalize.std_C11.flatten()
        return {"patches": _dense(patches), "size": (size, size), "mean": mean, "std": std, "positions": positions_TD}

    def _head(self, act_bits: int) -> dict[str, Any] | None:
        norm, classifier = self.network.vit.layernorm, self.network.classifier
        if not _runs_as(classifier, act_bits):
            return None
        return {"norm": (norm.weight, norm.bias), "classifier": _dense(classifier)}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_runner": None}


def _dense(layer: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    return layer.codes, layer.scale, layer.bias


def _runs_as(layer: Any, act_bits: int) -> bool:
    """Whether a layer is packed with activations of so many bits."""
    return isinstance(layer, (PackedLinear, PackedConv2d)) and layer.act_bits == act_bits


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
    """Let a packed ViT run its encoder as one operator, if it is built as the kernels expect; return the model.

    One with hooks, which may change what its modules put out, goes on running them one by one.
    """
    if isinstance(model, ViT) and not has_hooks(model.network):
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
            model.encoder = PackedEncoder(model)
    return model


@contextmanager
def layer_by_layer(model: nn.Module) -> Iterator[None]:
    """A packed ViT runs its modules one by one, so that hooks on them are called."""
    encoders = [module.encoder for module in model.modules() if isinstance(module, ViT) and module.encoder is not None]
    before = [encoder._runner for encoder in encoders]
    for encoder in encoders:
        encoder._runner = False
    try:
        yield
    finally:
        for encoder, runner in zip(encoders, before, strict=True):
            encoder._runner = runner
