"""A data set of one's own: a folder with a folder of images for each class."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from .dataset import IMAGE_SIZE, ImageDataset, Split, every_fifth_of_a_class

TRAIN_FOLDERS = ("train", "training", "train_set", "training_set")  # in capitals, too
TEST_FOLDERS = ("test", "testing", "val", "valid", "validation", "eval", "test_set", "validation_set")


def load_image_folder(folder: Path) -> ImageDataset:
    """`<folder>/<class>/<image>`, or the same below two folders of `TRAIN_FOLDERS` and `TEST_FOLDERS`.

    Images are cut to a centred square and resized to 32×32; what is transparent is white. Hidden files and folders are
    left out. Without a test folder every fifth image of a class, in the order of the file names, is for testing.

    Raises:
        ValueError: fewer than two classes, other classes in test than in train, a file that is no image or whose
            black and white are unknown, images that are all of one colour, or a folder of classes called train
            without one to test with.
    """
    subfolders = {path.name.lower(): path for path in folder.iterdir() if path.is_dir()}
    train_folder, test_folder = (
        next((subfolders[name] for name in names if name in subfolders), None)
        for names in (TRAIN_FOLDERS, TEST_FOLDERS)
    )
    if train_folder is not None and test_folder is not None:
        train, names = _read(train_folder)
        test, test_names = _read(test_folder)
        if names != test_names:
            differ = ", ".join(sorted(set(names) ^ set(test_names)))
            raise ValueError(
                f"the folders of classes in {train_folder} and {test_folder} differ ({differ}): make them the same"
            )
        return ImageDataset(folder.name, names, train, test)
    if train_folder is not None and any(path.is_dir() for path in train_folder.iterdir()):
        raise ValueError(f"{train_folder} has folders of classes, and beside it is no {' or '.join(TEST_FOLDERS)}")
    everything, names = _read(folder)
    is_test = every_fifth_of_a_class(everything.labels)
    for label, name in enumerate(names):
        if not is_test[everything.labels == label].any():
            raise ValueError(
                f"the class {name!r} in {folder} has fewer than 5 images, too few to keep some for testing: add images"
            )
    return ImageDataset(folder.name, names, everything[~is_test], everything[is_test])


def _read(folder: Path) -> tuple[Split, tuple[str, ...]]:
    classes = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(classes) < 2:
        raise ValueError(f"{folder} needs a folder of images for each class, at least two, and has {len(classes)}")
    inside = [{p.name: p.is_dir() for p in c.iterdir() if not p.name.startswith(".")} for c in classes]
    if len(inside[0]) > 1 and all(entries == inside[0] and all(entries.values()) for entries in inside):
        raise ValueError(
            f"{' and '.join(c.name for c in classes)} in {folder} have the same folders: call them train and test if "
            "they are splits; if they are classes, move their images out of these folders"
        )
    files = [
        (path, label)
        for label, c in enumerate(classes)
        for path in sorted(Path(at, name) for at, _, names in os.walk(c, followlinks=True) for name in names)
        if path.suffix.lower() in EXTENSIONS and path.is_file() and not _is_hidden(path.relative_to(c))
    ]
    missing = [c.name for label, c in enumerate(classes) if all(at != label for _, at in files)]
    if missing:
        raise ValueError(f"there is no image in {folder / missing[0]}: add some, or remove the folder")
    with ThreadPoolExecutor() as pool:
        images = np.stack(list(pool.map(_decode, [path for path, _ in files])))
    if images.min() == images.max():
        raise ValueError(f"the images in {folder} are of one colour, all of them: are they what they should be?")
    labels = torch.tensor([label for _, label in files])
    return Split(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels), tuple(c.name for c in classes)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)  # a folder too, as .ipynb_checkpoints


EXTENSIONS = frozenset(Image.registered_extensions())


def _decode(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16") or (upright.mode == "I" and image.format == "PNG"):
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))  # Pillow would cut off at 255
            if upright.mode in ("I", "F"):
                raise ValueError("its numbers do not say what is white: save it with 8 or 16 bits")
            if upright.has_transparency_data:
                white = Image.new("RGBA", upright.size, "white")
                upright = Image.alpha_composite(white, upright.convert("RGBA"))
            return np.asarray(ImageOps.fit(upright.convert("RGB"), (IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))
    except Exception as error:  # Pillow raises types of its own: a DecompressionBombError is no OSError
        raise ValueError(f"{path} cannot be read as an image ({error}): repair or remove it") from error
