"""CIFAR-10 and CIFAR-100: found on the disk in either usual layout, or downloaded, and checked.

Reference: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", technical report, 2009.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from .dataset import IMAGE_SIZE, ImageDataset, Split
from .output import first_line

DOWNLOADS = ".download-"  # folders of downloads that are under way
SERVER_PATIENCE_SECONDS = 30.0  # without a byte, before the mirror is asked


@dataclass(frozen=True)
class Source:
    """Where a data set comes from and what it must be."""

    name: str
    torchvision: str  # name of the class in torchvision.datasets
    mirror: str  # data set repository on the Hugging Face Hub
    label: str  # label column there
    classes: int
    train_digest: str | None = None  # of the 50,000 training images with labels, in any order; see `digest`
    test_digest: str | None = None
    train_count: int = 50_000
    test_count: int = 10_000


SOURCES = {
    source.name: source
    for source in (
        Source(
            "cifar10", "CIFAR10", "uoft-cs/cifar10", "label", 10,
            train_digest="d17523651dcffdf1be45e6671e5077f61b15cbf5376a64e556c870e6fb6066d3",
            test_digest="ab21d127e2bbf4b95f1588dcadf3c8502b8fedb328dd5315bc7fa51b5ab965c0",
        ),
        Source(
            "cifar100", "CIFAR100", "uoft-cs/cifar100", "fine_label", 100,
            train_digest="6f97a7cebe378765c1f498386fa556b4e2b231efc135c5a49c46ceb4c92b1b33",
            test_digest="fcc850d7d1db11ca3367b03e77876b010b39f658a11decaf8ff5d13fba8201bd",
        ),
    )
}  # fmt: skip


def load_cifar(source: Source, data_dir: Path) -> ImageDataset:
    """Read from `data_dir`, or download there: from the set's own server through torchvision, else from the Hub's
    mirror.

    Layouts: torchvision's (`cifar-10-batches-py`), and Parquet as on the Hub (`train-*.parquet`, `test-*.parquet` in
    `<data_dir>/<name>` or deeper; `img` {bytes, path} in any encoding that Pillow reads, and the label column).

    Raises:
        ValueError: what lies there is incomplete or corrupt.
        FileNotFoundError: it does not lie there and cannot be downloaded.
    """
    found = _read(source, data_dir)
    if found is None:
        _download(source, data_dir)
        found = _read(source, data_dir)
        assert found is not None, "a finished download is found"
    train, test, class_names = found
    for which, split, count in (("training", train, source.train_count), ("test", test, source.test_count)):
        if len(split) != count:
            raise ValueError(
                f"the {which} split of {source.name} in {data_dir} has {len(split)} images instead of {count}: {AGAIN}"
            )
    try:
        dataset = ImageDataset(source.name, class_names, train, test)
    except ValueError as error:
        raise ValueError(f"{error}, in {data_dir}: {AGAIN}") from error
    for which, split, known in (("training", train, source.train_digest), ("test", test, source.test_digest)):
        if known is not None and digest(split) != known:
            raise ValueError(
                f"the {which} images of {source.name} in {data_dir} are not those of {source.name}: {AGAIN}"
            )
    return dataset


AGAIN = "delete its files there, and the next start downloads them again"


def digest(split: Split) -> str:
    """A checksum of the set of (label, image) pairs in any order: the sum of their SHA-256 modulo 2^256."""
    total = 0
    for image, label in zip(split.images.numpy(), split.labels.tolist(), strict=True):
        total += int.from_bytes(hashlib.sha256(bytes([label]) + image.tobytes()).digest(), "big")
    return f"{total % 2**256:064x}"


def _read(source: Source, data_dir: Path) -> tuple[Split, Split, tuple[str, ...]] | None:
    """(training, test, class names) from whichever layout is there, or None."""
    for root in (data_dir, data_dir / source.name):
        if (root / _torchvision_class(source).base_folder).is_dir():
            return _read_torchvision(source, root)
    files = {which: sorted((data_dir / source.name).rglob(f"{which}-*.parquet")) for which in ("train", "test")}
    if not any(files.values()):
        return None
    for which, paths in files.items():
        if not paths:
            raise FileNotFoundError(f"there is no {which}-*.parquet in {data_dir / source.name}: {AGAIN}")
        _check_shards(paths)
    train, test = (_read_parquet(files[which], source) for which in ("train", "test"))
    return train, test, _class_names(files["train"][0], source)


def _torchvision_class(source: Source):  # type: ignore[no-untyped-def]  # torchvision has no types
    from torchvision import datasets

    return getattr(datasets, source.torchvision)


def _read_torchvision(source: Source, root: Path) -> tuple[Split, Split, tuple[str, ...]]:
    try:
        train, test = (_torchvision_class(source)(root, train=which) for which in (True, False))
    except Exception as error:  # torchvision raises what its checksums, pickle and the disk do
        reason = str(error).removesuffix(" You can use download=True to download it")
        raise ValueError(f"{source.name} in {root} is incomplete or corrupt ({reason}): {AGAIN}") from error
    splits = (
        Split(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in (train, test)
    )
    return *splits, tuple(train.classes)


def _check_shards(paths: list[Path]) -> None:
    """Files named …-00000-of-00003 must be all there."""
    expected = paths[0].stem.rpartition("-of-")[2]
    if expected.isdigit() and int(expected) != len(paths):
        raise ValueError(f"{paths[0].parent} has {len(paths)} of {int(expected)} files {paths[0].name[:5]}…: {AGAIN}")


def _read_parquet(paths: list[Path], source: Source) -> Split:
    import pyarrow
    from pyarrow import parquet

    images, labels = [], []
    for path in paths:
        try:
            if missing := {"img", source.label} - set(parquet.read_schema(path).names):
                raise ValueError(f"it has no column {min(missing)!r}")
            table = parquet.read_table(path, columns=["img", source.label])
            encoded = [cell["bytes"] for cell in table["img"].to_pylist()]
            with ThreadPoolExecutor() as pool:  # Pillow decodes without holding the interpreter
                images += pool.map(_decode, encoded)
            labels.append(table[source.label].cast(pyarrow.int64()).to_numpy())
            if labels[-1].dtype != np.int64:
                raise ValueError("an image has no label")
        except Exception as error:  # pyarrow and Pillow raise types of their own for what is damaged
            raise ValueError(f"{path} cannot be read ({first_line(error)}): {AGAIN}") from error
    pixels = np.asarray(images, np.uint8).reshape(-1, IMAGE_SIZE, IMAGE_SIZE, 3)  # there may be none
    return Split(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(np.concatenate(labels)))


def _decode(encoded: bytes) -> np.ndarray:
    try:
        pixels = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
    except UnidentifiedImageError:
        raise ValueError("what should be an image is none that Pillow knows") from None
    if pixels.shape != (IMAGE_SIZE, IMAGE_SIZE, 3):
        raise ValueError(
            f"an image has {pixels.shape[1]}×{pixels.shape[0]} pixels instead of {IMAGE_SIZE}×{IMAGE_SIZE}"
        )
    return pixels


def _class_names(path: Path, source: Source) -> tuple[str, ...]:
    """The names in the file's `huggingface` metadata, or the numbers where it has no such names."""
    from pyarrow import parquet

    try:
        metadata = json.loads(parquet.read_schema(path).metadata[b"huggingface"])
        names = metadata["info"]["features"][source.label]["names"]
    except (KeyError, TypeError, ValueError):
        names = None
    if not isinstance(names, list) or len(names) != source.classes:
        names = range(source.classes)
    return tuple(map(str, names))


def _download(source: Source, data_dir: Path) -> None:
    """To `data_dir`, from the server of the data set's author or, if that fails, from the mirror.

    One process does it while others wait. What was interrupted or failed leaves nothing that looks like data.

    Raises:
        FileNotFoundError: neither could be reached.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    with _alone_in(data_dir):
        if _read(source, data_dir) is not None:  # another process has done it meanwhile
            return
        for abandoned in data_dir.glob(f"{DOWNLOADS}*"):
            shutil.rmtree(abandoned, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=DOWNLOADS, dir=data_dir, ignore_cleanup_errors=True) as folder:
            try:
                _download_from_author(source, data_dir, Path(folder))
                return
            except Exception as error:  # whatever it is, the mirror may do better
                first = first_line(error)
                print(f"{source.name}: the author's server failed ({first}); trying the mirror on the Hub",
                      file=sys.stderr)  # fmt: skip
            try:
                _download_from_mirror(source, data_dir, Path(folder))
            except Exception as error:
                raise FileNotFoundError(
                    f"{source.name} is not in {data_dir} and cannot be downloaded, neither from its author's server "
                    f"({first}) nor from the Hub ({first_line(error)}): connect to a network, or put the files there, "
                    f"in {_torchvision_class(source).base_folder}/ or as {source.name}/*.parquet (see --data-dir)"
                ) from error


def _download_from_author(source: Source, data_dir: Path, folder: Path) -> None:
    from torchvision.datasets.utils import check_integrity

    its_class = _torchvision_class(source)
    archive = data_dir / its_class.filename
    if check_integrity(archive, its_class.tgz_md5):  # somebody has put it there
        (folder / archive.name).symlink_to(archive.resolve())
    with _patience(SERVER_PATIENCE_SECONDS):
        its_class(folder, download=True)
    (folder / its_class.base_folder).rename(data_dir / its_class.base_folder)


def _download_from_mirror(source: Source, data_dir: Path, folder: Path) -> None:
    from huggingface_hub import snapshot_download

    files = folder / source.name
    snapshot_download(source.mirror, repo_type="dataset", allow_patterns="*.parquet", local_dir=files)
    (data_dir / source.name).mkdir(exist_ok=True)
    files.rename(data_dir / source.name / "hub")


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Other processes wait before the same block; the end of this one frees it, too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def _patience(seconds: float) -> Iterator[None]:
    """torchvision sets no time limit for its connections."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
