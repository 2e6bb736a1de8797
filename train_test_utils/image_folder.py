"""A data set of one's own: a folder with a folder of images for each class."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from .dataset import IMAGE_SIZE, ImageDataset, Split, every_fifth_of_a_class

TEST_FOLDERS = ("test", "val", "valid", "validation")


def load_image_folder(folder: Path) -> ImageDataset:
    """`<folder>/<class>/<image>`, or the same below `<folder>/train` and `<folder>/test` (or val, valid, validation).

    Images are cut to a centred square and resized to 32×32. Without a test folder every fifth image of a class, in the
    order of the file names, is for testing.

    Raises:
        ValueError: fewer than two classes, classes that differ between train and test, a file that is no image, or a
            folder of classes called train without one to test with.
    """
    test_folder = next((folder / name for name in TEST_FOLDERS if (folder / name).is_dir()), None)
    if (folder / "train").is_dir() and test_folder is not None:
        train, names = _read(folder / "train")
        test, test_names = _read(test_folder)
        if names != test_names:
            differ = ", ".join(sorted(set(names) ^ set(test_names)))
            raise ValueError(
                f"the folders of classes in {folder}/train and {test_folder} differ ({differ}): make them the same"
            )
        return ImageDataset(folder.name, names, train, test)
    if (folder / "train").is_dir() and any(path.is_dir() for path in (folder / "train").iterdir()):
        raise ValueError(f"{folder}/train has folders of classes, and beside it is no {' or '.join(TEST_FOLDERS)}")
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
    files = [
        (path, label)
        for label, c in enumerate(classes)
        for path in sorted(c.rglob("*"))
        if path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")
    ]
    missing = [c.name for label, c in enumerate(classes) if all(at != label for _, at in files)]
    if missing:
        raise ValueError(f"there is no image in {folder / missing[0]}: add some, or remove the folder")
    with ThreadPoolExecutor() as pool:
        images = list(pool.map(_decode, [path for path, _ in files]))
    labels = torch.tensor([label for _, label in files])
    return Split(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), labels), tuple(
        c.name for c in classes
    )


EXTENSIONS = frozenset(Image.registered_extensions())


def _decode(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16 bits, which Pillow would cut off at 255
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            return np.asarray(ImageOps.fit(upright.convert("RGB"), (IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))
    except Exception as error:  # Pillow raises types of its own: a DecompressionBombError is no OSError
        raise ValueError(f"{path} cannot be read as an image ({error}): repair or remove it") from error
