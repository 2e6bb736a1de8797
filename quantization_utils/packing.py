"""Codes <-> bytes, and the specification of version 1 of the model file.

A reader can be written from this text alone. Integers are little-endian; codes are taken in row-major order of their
shape.

THE FILE is a safetensors file: u64 N, then N bytes of JSON (ASCII, padded at its end with spaces to a multiple of 8),
then the data. The JSON maps tensor names to {"dtype", "shape", "data_offsets": [begin, end]}; the tensors follow one
another without holes, sorted by (item size descending, name). The member "__metadata__" maps these keys to strings:
  format          packed-vision-model
  format_version  1
  file_sha256     SHA-256 of the whole file, in hexadecimal, taken with these 64 digits replaced by zeros
  kind            network | modules
and to strings that hold JSON (sorted keys, no spaces, no NaN):
  constructor     {"name", "num_classes", "options"}: rebuilds the model of this project (`models.build`); may be null
                  for a network
  normalization   {"mean": [...], "std": [...]} in units of 1/255, that the model applies to pixels in [0, 1]; null when
                  it is folded into the first node's gain, bias and pad_values, or when the model has none
  tensors         name -> {"sha256": of the tensor's stored bytes} and, for codes, "bits": "ternary" or 8,
                  "encoding" (below), "shape" of the codes; for a float32 tensor stored as F16 (only when
                  that loses nothing), "dtype": "float32"
  network         kind network: {"image": [C, H, W], "nodes": [...]}; what a node means says `kernels/reference.py`.
                  A node's members at their defaults are left out (`nodes.Node`). Its tensors are nodes.<index>.codes,
                  .gain, .bias, .pad_values
  modules         kind modules: {"packed": {layer: {"act_bits": null or bits}}, "quantized": {module: {"bits"}}}: which
                  linear and convolution layers hold <layer>.codes, .scale (N,), optionally .bias, with weight = codes
                  * scale (scale along dimension 0), and which modules have their output quantized. Other tensors: the
                  state dict. A ViT's MLP may have fewer neurons (rows of fc1, columns of fc2) than its constructor
                  says: those that pruning has silenced
  metadata        what the one who saved it says: classes, training, measured accuracy

ENCODINGS of codes; each is stored as a one-dimensional U8 tensor, the payload. n is the number of codes.
  trits       ternary. Byte j holds codes 5j .. 5j+4 as sum over i of digit(5j+i) * 3^i with digit(0) = 0, digit(+1) =
              1, digit(-1) = 2. ceil(n / 5) bytes, each at most 242; digits past n are 0.
  trits+zstd  one zstd frame of the bytes of `trits` (RFC 8878; content size in the frame header; a window of at most 1
              MiB, or of the content size where that is larger; no dictionary).
  bytes       8 bits. Byte i is code i in two's complement; -128 does not occur.
  bytes+zstd  one zstd frame of the bytes of `bytes`.
  gaps        for many zeros: u32 M, u32 S, S bytes of gaps, then the values. The M gap bytes are read in turn: 255
              means 255 zero codes; g < 255 means g zero codes and then a non-zero code. One more non-zero code is
              imagined after the last, at index n, so all gaps together cover exactly n + 1 codes. In `gaps`, S = M.
              Values, in order, for the non-zero codes (without the imagined one): ternary: one bit each, 1 for -1, the
              first in the lowest bit of the first byte, unused bits 0; 8 bits: one byte each in two's complement.
  gaps+zstd   as `gaps`; the S bytes are one zstd frame of the M gap bytes, and 8-bit values are one zstd frame.
A payload of b bytes stands for at most 256 * b codes, so that no small file can ask for much memory; where a zstd
encoding would break this, the writer takes `gaps`, which cannot. A reader takes any encoding; this writer chooses the
smallest for each tensor, but no zstd frame of `trits` or `bytes` that saves less than half a percent.

Example, ternary codes [0, 1, -1, 1, 1, -1, 0]: digits 0 1 2 1 1 | 2 0 (0 0 0), bytes 0+3+18+27+81 = 129 and 2: hex
8102. As `gaps`: gaps 1 0 0 0 0 1, signs of + - + + - are bits 0b10010: hex 06000000 06000000 010000000001 12.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import numpy as np
import torch
import zstandard
from torch import Tensor

Bits = int | str  # "ternary" or 8

ENCODINGS = {"ternary": ("trits", "trits+zstd", "gaps", "gaps+zstd"), 8: ("bytes", "bytes+zstd", "gaps", "gaps+zstd")}
CODES_PER_BYTE = 256  # at most, see above
LONGEST_EMPTY_FRAME = 4 + 14 + 3 + 4  # magic number, header, last block, checksum
CHUNK = 1 << 16  # codes (times 5) worked on at a time: stays in the cache, and keeps temporary memory small
POWERS = np.array([1, 3, 9, 27, 81], np.uint8)
# Bytes of five codes for every byte value; 2 marks the byte values that stand for nothing.
TRITS_OF_BYTE = np.full((256, 5), 2, np.int8)
TRITS_OF_BYTE[:243] = np.array([0, 1, -1], np.int8)[np.arange(243)[:, None] // POWERS % 3]


def pack_codes(codes: Tensor, bits: Bits) -> tuple[str, bytes]:
    """Return (encoding, payload) of int8 codes of any shape: the smallest of the encodings.

    `bits`: "ternary" (codes in {-1, 0, 1}) or 8 (codes in [-127, 127]).

    Raises:
        ValueError: a code out of range, or another dtype than int8.
    """
    if codes.dtype != torch.int8:
        raise ValueError(f"codes are int8, not {codes.dtype}")
    if bits not in ENCODINGS:
        raise ValueError(f"codes have 'ternary' or 8 bits, not {bits!r}")
    codes_n = codes.cpu().contiguous().view(-1).numpy()
    if codes_n.size:
        low, high = int(codes_n.min()), int(codes_n.max())
        limit = 1 if bits == "ternary" else 127
        if low < -limit or high > limit:
            raise ValueError(f"{bits} codes lie in [-{limit}, {limit}], not in [{low}, {high}]")
    plain = _to_trits(codes_n) if bits == "ternary" else codes_n.view(np.uint8)
    name = "trits" if bits == "ternary" else "bytes"
    candidates = [(name, plain.tobytes())]
    squeezed = _zstd(plain)
    if len(squeezed) < 0.995 * len(plain):  # not for a few bytes: plain ones decode faster
        candidates.append((f"{name}+zstd", squeezed))
    # Gaps cost at least a byte for each non-zero code, so they are out of the question for dense codes.
    if codes_n.size and np.count_nonzero(codes_n) < 0.4 * codes_n.size:
        gaps, values = _to_gaps(codes_n), _values(codes_n, bits)
        stored = _zstd(gaps)
        candidates.append(("gaps", _GAP_HEADER.pack(len(gaps), len(gaps)) + gaps.tobytes() + values))
        values = _zstd(values) if bits == 8 else values
        candidates.append(("gaps+zstd", _GAP_HEADER.pack(len(gaps), len(stored)) + stored + values))
    allowed = [c for c in candidates if codes_n.size <= CODES_PER_BYTE * len(c[1])]
    return min(allowed, key=lambda candidate: len(candidate[1]))  # the first of equals: the simplest


def unpack_codes(payload: bytes | bytearray | memoryview, encoding: str, shape: Sequence[int], bits: Bits) -> Tensor:
    """Return the int8 codes of `shape` that `payload` holds: the inverse of `pack_codes`.

    Every byte of the payload is checked, and no more memory is taken than the shape asks for (which itself is bounded
    by the payload's length).

    Raises:
        ValueError: the payload is not a canonical encoding of codes of this shape.
    """
    if encoding not in ENCODINGS.get(bits, ()):
        raise ValueError(f"there is no encoding {encoding!r} of {bits!r} codes")
    count = math.prod(shape)
    if count > CODES_PER_BYTE * len(payload):
        raise ValueError(f"{count} codes cannot come from {len(payload)} bytes")
    base, _, squeezed = encoding.partition("+")
    if base == "gaps":
        codes_n = _from_gaps(payload, count, bits, bool(squeezed))
    else:
        size = -(-count // 5) if base == "trits" else count
        plain = _unzstd(payload, size) if squeezed else np.frombuffer(payload, np.uint8)
        if len(plain) != size:
            raise ValueError(f"{count} codes take {size} bytes, not {len(plain)}")
        codes_n = _from_trits(plain, count) if base == "trits" else plain.view(np.int8).copy()
        if base == "bytes" and (codes_n == -128).any():
            raise ValueError("the code -128 is out of range")
    return torch.from_numpy(codes_n).view(tuple(shape))


def entropy_bits(codes: Tensor) -> float:
    """Shannon's bound, in bits, for these codes as independent draws of one distribution: n · H(frequencies of the
    codes)."""
    counts = torch.bincount(codes.flatten().to(torch.uint8)).double()
    frequency = counts[counts > 0] / codes.numel()
    return float(0 - (frequency * frequency.log2()).sum()) * codes.numel()


_GAP_HEADER = struct.Struct("<II")


def _to_trits(codes_n: np.ndarray) -> np.ndarray:
    """Five codes to a byte."""
    out = np.empty(-(-codes_n.size // 5), np.uint8)
    for start in range(0, len(out), CHUNK):
        digits = codes_n[5 * start : 5 * (start + CHUNK)].view(np.uint8) & 3  # 0, 1, and 3 for -1
        digits -= digits >> 1
        if digits.size % 5:
            digits = np.append(digits, np.zeros(-digits.size % 5, np.uint8))
        np.matmul(digits.reshape(-1, 5), POWERS, out=out[start : start + CHUNK])
    return out


def _from_trits(plain: np.ndarray, count: int) -> np.ndarray:
    if plain.size and plain.max() > 242:
        raise ValueError(f"a byte of five ternary codes is at most 242, not {plain.max()}")
    codes = np.empty((len(plain), 5), np.int8)
    for start in range(0, len(plain), CHUNK):
        # mode="clip": the indices are known to be good, and numpy is three times faster if it need not say so.
        part = slice(start, start + CHUNK)
        np.take(TRITS_OF_BYTE, plain[part], axis=0, out=codes[part], mode="clip")
    if codes.reshape(-1)[count:].any():
        raise ValueError("the digits after the last code are not zero")
    return codes.reshape(-1)[:count]


def _to_gaps(codes_n: np.ndarray) -> np.ndarray:
    parts, last, size = [], -1, codes_n.size
    for start in range(0, size + 1, 16 * CHUNK):
        found = np.flatnonzero(codes_n[start : start + 16 * CHUNK]) + start
        if start + 16 * CHUNK > size:
            found = np.append(found, size)  # the imagined code after the last
        if found.size:
            gap = np.diff(found, prepend=last) - 1
            runs = gap // 255
            part = np.full(gap.size + int(runs.sum()), 255, np.uint8)
            part[np.cumsum(runs + 1) - 1] = gap % 255
            parts.append(part)
            last = found[-1]
    return np.concatenate(parts)


def _values(codes_n: np.ndarray, bits: Bits) -> bytes:
    values = codes_n[codes_n != 0]
    return (np.packbits(values < 0, bitorder="little") if bits == "ternary" else values.view(np.uint8)).tobytes()


def _from_gaps(payload: bytes | bytearray | memoryview, count: int, bits: Bits, squeezed: bool) -> np.ndarray:
    view = memoryview(payload)
    if len(view) < _GAP_HEADER.size:
        raise ValueError("the gaps are cut off")
    length, stored = _GAP_HEADER.unpack_from(view)
    if length > count + 1 or stored > len(view) - _GAP_HEADER.size:
        raise ValueError("the gaps are longer than there is room for")
    gap_part, value_part = view[8 : 8 + stored], view[8 + stored :]
    gaps = _unzstd(gap_part, length) if squeezed else np.frombuffer(gap_part, np.uint8)
    ends = gaps != 255
    nonzero = int(np.count_nonzero(ends)) - 1
    if len(gaps) != length or not length or not ends[-1] or int(gaps.sum(dtype=np.int64)) + nonzero != count:
        raise ValueError("the gaps do not cover the codes")
    values = _read_values(value_part, nonzero, bits, squeezed)
    codes = np.zeros(count + 1, np.int8)
    position, used = -1, 0
    for start in range(0, length, CHUNK):
        part, end = gaps[start : start + CHUNK], ends[start : start + CHUNK]
        reached = np.cumsum(part, dtype=np.int64)
        reached += np.cumsum(end)
        reached += position
        at = reached[end]
        codes[at] = np.append(values[used : used + at.size], np.zeros(max(0, used + at.size - nonzero), np.int8))
        position, used = int(reached[-1]), used + at.size
    return codes[:count]


def _read_values(part: memoryview, nonzero: int, bits: Bits, squeezed: bool) -> np.ndarray:
    if bits == "ternary":
        if len(part) != -(-nonzero // 8):
            raise ValueError(f"{nonzero} signs take {-(-nonzero // 8)} bytes, not {len(part)}")
        signs = np.unpackbits(np.frombuffer(part, np.uint8), bitorder="little")
        if signs[nonzero:].any():
            raise ValueError("the bits after the last sign are not zero")
        return 1 - 2 * signs[:nonzero].view(np.int8)
    values = (_unzstd(part, nonzero) if squeezed else np.frombuffer(part, np.uint8)).view(np.int8)
    if len(values) != nonzero or (values == 0).any() or (values == -128).any():
        raise ValueError("the non-zero codes are not as many as the gaps say, or one is 0 or -128")
    return values


def _zstd(plain: np.ndarray | bytes) -> bytes:
    """One zstd frame. These bytes are close to independent draws: what shortens them is the entropy coding, and long
    runs.

    A minimum match of 7 keeps zstd from spending more on short chance matches than on the literals (at 90% zeros they
    cost up to 15%, measured).
    """
    parameters = zstandard.ZstdCompressionParameters.from_level(1, strategy=zstandard.STRATEGY_FAST, min_match=7)
    return zstandard.ZstdCompressor(compression_params=parameters).compress(
        memoryview(plain) if isinstance(plain, bytes) else plain.data
    )


def _unzstd(frame: bytes | bytearray | memoryview, size: int) -> np.ndarray:
    """The `size` bytes of a frame; what the frame claims of its own size is checked before memory is taken."""
    try:
        header = zstandard.get_frame_parameters(frame)
        if header.content_size != size or header.window_size > max(size, 1 << 20):
            raise ValueError(f"a zstd frame that does not hold {size} bytes")
        if size:
            plain = zstandard.ZstdDecompressor().decompress(frame, max_output_size=size, allow_extra_data=False)
            return np.frombuffer(plain, np.uint8)
        reader = zstandard.ZstdDecompressor().decompressobj()  # `decompress` does not look into a frame of nothing
        if len(frame) <= LONGEST_EMPTY_FRAME:
            reader.decompress(frame)
        if not reader.eof or reader.unused_data:
            raise ValueError("a zstd frame that does not hold 0 bytes")
        return np.empty(0, np.uint8)
    except zstandard.ZstdError as error:
        raise ValueError(f"a damaged zstd frame ({error})") from error
