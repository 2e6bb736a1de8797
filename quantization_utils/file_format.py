"""One safetensors file: written so that no accident leaves half of it, and read without trusting any of it.

The layout is specified in `packing.py`. This module knows bytes, names, hashes and sizes; `storage.py` knows models.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import stat
import struct
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MAX_HEADER_BYTES = 4 << 20
MAX_DIMENSIONS = 8
ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
FORMAT, VERSION = "packed-vision-model", 1
HASH_KEY = "file_sha256"
NO_HASH = "0" * 64


class ModelFileError(ValueError):
    """A file that is not a model file of this project, or not whole, or not what it says it is."""


@dataclass
class Stored:
    """A tensor as it lies in the file: safetensors dtype, shape, bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: Any  # bytes-like

    @property
    def nbytes(self) -> int:
        return memoryview(self.data).nbytes


def sha256(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_all(parts: list[Any]) -> list[str]:
    """The hashes of several buffers, on several cores (hashlib lets go of the interpreter lock)."""
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        return list(pool.map(sha256, parts))


def dump_json(value: Any) -> str:
    """The one way of writing a value: sorted keys, no spaces, ASCII, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def parse_json(text: str | bytes, what: str) -> Any:
    """JSON, but strict: no member twice, no NaN, no number longer than 64 bits could be, no bottomless nesting.

    Raises:
        ModelFileError: the text is anything else.
    """

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a member appears twice")
        return found

    def integer(digits: str) -> int:
        if len(digits) > 20:
            raise ValueError("a number is too long")
        return int(digits)

    def real(digits: str) -> float:
        if math.isinf(number := float(digits)):
            raise ValueError("a number is too large")
        return number

    def constant(name: str) -> float:
        raise ValueError(f"{name} is not a number")

    try:
        return json.loads(
            text, object_pairs_hook=members, parse_int=integer, parse_float=real, parse_constant=constant
        )
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{what} is not valid JSON ({error})") from error


def write_file(path: str | os.PathLike[str], tensors: Mapping[str, Stored], metadata: Mapping[str, str]) -> int:
    """Write the file atomically and return its length in bytes; format, version and the hash of the whole file are
    added to `metadata`.

    Raises:
        OSError: with one sentence, when it cannot be written; it says whether what was at `path` is as it was.
    """
    names = sorted(tensors, key=lambda name: (-ITEM_BYTES[tensors[name].dtype], name))
    own = {"format": FORMAT, "format_version": str(VERSION), HASH_KEY: NO_HASH}
    header: dict[str, Any] = {"__metadata__": dict(sorted({**metadata, **own}.items()))}
    offset = 0
    for name in names:
        tensor = tensors[name]
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape),
                        "data_offsets": [offset, offset + tensor.nbytes]}  # fmt: skip
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"the description of the model takes {len(text)} bytes: at most {MAX_HEADER_BYTES} fit a file")
    head = struct.pack("<Q", len(text)) + text
    whole = hashlib.sha256(head)
    for name in names:
        whole.update(tensors[name].data)
    head = head.replace(_hash_member(NO_HASH), _hash_member(whole.hexdigest()), 1)
    with replacing(path) as file:
        for part in (head, *(tensors[name].data for name in names)):
            file.write(part)
    return len(head) + offset


def _hash_member(digest: str) -> bytes:
    # Unique in a header: inside a JSON string the quotes would have backslashes.
    return f'"{HASH_KEY}":"{digest}"'.encode("ascii")


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Any]:
    """A binary file that takes the place of `path` when the block ends well, and leaves no trace when it does not.

    Written next to `path`, flushed to the disk, renamed over it, the folder flushed. A process that is killed leaves
    its temporary file behind; the next one that writes to the same path removes it (nobody holds its lock any more).
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(
            errno.ENOENT, "the folder to write to does not exist: create it first", str(target.parent)
        )
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "this is a folder: name a file", str(target))
    if target.exists() and not target.is_file():  # /dev/null would become a file, for all programs
        raise OSError(errno.EINVAL, "this is no regular file: name another", str(target))
    temporary, replaced = None, False
    try:
        _remove_abandoned(target)
        temporary, descriptor = _create_locked(target)
        with open(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(descriptor)
            os.replace(temporary, target)
            temporary, replaced = None, True
        _sync_folder(target.parent)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        if replaced:
            sentence = f"the file is written, but a power cut may lose it: its folder could not be flushed ({reason})"
        else:
            sentence = f"could not write the file ({reason}); what was there before is unchanged"
        raise type(error)(error.errno, sentence, str(target)) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _create_locked(target: Path) -> tuple[Path, int]:
    while True:
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")  # which _remove_abandoned knows
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)  # less the umask
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if temporary.exists():  # else another process took it for abandoned before the lock
            return temporary, descriptor
        os.close(descriptor)


def _remove_abandoned(target: Path) -> None:
    own = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.tmp")
    for entry in os.scandir(target.parent):
        if not (own.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)):
            continue
        try:
            descriptor = os.open(entry.path, os.O_WRONLY)
        except OSError:
            continue  # it just went, or is not ours
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(entry.path)
        except OSError:
            pass  # somebody is writing it
        finally:
            os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_file(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, Stored]]:
    """Return (metadata, tensors by name) of a file whose every byte agrees with its hash.

    Sizes in the header are compared with the file's real length before anything is allocated for them.

    Raises:
        FileNotFoundError: there is no such file.
        ModelFileError: the file is not right.
    """
    try:
        # Not to wait for somebody to write to a pipe.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ModelFileError("this is not a regular file")
            head, metadata, entries = _read_header(file, status.st_size)
            tensors, intact = _read_tensors(file, head, metadata[HASH_KEY], entries)
            _require_hashes(metadata, tensors, intact)
            return metadata, tensors
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(errno.ENOENT, "there is no such model file", str(path)) from error
    except IsADirectoryError as error:
        raise ModelFileError("this is a folder, not a model file") from error


def _read_header(file: Any, size: int) -> tuple[bytes, dict[str, str], dict[str, Any]]:
    prefix = file.read(8)
    if len(prefix) < 8:
        raise ModelFileError(f"the file has {size} bytes, too few for a model: it is cut off")
    (length,) = struct.unpack("<Q", prefix)
    if length > min(size - 8, MAX_HEADER_BYTES):
        raise ModelFileError(
            f"its header would be longer than its {size} bytes allow: the file is cut off or not a safetensors file"
        )
    text = file.read(length)
    if len(text) != length:
        raise ModelFileError("the file became shorter while it was read")
    header = parse_json(text, "the header")
    if not isinstance(header, dict):
        raise ModelFileError("the header is not a JSON object")
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ModelFileError("it has no metadata of this project: it is some other safetensors file")
    _check_version(metadata)
    _check_entries(header, size - 8 - length)
    return prefix + text, metadata, header


def _check_entries(entries: dict[str, Any], data_bytes: int) -> None:
    """Tensors with known types, sizes that follow from their shapes, one after the other over exactly the file's
    data."""
    for name, entry in entries.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise ModelFileError(f"tensor {name!r} is not described by dtype, shape and data_offsets")
        shape, offsets = entry["shape"], entry["data_offsets"]
        if not isinstance(entry["dtype"], str) or entry["dtype"] not in ITEM_BYTES:
            raise ModelFileError(f"tensor {name!r} has an unknown dtype")
        if not is_shape(shape) or not is_shape(offsets) or len(offsets) != 2:
            raise ModelFileError(f"tensor {name!r} has a shape or offsets that are none")
        if math.prod(shape) * ITEM_BYTES[entry["dtype"]] != offsets[1] - offsets[0]:
            raise ModelFileError(f"tensor {name!r} has a shape that does not agree with its size")
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        if begin != position or end > data_bytes:
            where = (
                "lies beyond the end of the file, which is cut off" if end > data_bytes else "leaves a hole or overlaps"
            )
            raise ModelFileError(f"tensor {name!r} {where}")
        position = end
    if position != data_bytes:
        raise ModelFileError(f"{data_bytes - position} bytes at the end of the file belong to no tensor")


def is_shape(value: Any) -> bool:
    """A list of a few non-negative integers (True is none)."""
    return isinstance(value, list) and len(value) <= MAX_DIMENSIONS and all(type(n) is int and n >= 0 for n in value)


def _check_version(metadata: dict[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise ModelFileError(f"its metadata does not say format={FORMAT}: it is some other safetensors file")
    version = metadata.get("format_version", "")
    if version != str(VERSION):
        raise ModelFileError(
            f"it has format version {version[:20]!r}, this program reads {VERSION}: update the program"
        )
    if HASH_KEY not in metadata or "tensors" not in metadata:
        raise ModelFileError("its metadata lacks the hashes")


def _read_tensors(file: Any, head: bytes, digest: str, entries: dict[str, Any]) -> tuple[dict[str, Stored], bool]:
    """The tensors by name, and whether the whole file agrees with `digest`."""
    if len(digest) != 64 or head.count(_hash_member(digest)) != 1:
        raise ModelFileError(f"its {HASH_KEY} is none")
    whole = hashlib.sha256(head.replace(_hash_member(digest), _hash_member(NO_HASH)))
    tensors: dict[str, Stored] = {}
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        data = np.empty(end - begin, np.uint8)
        if file.readinto(data) != end - begin:
            raise ModelFileError(f"the file became shorter while tensor {name!r} was read")
        whole.update(data.data)
        tensors[name] = Stored(entry["dtype"], tuple(entry["shape"]), data)
    return tensors, whole.hexdigest() == digest


def _require_hashes(metadata: dict[str, str], tensors: dict[str, Stored], intact: bool) -> None:
    """The hash of each tensor, which says where the damage is, and of the whole file."""
    recorded = parse_json(metadata["tensors"], "the list of tensors")
    if not isinstance(recorded, dict) or set(recorded) != set(tensors):
        raise ModelFileError("its list of tensors does not name the tensors it holds")
    for (name, _), digest in zip(tensors.items(), sha256_all([t.data for t in tensors.values()]), strict=True):
        if not isinstance(recorded[name], dict) or recorded[name].get("sha256") != digest:
            raise ModelFileError(f"tensor {name!r} does not agree with its SHA-256: the file is damaged")
    if not intact:
        raise ModelFileError("the file does not agree with its SHA-256: it is damaged")
