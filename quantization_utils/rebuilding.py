"""From a file's description of a module tree to that tree: on the meta device, and every claim of the file checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

import models
from models.normalize import Normalize

from .bit_layers import PackedConv2d, PackedLinear, Quantized, StaticQuantizer
from .file_format import ModelFileError
from .packed_encoder import fuse_encoder_, mlp_layers
from .packing import Bits
from .storage_checks import Record, bounded_construction, check_normalization, require, whole


def rebuild(constructor: dict[str, Any], described: Any, records: Mapping[str, Record]) -> nn.Module:
    """Return the model on the meta device, its packed layers in place, ready for `load_state_dict(assign=True)`.

    `described`: the value of `modules` in the file's metadata (see `packing.py`). `records`: its tensors by name.

    Raises:
        ModelFileError: constructor, packed layers and tensors do not belong together.
    """
    model = _build(constructor, len(records))
    _swap_layers(model, described, records)
    model.float()  # whatever PyTorch's default type is
    _check_state(model, records)
    _restore_normalization(model)
    return fuse_encoder_(model)


def normalization_of(model: nn.Module) -> dict[str, Any] | None:
    """Of the model's first (and only) Normalize, in units of 1/255."""
    for module in model.modules():
        if isinstance(module, Normalize):
            return {"mean": list(module.mean), "std": list(module.std)}
    return None


def _build(constructor: dict[str, Any], tensors: int) -> nn.Module:
    """The model on the meta device: structure without memory."""
    try:
        with torch.device("meta"), bounded_construction(tensors):
            return models.build(constructor["name"], constructor["num_classes"], **constructor["options"])
    except ModelFileError:
        raise
    except Exception as error:  # options of a forged file can make a constructor fail in any way
        raise ModelFileError(
            f"its constructor does not build a model ({type(error).__name__}: {str(error)[:200]})"
        ) from error


def _swap_layers(model: nn.Module, described: Any, records: Mapping[str, Record]) -> None:
    """Put packed layers and quantized outputs where the file says they are."""
    require(
        isinstance(described, dict) and set(described) == {"packed", "quantized"}, "its list of packed layers is none"
    )
    packed, quantized = described["packed"], described["quantized"]
    require(isinstance(packed, dict) and isinstance(quantized, dict), "its list of packed layers is none")
    built = dict(model.named_modules())
    shapes = _shapes_of_codes(model, records)
    for name, options in packed.items():
        layer, codes = built.get(name), records.get(f"{name}.codes")
        if not isinstance(layer, (nn.Linear, nn.Conv2d)) or codes is None or codes.bits is None:
            raise ModelFileError(f"there is no layer {name!r} to pack")
        fits = isinstance(options, dict) and set(options) == {"act_bits"}
        require(
            fits and (options["act_bits"] is None or whole(options["act_bits"], 2, 8)),
            f"layer {name!r} has no such bits",
        )
        require(codes.shape == shapes[name], f"the codes of layer {name!r} have the wrong shape")
        model.set_submodule(name, _empty_packed(layer, codes.shape, codes.bits, options["act_bits"]))
    for name, options in quantized.items():
        leaf = name in built and not list(built[name].children())
        require(leaf and name not in packed and name != "", f"there is no module {name!r} to quantize")
        fits = isinstance(options, dict) and set(options) == {"bits"} and whole(options["bits"], 2, 8)
        require(fits, f"module {name!r} has no such bits")
        with torch.device("meta"):
            model.set_submodule(name, Quantized(built[name], StaticQuantizer(options["bits"], 1.0)))


def _shapes_of_codes(model: nn.Module, records: Mapping[str, Record]) -> dict[str, tuple[int, ...]]:
    """The shape that each layer's codes must have: its weight's, less the neurons that both layers of an MLP lack."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    shapes = {name: tuple(layer.weight.shape) for name, layer in layers.items()}
    for first, second in mlp_layers(model):
        codes = records.get(f"{first}.codes")
        if codes is not None and codes.shape and 1 <= codes.shape[0] <= shapes[first][0]:
            neurons = codes.shape[0]
            shapes[first], shapes[second] = (neurons, shapes[first][1]), (shapes[second][0], neurons)
    return shapes


def _empty_packed(
    layer: nn.Linear | nn.Conv2d, shape: tuple[int, ...], bits: Bits, act_bits: int | None
) -> nn.Module:
    codes = torch.empty(shape, dtype=torch.int8, device="meta")
    scale_N = torch.empty(len(codes), device="meta")
    bias_N = None if layer.bias is None else torch.empty(len(codes), device="meta")
    if isinstance(layer, nn.Linear):
        return PackedLinear(codes, scale_N, bias_N, bits, act_bits)
    geometry = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation, "groups": layer.groups}
    return PackedConv2d(codes, scale_N, bias_N, bits, act_bits, geometry=geometry)


def _check_state(model: nn.Module, records: Mapping[str, Record]) -> None:
    expected = model.state_dict()
    extra, missing = records.keys() - expected.keys(), expected.keys() - records.keys()
    require(not extra, f"its model has no place for tensor {min(extra, default='')!r}")
    require(not missing, f"tensor {min(missing, default='')!r} is missing")
    for name, tensor in expected.items():
        record, dtype = records[name], str(tensor.dtype).removeprefix("torch.")
        require(
            record.shape == tuple(tensor.shape),
            f"tensor {name!r} has shape {record.shape}, its model {tuple(tensor.shape)}",
        )
        require(record.dtype == dtype, f"tensor {name!r} is {record.dtype}, its model {dtype}")
        require((record.bits is not None) == (dtype == "int8"), f"tensor {name!r} is stored in the wrong way")


def _restore_normalization(model: nn.Module) -> None:
    """Fill the buffers of `Normalize`, which are made from constructor arguments and no part of the state dict."""
    for module in model.modules():
        if isinstance(module, Normalize):
            check_normalization(module.mean, module.std)
            module._buffers.update(Normalize(module.mean, module.std).float()._buffers)
    kept = set(model.state_dict())
    lost = [name for name, buffer in model.named_buffers() if buffer.is_meta and name not in kept]
    assert not lost, f"buffers that are neither saved nor restored: {lost}"
