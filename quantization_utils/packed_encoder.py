"""A packed ViT as one operator: only attention needs all tokens of an image, so all else stays in the cache."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from models.normalize import Normalize
from models.vit import ViT

from . import kernels
from .bit_layers import PackedConv2d, PackedLinear

HEAD_MULTIPLE = 16  # the kernels take heads of whole vectors
backend_of = operator.attrgetter("backend")
version_of = operator.attrgetter("_version")  # which every change of a tensor in place raises


class _Watch:
    """Remembers a model's modules, tensors and backends, to tell in microseconds whether any has changed since.

    `hooks`: the modules' hooks, as dictionaries that fill when one is added.
    """

    def __init__(self, children: dict[str, Any]) -> None:
        modules = [module for child in children.values() for module in child.modules()]
        self.hooks: list[Mapping[int, Any]] = [h for m in modules for h in (m._forward_hooks, m._forward_pre_hooks)]
        groups = [children, *(group for m in modules for group in (m._modules, m._parameters, m._buffers))]
        entries = [(group, name, value) for group in groups for name, value in group.items()]
        self.groups, self.names, self.values = zip(*entries, strict=True)
        self.tensors = [v for v in self.values if isinstance(v, Tensor) and not v.is_inference()]
        self.versions = list(map(version_of, self.tensors))
        self.packed = [m for m in modules if hasattr(m, "backend")]
        self.backends = list(map(backend_of, self.packed))

    def unchanged(self) -> bool:
        found = map(dict.get, self.groups, self.names)
        if not all(map(operator.is_, found, self.values)) or list(map(version_of, self.tensors)) != self.versions:
            return False
        return list(map(backend_of, self.packed)) == self.backends


class PackedEncoder:
    """A packed ViT on the fused kernels; module by module where these cannot run, or where a module has a hook.

    Called with hidden states float32 (B, T, D) it runs the encoder's layers, and returns the hidden states of the first
    `kept` tokens (B, kept, D); the last layer computes no others. `classify` goes all the way from images to logits:
    patches and classifier are part of the operator if they are packed. The modules are read at the first call, and
    again when they have changed, or after `reset`.
    """

    def __init__(self, model: ViT) -> None:
        self._children: dict[str, Any] = model._modules  # not the model, which has this encoder
        self.reset()

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

    @property
    def network(self) -> Any:
        return self._children["network"]

    @property
    def normalize(self) -> Any:
        return self._children["normalize"]

    def reset(self) -> None:
        self._watch: _Watch | None = None
        self._runner: Any = None  # without one, module by module

    @property
    def backend(self) -> str | None:
        """The kernels of the fused operator; None where modules run one by one."""
        return self._runner.backend if self._runner and self._watch and not any(self._watch.hooks) else None

    def _ready(self) -> Any:
        if torch.compiler.is_compiling():  # which would guard every module
            return self._runner if self._watch else self._fused()
        if self._watch is None or not self._watch.unchanged():
            self._watch, self._runner = _Watch(self._children), self._fused()
        return None if any(self._watch.hooks) else self._runner

    def _fused(self) -> Any:
        network = self.network
        if not _fits(network):
            return None
        first = network.vit.layers[0].attention.q_proj
        layers = []
        for layer in network.vit.layers:
            queries, keys, values, out, fc1, fc2 = linear_layers(layer)
            norms = (layer.layernorm_before, layer.layernorm_after)
            layers.append({
                "qkv": _beside_each_other((queries, keys, values)), "out": _dense(out),
                "fc1": _dense(fc1), "fc2": _dense(fc2), "norms": [t for n in norms for t in (n.weight, n.bias)],
            })  # fmt: skip
        config, act_bits = network.config, first.act_bits
        return kernels.make_encoder(
            layers, config.num_attention_heads, config.layer_norm_eps, act_bits,
            self._embedding(act_bits), self._head(act_bits), first.backend,
        )  # fmt: skip

    def _embedding(self, act_bits: int) -> dict[str, Any] | None:
        embeddings, size = self.network.vit.embeddings, self.network.config.image_size
        patches = embeddings.patch_embeddings.projection
        if type(self.normalize) is not Normalize or not _runs_as(patches, act_bits) or not patches.has_kernel:
            return None
        if len(self.normalize.mean) != patches.codes.shape[1]:  # one for all channels, say
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
        return self.__dict__ | {"_watch": None, "_runner": None}


def _dense(layer: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    return layer.codes, layer.scale, layer.bias


def _beside_each_other(layers: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Several layers of the same inputs as one: their outputs concatenated."""
    biases = [torch.zeros_like(layer.scale) if layer.bias is None else layer.bias for layer in layers]
    return torch.cat([la.codes for la in layers]), torch.cat([la.scale for la in layers]), torch.cat(biases)


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
    bit. Neurons that nothing reads stay, because their values count in the scale of their token. At least one neuron of
    each MLP stays, too.
    """
    for first, second in mlp_layers(model):
        fc1, fc2 = model.get_submodule(first), model.get_submodule(second)
        if not (isinstance(fc1, PackedLinear) and isinstance(fc2, PackedLinear)):
            continue
        alive_N = fc1.codes.any(1) if fc1.bias is None else fc1.codes.any(1) | (fc1.bias != 0)
        if alive_N.all():  # as a rule, and a copy of all codes takes its time
            continue
        alive_N[0] |= not alive_N.any()
        fc1.codes, fc1.scale, fc2.codes = fc1.codes[alive_N], fc1.scale[alive_N], fc2.codes[:, alive_N].contiguous()
        fc1.bias = None if fc1.bias is None else fc1.bias[alive_N]
    return model


def fuse_encoder_(model: nn.Module) -> nn.Module:
    """Let a packed ViT run its encoder as one operator, if it is built as the kernels expect; return the model."""
    if isinstance(model, ViT) and _fits(model.network):
        model.encoder = PackedEncoder(model)
    return model


def _fits(network: Any) -> bool:
    """Whether the kernels take a `transformers` ViT: layers packed with the same bits, GELU, heads of whole vectors."""
    try:
        packed = [linear for layer in network.vit.layers for linear in linear_layers(layer)]
    except AttributeError:  # a version of transformers that names its modules in another way
        return False
    bits = {linear.act_bits if isinstance(linear, PackedLinear) else None for linear in packed}
    whole_vectors = network.config.hidden_size % (network.config.num_attention_heads * HEAD_MULTIPLE) == 0
    return network.config.hidden_act == "gelu" and whole_vectors and len(bits) == 1 and None not in bits
