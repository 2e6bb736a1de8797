"""What a model file holds: bytes, codes and their entropy, layer by layer, beside what other formats would take."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from .packing import Bits, entropy_bits
from .quantizers import dequantize
from .storage import read_checked
from .storage_checks import Record


@dataclass
class Layer:
    """The codes of one layer, or (`bits` 32, 16 …) one tensor that is stored as it is."""

    name: str
    shape: tuple[int, ...]
    bits: Bits
    encoding: str
    weights: int
    file_bytes: int
    zeros: int
    ideal_bits: float  # entropy of the codes (`packing.entropy_bits`); of a tensor stored as it is, its bits

    @property
    def is_codes(self) -> bool:
        return self.encoding != "as it is"


@dataclass
class FileReport:
    """Sizes of a model file, in bytes. Other formats are reckoned for the same tensors, without headers."""

    path: str
    kind: str
    file_bytes: int
    layers: list[Layer]  # of codes
    others: list[Layer]  # stored as they are

    @property
    def weights(self) -> int:
        """How many codes the file has."""
        return sum(layer.weights for layer in self.layers)

    @property
    def zero_fraction(self) -> float:
        """Of the codes; 0 where there are none."""
        return sum(layer.zeros for layer in self.layers) / max(self.weights, 1)

    @property
    def other_bytes(self) -> int:
        """Bytes in the file of the tensors that are stored as they are."""
        return sum(layer.file_bytes for layer in self.others)

    @property
    def ideal_bytes(self) -> float:
        """Entropy of each layer's codes, one by one (zstd may do better), and the other tensors' bytes."""
        return sum(layer.ideal_bits for layer in self.layers) / 8 + self.other_bytes

    @property
    def log2_3_bytes(self) -> float:
        """log2(3) bits for a ternary code, 8 for an 8-bit one, and the other tensors' bytes."""
        bits = sum(layer.weights * (math.log2(3) if layer.bits == "ternary" else 8) for layer in self.layers)
        return bits / 8 + self.other_bytes

    def bytes_at(self, weight_bytes: int, other_bytes: int) -> int:
        """With so many bytes for a weight and for every other number (float32: 4, 4; int8: 1, 4).

        Of the tensors stored as they are, those of two and more dimensions hold weights.
        """
        weights = self.weights + sum(other.weights for other in self.others if len(other.shape) > 1)
        others = sum(other.weights for other in self.others if len(other.shape) < 2)
        return weights * weight_bytes + others * other_bytes

    @property
    def float_bytes(self) -> int:
        """Bytes of all tensors in float32."""
        return self.bytes_at(4, 4)


def inspect_file(path: str | os.PathLike[str]) -> FileReport:
    """Read a model file, with all checks of `load_model`, and report on it.

    Raises:
        FileNotFoundError, ModelFileError: as `load_model`.
    """
    records, _, values, tensors = read_checked(path)
    with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool:
        names = sorted(records, key=_by_number)
        layers = list(pool.map(lambda name: _layer(name, records[name], tensors[name]), names))
    codes = [layer for layer in layers if layer.is_codes]
    others = [layer for layer in layers if not layer.is_codes]
    return FileReport(os.fspath(path), values["kind"], os.path.getsize(path), codes, others)


def gzip_float_bytes(path: str | os.PathLike[str]) -> int:
    """The size of the file's tensors, weights multiplied out to float32, after gzip (level 6)."""
    records, _, _, tensors = read_checked(path)

    def squeezed(name: str) -> int:
        tensor = tensors[name]
        if records[name].bits is not None:
            tensor = dequantize(tensor, _scale_of(name, tensors))
        return len(zlib.compress(tensor.float().flatten().numpy().data, 6))

    with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool:
        return sum(pool.map(squeezed, records))


def _by_number(name: str) -> list[tuple[int, str]]:
    """A key that puts layer 2 before layer 10."""
    return [(int(part) if part.isdigit() else -1, part) for part in name.split(".")]


def _scale_of(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    layer = name.rpartition(".")[0]
    return next(tensors[n] for n in (f"{layer}.scale", f"{layer}.gain") if n in tensors).float()


def _layer(name: str, record: Record, tensor: Tensor) -> Layer:
    weights = math.prod(record.shape)
    if record.bits is None:
        stored_bits = 8 * record.stored.nbytes
        return Layer(
            name,
            record.shape,
            stored_bits // max(weights, 1),
            "as it is",
            weights,
            record.stored.nbytes,
            0,
            stored_bits,
        )
    layer = name.removesuffix(".codes")
    zeros = weights - int(torch.count_nonzero(tensor))
    return Layer(
        layer, record.shape, record.bits, record.encoding, weights, record.stored.nbytes, zeros, entropy_bits(tensor)
    )
