"""Models <-> files: `save_model` and `load_model`. The file is specified in `packing.py`.

A file is read in this order: sizes against its real length, version, hashes, what it says of its model (a list of
nodes, or a constructor built without memory) against its tensors, and only then codes are unpacked and values looked
at.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from . import kernels
from .bit_layers import BitConv2d, BitLinear, PackedConv2d, PackedLinear, Quantized
from .file_format import VERSION, ModelFileError, Stored, dump_json, parse_json, read_file, sha256_all, write_file
from .network import PackedNetwork
from .packing import Bits, pack_codes, unpack_codes
from .quantizers import is_finite
from .rebuilding import normalization_of, rebuild
from .scale_rounding import WORTH_HALVING, with_float16_scales
from .storage_checks import (
    DTYPE_OF,
    NODE_DEFAULTS,
    NODE_TENSORS,
    Record,
    check_constructor,
    check_network,
    check_record,
    require,
)

SAFETENSORS_DTYPE = {getattr(torch, name): code for code, name in DTYPE_OF.items()}
OWN_METADATA = (
    "format_version",
    "kind",
    "constructor",
    "normalization",
)  # written from the model, whatever the caller says


def save_model(
    model: nn.Module,
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any] | None = None,
    calibration_images: Tensor | None = None,
) -> int:
    """Write a packed or float model to one file, atomically; return its length in bytes. The model is not changed.

    `metadata`: JSON values that travel along: training provenance, measured accuracy; "classes", if there, is a list of
    their names. What `load_model` returns can be given back. `calibration_images` (B, 3, H, W): scales and biases of
    packed layers are stored as float16 where that changes next to no class (`scale_rounding`); without images they stay
    float32, as gains and biases of a `PackedNetwork` do. Saving a loaded file gives the same bytes.

    Raises:
        ValueError: the model is not packed yet, or cannot be rebuilt from `model.constructor`; metadata is not JSON.
        OSError: the file cannot be written; it says what is there now.
    """
    model = model if calibration_images is None else with_float16_scales(model, calibration_images)
    tensors, own = _describe_network(model) if isinstance(model, PackedNetwork) else _describe_modules(model)
    user = {k: v for k, v in (metadata or {}).items() if k not in OWN_METADATA}
    try:
        own = {key: dump_json(value) for key, value in {**own, "metadata": user}.items()}
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata and constructor options must be JSON values ({error})") from error
    records = _to_records(tensors)
    digests = sha256_all([r.stored.data for r in records.values()])
    entries = {name: _entry(r, digest) for (name, r), digest in zip(records.items(), digests, strict=True)}
    own |= {"kind": "network" if isinstance(model, PackedNetwork) else "modules", "tensors": dump_json(entries)}
    try:
        rebuilt, _ = check_description(own, records)  # what a reader would refuse is never written
        _check_modules(model, rebuilt)
        check_values(records, {name: tensor for name, (tensor, bits) in tensors.items() if bits is None})
    except ModelFileError as error:
        raise ValueError(f"this model cannot be saved: {error}") from error
    return write_file(path, {name: r.stored for name, r in records.items()}, own)


@torch.inference_mode(False)  # what is made there could not take part in gradients
def load_model(
    path: str | os.PathLike[str], device: str | torch.device = "cpu", backend: str = "auto"
) -> tuple[nn.Module, dict[str, Any]]:
    """Return (model in evaluation mode, metadata) of a file that `save_model` wrote.

    `backend`: the kernels of packed layers (`kernels.available_backends()`). metadata: what was given to `save_model`,
    and "format_version", "kind", "constructor", "normalization".

    Raises:
        FileNotFoundError: there is no such file.
        ModelFileError: the file is damaged, forged, cut off, of a newer version, or something else.
        ValueError: a backend or a device that is not here.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"there is no device {str(device)!r} here: choose cpu") from error
    _, model, values, tensors = read_checked(path)
    if isinstance(model, PackedNetwork):
        for name, tensor in tensors.items():
            _, index, field = name.split(".")
            setattr(model.nodes[int(index)], field, tensor)
    else:
        model.load_state_dict(tensors, strict=True, assign=True)
    _set_backend(model, backend)
    user = values.pop("metadata")
    own_values = {k: values.get(k) for k in OWN_METADATA} | {"format_version": VERSION}
    return model.eval().to(device), {**user, **own_values}


def read_checked(
    path: str | os.PathLike[str],
) -> tuple[dict[str, Record], nn.Module, dict[str, Any], dict[str, Tensor]]:
    """(records, model without values, what the metadata says, tensors) of a file that passes all checks.

    Raises:
        FileNotFoundError, ModelFileError: as `load_model`.
    """
    try:
        own, stored = read_file(path)
        entries = parse_json(own["tensors"], "the list of tensors")
        records = {name: check_record(name, tensor, entries[name]) for name, tensor in stored.items()}
        model, values = check_description(own, records)
        with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool:
            tensors = dict(zip(records, pool.map(decode_record, records, records.values()), strict=True))
        check_values(records, tensors)
    except ModelFileError as error:
        raise ModelFileError(f"{os.fspath(path)}: {error}") from error
    return records, model, values, tensors


def _describe_network(model: PackedNetwork) -> tuple[dict[str, tuple[Tensor, Bits | None]], dict[str, Any]]:
    """(tensors by name with the bits of codes, JSON values) of a list of nodes."""
    tensors: dict[str, tuple[Tensor, Bits | None]] = {}
    nodes = []
    for index, node in enumerate(model.nodes):
        for field in NODE_TENSORS:
            if getattr(node, field) is not None:
                tensors[f"nodes.{index}.{field}"] = (
                    getattr(node, field),
                    node.weight_bits if field == "codes" else None,
                )
        plain = {f: getattr(node, f) for f in NODE_DEFAULTS if f not in NODE_TENSORS}
        members = {f: value for f, value in plain.items() if value != NODE_DEFAULTS[f]}
        if "residual_gain" in members:
            members["residual_gain"] = float(node.residual_gain)
        nodes.append({"op": node.op, "input": node.input, **members})
    network = {"image": list(model.image_shape), "nodes": nodes}
    return tensors, {"constructor": model.constructor, "normalization": None, "network": network}


def _describe_modules(model: nn.Module) -> tuple[dict[str, tuple[Tensor, Bits | None]], dict[str, Any]]:
    """The same of a module tree: its state dict, with parametrizations (pruning masks) applied."""
    for name, module in model.named_modules():
        if isinstance(module, (BitLinear, BitConv2d)):
            raise ValueError(f"layer {name!r} is still trainable: call pack_(model) before saving")
    constructor = getattr(model, "constructor", None)
    if constructor is None:
        reason = getattr(model, "why_no_network", "")
        raise ValueError(
            "a file has to say how to rebuild its model: make it by models.build(...)"
            + (f", or so that it packs to a network, which it did not ({reason})" if reason else "")
        )
    tensors: dict[str, tuple[Tensor, Bits | None]] = {name: (t, None) for name, t in model.state_dict().items()}
    packed, quantized = {}, {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, (PackedLinear, PackedConv2d)):
            packed[name] = {"act_bits": module.act_bits}
            tensors[prefix + "codes"] = (module.get_buffer("codes"), module.weight_bits)
        elif isinstance(module, Quantized):
            quantized[name] = {"bits": module.quantizer.bits}
        if hasattr(module, "parametrizations"):
            for tensor_name in module.parametrizations:
                tensors[prefix + tensor_name] = (getattr(module, tensor_name), None)
            hidden = prefix + "parametrizations."
            tensors = {k: v for k, v in tensors.items() if not k.startswith(hidden)}
    described = {"packed": packed, "quantized": quantized}
    return tensors, {"constructor": constructor, "normalization": normalization_of(model), "modules": described}


def _check_modules(model: nn.Module, rebuilt: nn.Module) -> None:
    """Refuse to save what a reader would take for the model of its constructor, and was changed since."""
    if isinstance(model, PackedNetwork):
        return  # its nodes are all there is of it

    def said(module: nn.Module) -> tuple[type, str]:
        return type_before_parametrizations(module), module.extra_repr()

    expected = {name: said(module) for name, module in rebuilt.named_modules()}
    for name, module in model.named_modules():
        if "parametrizations" in name.split("."):
            continue
        what = f"{type(module).__name__}({module.extra_repr()})"
        require(said(module) == expected.get(name), f"its {name} is {what}, which its constructor does not make")
        require(not (module._forward_hooks or module._forward_pre_hooks), f"{name or 'it'} has hooks: remove them")


def _to_records(tensors: Mapping[str, tuple[Tensor, Bits | None]]) -> dict[str, Record]:
    with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool:  # numpy and zstd release the interpreter lock
        return dict(zip(tensors, pool.map(_to_record, tensors, tensors.values()), strict=True))


def _to_record(name: str, item: tuple[Tensor, Bits | None]) -> Record:
    tensor, bits = item
    if bits is not None:
        encoding, payload = pack_codes(tensor, bits)
        return Record(Stored("U8", (len(payload),), payload), tuple(tensor.shape), "int8", bits, encoding)
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype not in SAFETENSORS_DTYPE:
        raise ValueError(f"tensor {name!r} is {tensor.dtype}, which a file cannot hold")
    dtype = DTYPE_OF[SAFETENSORS_DTYPE[tensor.dtype]]
    stored = tensor.half() if is_float16(tensor) else tensor
    data = stored.view(-1).view(torch.uint8).numpy() if stored.numel() else b""
    return Record(Stored(SAFETENSORS_DTYPE[stored.dtype], tuple(stored.shape), data), tuple(tensor.shape), dtype)


def is_float16(tensor: Tensor) -> bool:
    """Whether a float32 tensor survives float16 bit for bit; a few values usually tell."""

    def survives(part: Tensor) -> bool:
        return torch.equal(part.half().float().view(torch.int32), part.view(torch.int32))

    return (
        tensor.dtype == torch.float32
        and tensor.numel() >= WORTH_HALVING
        and survives(tensor.view(-1)[:64])
        and survives(tensor.view(-1))
    )


def _entry(record: Record, digest: str) -> dict[str, Any]:
    if record.bits is not None:
        return {"sha256": digest, "bits": record.bits, "encoding": record.encoding, "shape": list(record.shape)}
    return {"sha256": digest} | ({"dtype": record.dtype} if record.dtype != DTYPE_OF[record.stored.dtype] else {})


def check_description(own: Mapping[str, str], records: dict[str, Record]) -> tuple[nn.Module, dict[str, Any]]:
    """Return (model without values, kind and JSON values of the metadata) once everything that is said fits together.

    Raises:
        ModelFileError: it does not.
    """
    kind = own.get("kind")
    require(kind in ("network", "modules"), "its metadata names no kind of model")
    mine = ("constructor", "normalization", "metadata", "network" if kind == "network" else "modules")
    known = {"format", "format_version", "file_sha256", "kind", "tensors", *mine}
    require(set(mine) <= set(own) <= known, "its metadata has members missing or left over")
    values: dict[str, Any] = {"kind": kind} | {key: parse_json(own[key], key) for key in mine}
    constructor, user = values["constructor"], values["metadata"]
    if constructor is not None:
        check_constructor(constructor)
    classes = None if constructor is None else constructor["num_classes"]
    require(isinstance(user, dict), "its metadata is no JSON object")
    if "classes" in user:
        names = user["classes"]
        fits = (
            isinstance(names, list) and all(isinstance(n, str) for n in names) and len(names) == (classes or len(names))
        )
        require(fits, "its classes are not as many names as it has logits")
        classes = len(names)  # that a network without a constructor is held against too
    if kind == "network":
        require(
            values["normalization"] is None, "a network has its normalisation folded in, and this one names another"
        )
        nodes = check_network(values["network"], records, classes)
        return PackedNetwork(nodes, constructor, image_shape=tuple(values["network"]["image"])), values
    require(constructor is not None, "it has no constructor")
    model = rebuild(constructor, values["modules"], records)
    require(values["normalization"] == normalization_of(model), "its normalisation is not what its model does")
    return model, values


def decode_record(name: str, record: Record) -> Tensor:
    """The tensor itself.

    Raises:
        ModelFileError: its codes are out of range or not canonically stored.
    """
    if record.bits is not None:
        try:
            return unpack_codes(memoryview(record.stored.data), record.encoding, record.shape, record.bits)
        except ValueError as error:
            raise ModelFileError(f"the codes {name!r} are not right: {error}") from error
    stored_dtype = getattr(torch, DTYPE_OF[record.stored.dtype])
    if math.prod(record.shape) == 0:
        return torch.empty(record.shape, dtype=getattr(torch, record.dtype))
    if stored_dtype == torch.bool:
        require(record.stored.data.max() <= 1, f"tensor {name!r} has truth values that are none")
    return torch.from_numpy(record.stored.data).view(stored_dtype).view(record.shape).to(getattr(torch, record.dtype))


def check_values(records: Mapping[str, Record], tensors: Mapping[str, Tensor]) -> None:
    """Require finite floats, positive scales, and no negative variances.

    Raises:
        ModelFileError: a tensor has others.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        require(is_finite(tensor), f"tensor {name!r} has values that are not finite")
        layer, _, last = name.rpartition(".")
        if last == "scale" and f"{layer}.codes" in records:
            require(bool((tensor > 0).all()), f"scales {name!r} are not all positive")
        if last == "running_var":
            require(bool((tensor >= 0).all()), f"variances {name!r} are not all positive or zero")


def _set_backend(model: nn.Module, backend: str) -> None:
    if backend != "auto":
        kernels.resolve(backend, "cpu")  # says what is in the way
    for module in model.modules():
        if isinstance(module, (PackedNetwork, PackedLinear, PackedConv2d)):
            module.backend = backend
        if isinstance(module, PackedConv2d) and backend.startswith("cpu") and not module.has_kernel:
            raise ValueError(kernels.NO_KERNEL.format(backend=backend))
    model.requires_grad_(False)  # as pack_ leaves it
