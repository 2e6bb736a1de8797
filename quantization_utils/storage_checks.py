"""What a model file says of its model, held against what a model can be: nothing here builds or allocates anything."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

from torch.nn.modules import module as torch_module

from .file_format import ModelFileError, Stored, is_shape
from .nodes import IMAGE, Node
from .packing import CODES_PER_BYTE, ENCODINGS, Bits
from .quantizers import fits_int32

DTYPE_OF = {"F64": "float64", "I64": "int64", "F32": "float32", "I32": "int32", "F16": "float16", "BF16": "bfloat16",
            "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}  # fmt: skip
MAX_SIDE = 1 << 12
MAX_NODES = 1000  # the kernels run a network in one parallel region, which has room for 1023 nodes (threads.h)
MAX_OPTION = 1 << 16  # the largest number in a constructor: classes, widths, image sizes
# Letters, digits and underscores: a file never names a path, an address or a repository for a constructor to fetch.
PLAIN_WORD = re.compile(r"[A-Za-z0-9_]{0,64}")


@dataclass
class Record:
    """A tensor of the model: its own shape and dtype, and how it is stored. `bits` and `encoding`: codes only."""

    stored: Stored
    shape: tuple[int, ...]
    dtype: str
    bits: Bits | None = None
    encoding: str = ""


def require(condition: bool, sentence: str) -> None:
    """Raises ModelFileError with `sentence` unless the condition holds."""
    if not condition:
        raise ModelFileError(sentence)


def whole(value: Any, low: int, high: int) -> bool:
    """Whether `value` is an integer (True is none) in [low, high]."""
    return type(value) is int and low <= value <= high


def check_record(name: str, stored: Stored, entry: Any) -> Record:
    """What the list of tensors says of a stored tensor.

    Raises:
        ModelFileError: it contradicts itself, the tensor, or the bound on codes per byte.
    """
    require(isinstance(entry, dict), f"tensor {name!r} is described by no JSON object")
    if "encoding" not in entry:
        dtype = entry.get("dtype", DTYPE_OF[stored.dtype])
        fits = set(entry) <= {"sha256", "dtype"} and (
            dtype == DTYPE_OF[stored.dtype] or (stored.dtype, dtype) == ("F16", "float32")
        )
        require(fits, f"tensor {name!r} cannot be read as {str(dtype)[:20]!r}")
        return Record(stored, stored.shape, dtype)
    require(set(entry) == {"sha256", "encoding", "bits", "shape"}, f"the codes {name!r} are not described as codes are")
    bits, encoding = entry["bits"], entry["encoding"]
    known = bits in ("ternary", 8) and type(bits) in (str, int) and encoding in ENCODINGS[bits]
    require(known, f"the codes {name!r} have an unknown encoding")
    require(is_shape(entry["shape"]), f"the codes {name!r} have a shape that is none")
    require(stored.dtype == "U8" and len(stored.shape) == 1, f"the codes {name!r} are not stored as bytes")
    count = math.prod(entry["shape"])
    require(count <= CODES_PER_BYTE * stored.nbytes, f"the codes {name!r} claim {count} codes in {stored.nbytes} bytes")
    return Record(stored, tuple(entry["shape"]), "int8", bits, encoding)


def check_constructor(constructor: Any) -> None:
    """A model's name, number of classes and options, that say nothing but structure."""
    require(
        isinstance(constructor, dict) and set(constructor) == {"name", "num_classes", "options"},
        "its constructor is none",
    )
    require(
        isinstance(constructor["name"], str) and whole(constructor["num_classes"], 2, MAX_OPTION),
        "its constructor is none",
    )
    require(isinstance(constructor["options"], dict), "its constructor has no options")
    require(constructor["options"].get("checkpoint") is None, "its constructor names a checkpoint to fetch")
    _check_plain(constructor["options"])


def _check_plain(value: Any) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            require(
                PLAIN_WORD.fullmatch(key) is not None and not key.startswith("_"), "its constructor has an odd option"
            )
            _check_plain(item)
    elif isinstance(value, list):
        for item in value:
            _check_plain(item)
    elif isinstance(value, (int, float)):
        # A constructor may make a list of this length (transformers: a name for each of num_labels classes).
        require(abs(value) <= MAX_OPTION, f"its constructor has an option beyond {MAX_OPTION}")
    elif isinstance(value, str):
        require(
            PLAIN_WORD.fullmatch(value) is not None, "its constructor has an option that could be a path or an address"
        )


def check_normalization(mean: Any, std: Any) -> None:
    """Finite numbers for three channels (or one for all), and a standard deviation that is positive."""
    for values in (mean, std):
        fits = isinstance(values, (list, tuple)) and len(values) in (1, 3)
        require(fits and all(type(v) in (int, float) and abs(v) < 1e9 for v in values), "its normalisation is none")
    require(all(v > 1e-9 for v in std), "its normalisation divides by nothing")


@contextmanager
def bounded_construction(tensors: int) -> Iterator[None]:
    """Stop a constructor that makes more parameters than the file has tensors: a forged depth would build for ever."""
    thread, counts = threading.get_ident(), {"parameters": 0, "modules": 0}

    def count(what: str, limit: int) -> Any:
        def hook(*_: Any) -> None:
            if threading.get_ident() == thread:
                counts[what] += 1
                require(counts[what] <= limit, f"its constructor makes more {what} than the file has tensors for")

        return hook

    handles = [
        torch_module.register_module_parameter_registration_hook(count("parameters", tensors)),
        torch_module.register_module_module_registration_hook(count("modules", 16 * tensors + 256)),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


NODE_DEFAULTS = {f.name: f.default for f in fields(Node) if f.name not in ("op", "input")}
NODE_TENSORS = ("codes", "gain", "bias", "pad_values")
NODE_DTYPES = {"codes": "int8", "gain": "float32", "bias": "float32", "pad_values": "uint8"}


def check_network(network: Any, records: Mapping[str, Record], classes: int | None) -> list[Node]:
    """Return the nodes, without their tensors, of a list that is a network from its image to its logits.

    Raises:
        ModelFileError: a node reads what is not there, shapes do not chain, tensors are missing, misshaped or left
        over.
    """
    require(isinstance(network, dict) and set(network) == {"image", "nodes"}, "its network is none")
    image, described = network["image"], network["nodes"]
    require(
        is_shape(image) and len(image) == 3 and all(1 <= n <= MAX_SIDE for n in image), "its network has no image shape"
    )
    fits = isinstance(described, list) and 1 <= len(described) <= MAX_NODES
    require(fits, f"its network has no nodes or more than {MAX_NODES}")
    used: set[str] = set()
    nodes: list[Node] = []
    shapes: dict[int, tuple[int, ...]] = {IMAGE: tuple(image)}
    integer: dict[int, bool] = {IMAGE: True}  # whether a node's output is codes (what layers and pools read)
    for index, members in enumerate(described):
        where = f"node {index}"
        node = _node_of(members, index, where)
        held = {t: records[f"nodes.{index}.{t}"] for t in NODE_TENSORS if f"nodes.{index}.{t}" in records}
        used |= {f"nodes.{index}.{t}" for t in held}
        for tensor, record in held.items():
            require(record.dtype == NODE_DTYPES[tensor], f"tensor 'nodes.{index}.{tensor}' is {record.dtype}")
        require(node.input != IMAGE or node.op == "conv", f"{where} reads the image and is no convolution")
        require(integer[node.input], f"{where} reads node {node.input}, which puts out no codes")
        shapes[index] = _output_shape(node, {t: r.shape for t, r in held.items()}, shapes[node.input], where)
        if node.op in ("conv", "linear"):
            require(held["codes"].bits == node.weight_bits, f"{where} has codes of other bits than it says")
        if node.residual is not None:
            fits = node.op in ("conv", "linear") and shapes[node.residual] == shapes[index]
            require(fits, f"{where} adds node {node.residual}, which has another shape")
        integer[index] = node.op == "max_pool" or node.out_max is not None
        nodes.append(node)
    require(used == set(records), f"its network has no place for tensor {min(set(records) - used, default='')!r}")
    last = shapes[len(nodes) - 1]
    require(len(last) == 1 and nodes[-1].out_max is None, "its network does not end in logits")
    require(classes is None or last[0] == classes, f"its network puts out {last[0]} logits for {classes} classes")
    return nodes


def _node_of(members: Any, index: int, where: str) -> Node:
    require(isinstance(members, dict) and {"op", "input"} <= set(members), f"{where} is none")
    known = set(members) <= {"op", "input", *NODE_DEFAULTS} - set(NODE_TENSORS)
    require(known and members["op"] in ("conv", "linear", "max_pool", "avg_pool"), f"{where} is of an unknown kind")
    values = {**{k: v for k, v in NODE_DEFAULTS.items() if k not in NODE_TENSORS}, **members}
    require(whole(values["input"], IMAGE, index - 1), f"{where} reads a node that does not come before it")
    residual = values["residual"]
    require(residual is None or whole(residual, 0, index - 1), f"{where} adds a node that does not come before it")
    for name, low in (("kernel", 1), ("stride", 1), ("padding", 0)):
        pair = values[name]
        fits = isinstance(pair, (list, tuple)) and len(pair) == 2 and all(whole(n, low, MAX_SIDE) for n in pair)
        require(fits, f"{where} has a {name} that is none")
        values[name] = tuple(pair)
    fits = all(p < k for p, k in zip(values["padding"], values["kernel"], strict=True))
    require(fits, f"{where} has more padding than kernel")
    gain = values["residual_gain"]
    require(type(gain) in (int, float) and abs(gain) < 3e38, f"{where} has a residual gain that is not finite")
    values["residual_gain"] = float(gain)
    require(isinstance(values["relu"], bool), f"{where} has a relu that is none")
    out_max = values["out_max"]
    all_ones = out_max is None or (whole(out_max, 3, 255) and out_max & (out_max + 1) == 0)
    require(all_ones, f"{where} has no such out_max")
    require(
        values["weight_bits"] in ("ternary", 8) and type(values["weight_bits"]) in (str, int),
        f"{where} has no such bits",
    )
    return Node(**values)


def _output_shape(node: Node, held: dict[str, tuple[int, ...]], source: tuple[int, ...], where: str) -> tuple[int, ...]:
    """The shape that comes out, after a check of the tensors' shapes against each other and the input's."""
    if node.op in ("linear", "avg_pool"):
        whole_input = all(getattr(node, name) == NODE_DEFAULTS[name] for name in ("kernel", "stride", "padding"))
        require(whole_input, f"{where} has a kernel, stride or padding, and takes its whole input")
    if node.op in ("max_pool", "avg_pool"):
        wanted: dict[str, tuple[int, ...]] = {"gain": (1,)} if node.op == "avg_pool" else {}
        require(held == wanted and len(source) == 3, f"{where} does not have the tensors and input of a pool")
        if node.op == "avg_pool":
            return source[:1]
        plain = (
            not node.relu
            and node.out_max is None
            and all(2 * p <= k for p, k in zip(node.padding, node.kernel, strict=True))
        )
        require(plain, f"{where} is a max-pool that does more, or pads more than half its kernel")
        return (source[0], *_sides(node, source, where))
    codes = held.get("codes", ())
    dimensions = 4 if node.op == "conv" else 2
    require(len(codes) == dimensions and min(codes) >= 1, f"{where} has no codes of {dimensions} dimensions")
    pads: dict[str, tuple[int, ...]] = (
        {"pad_values": (codes[1],)} if node.op == "conv" and node.input == IMAGE and "pad_values" in held else {}
    )
    wanted = {"codes": codes, "gain": codes[:1], "bias": codes[:1], **pads}
    require(held == wanted, f"{where} has tensors missing, left over or misshaped beside codes of shape {codes}")
    require(fits_int32(math.prod(codes[1:]), node.weight_bits), f"{where} sums more than an int32 holds")
    if node.op == "linear":
        require(math.prod(source) == codes[1], f"{where} takes {codes[1]} inputs and gets {math.prod(source)}")
        return codes[:1]
    require(len(source) == 3 and source[0] == codes[1], f"{where} takes {codes[1]} channels and gets shape {source}")
    require(node.kernel == codes[2:], f"{where} has a kernel that is not its codes'")
    return (codes[0], *_sides(node, source, where))


def _sides(node: Node, source: tuple[int, ...], where: str) -> list[int]:
    sides = [(n + 2 * p - k) // s + 1 for n, p, k, s in
             zip(source[1:], node.padding, node.kernel, node.stride, strict=True)]  # fmt: skip
    require(min(sides) >= 1, f"{where} has a kernel larger than its input")
    return sides
