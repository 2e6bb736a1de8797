"""Folders of class folders of images."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from train_test_utils.data import load_dataset
from train_test_utils.image_folder import TEST_FOLDERS, TRAIN_FOLDERS


def write_images(folder: Path, count: int, shade: int) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (40, 50), (shade, i, 0)).save(folder / f"{i:02}.png")


def test_a_folder_of_class_folders(tmp_path, monkeypatch):
    for name, shade in (("cat", 10), ("dog", 200)):
        write_images(tmp_path / name, 10, shade)
    (tmp_path / "README.md").touch()
    data = load_dataset(str(tmp_path))
    assert data.class_names == ("cat", "dog")
    assert (len(data.train), len(data.test)) == (16, 4)
    assert data.train.images.shape[1:] == (3, 32, 32)
    assert data.test.images[:, 0, 0, 0].tolist() == [10, 10, 200, 200]
    assert data.test.images[:, 1, 0, 0].tolist() == [4, 9, 4, 9]
    monkeypatch.chdir(tmp_path / "cat")
    assert load_dataset("..").name == tmp_path.name


def test_images_in_subfolders_are_cut_to_their_middle_and_hidden_folders_are_no_classes(tmp_path):
    write_images(tmp_path / ".cache", 5, 0)
    striped = Image.new("RGB", (96, 32), "blue")
    striped.paste("red", (32, 0, 64, 32))
    for name, ending in (("a", "PNG"), ("b", "png")):
        (tmp_path / name / "sub").mkdir(parents=True)
        for i in range(5):
            striped.save(tmp_path / name / "sub" / f"{i}.{ending}")
    shutil.move(tmp_path / "b" / "sub", tmp_path / ".elsewhere")
    (tmp_path / "b" / "sub").symlink_to(tmp_path / ".elsewhere")
    data = load_dataset(str(tmp_path))
    assert data.class_names == ("a", "b") and (len(data.train), len(data.test)) == (8, 2)
    assert data.train.images.unique().tolist() == [0, 255] and data.train.images[:, 0].all()


@pytest.mark.parametrize("train", [*TRAIN_FOLDERS, "Train"])
@pytest.mark.parametrize("test", [*TEST_FOLDERS, "TEST"])
def test_a_folder_with_its_own_test_split(train, test, tmp_path):
    for which, count in ((train, 3), (test, 2)):
        for name in ("a", "b"):
            write_images(tmp_path / which / name, count, 0)
    data = load_dataset(str(tmp_path))
    assert (len(data.train), len(data.test)) == (6, 4)
    write_images(tmp_path / test / "c", 1, 0)
    with pytest.raises(ValueError, match=r"differ \(c\)"):
        load_dataset(str(tmp_path))


def test_splits_of_as_many_classes_of_other_names(tmp_path):
    for which, names in (("train", "ab"), ("test", "ac")):
        for name in names:
            write_images(tmp_path / which / name, 2, 0)
    with pytest.raises(ValueError, match=r"differ \(b, c\)"):
        load_dataset(str(tmp_path))


def test_trains_may_be_a_class(tmp_path):
    for name in ("car", "train"):
        write_images(tmp_path / name, 5, 0)
    assert load_dataset(str(tmp_path)).class_names == ("car", "train")


def test_a_folder_of_images_in_each_class_makes_no_splits_of_them(tmp_path):
    for name in ("a", "b"):
        write_images(tmp_path / name / "images", 5, 0)
    assert load_dataset(str(tmp_path)).class_names == ("a", "b")


def test_a_training_folder_alone_is_not_taken_for_a_class(tmp_path):
    for name in ("a", "b"):
        write_images(tmp_path / "train" / name, 5, 0)
    write_images(tmp_path / "holdout" / "a", 5, 0)
    (tmp_path / "test").touch()  # a list of file names, say
    with pytest.raises(ValueError, match="train has folders of classes, and beside it is no test or testing or val"):
        load_dataset(str(tmp_path))


def test_splits_of_other_names_are_not_taken_for_classes(tmp_path):
    for split in ("first", "second"):
        for name in ("a", "b"):
            write_images(tmp_path / "odd" / split / name, 5, 0)
    (tmp_path / "odd" / "second" / ".DS_Store").touch()
    with pytest.raises(ValueError, match="first and second in .*odd have the same folders: call them train and test"):
        load_dataset(str(tmp_path / "odd"))
    for split, name in (("first", "training_set"), ("second", "test_set")):
        (tmp_path / "odd" / split).rename(tmp_path / "odd" / name)
    assert load_dataset(str(tmp_path / "odd")).class_names == ("a", "b")


def test_a_class_without_an_image(tmp_path):
    for which in ("train", "test"):
        write_images(tmp_path / which / "a", 2, 0)
        (tmp_path / which / "empty").mkdir()
    with pytest.raises(ValueError, match="there is no image in .*train/empty: add some, or remove the folder"):
        load_dataset(str(tmp_path))


def test_folders_that_are_no_data_set(tmp_path, monkeypatch):
    write_images(tmp_path / "one" / "cat", 5, 0)
    with pytest.raises(ValueError, match="at least two"):
        load_dataset(str(tmp_path / "one"))
    write_images(tmp_path / "one" / "dog", 4, 0)
    with pytest.raises(ValueError, match="'dog' .* fewer than 5"):
        load_dataset(str(tmp_path / "one"))
    (tmp_path / "one" / "dog" / "x.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="x.png cannot be read as an image"):
        load_dataset(str(tmp_path / "one"))
    (tmp_path / "one" / "dog" / "x.png").unlink()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="png cannot be read as an image .*decompression bomb"):
        load_dataset(str(tmp_path / "one"))
    with pytest.raises(ValueError, match="unknown data set 'cifar11': choose cifar10, cifar100, digits"):
        load_dataset("cifar11")


def test_what_is_hidden_deep_within_is_left_out(tmp_path):
    for name in ("a", "b"):
        write_images(tmp_path / name, 5, 0)
        write_images(tmp_path / name / ".ipynb_checkpoints", 5, 0)
        (tmp_path / name / "folder.png").mkdir()
    data = load_dataset(str(tmp_path))
    assert (len(data.train), len(data.test)) == (8, 2)


def test_what_is_transparent_is_white(tmp_path):
    glyph = Image.new("LA", (32, 32), (0, 0))  # black, and not to be seen
    glyph.paste((0, 255), (8, 0, 24, 32))
    for name in ("a", "b"):
        write_images(tmp_path / name, 5, 0)
        glyph.save(tmp_path / name / "4.png")
        glyph.convert("RGBA").save(tmp_path / name / "04.png")
    data = load_dataset(str(tmp_path))
    drawn = torch.cat([data.train.images, data.test.images])
    drawn = drawn[drawn[:, 2].float().amax((1, 2)) == 255]
    assert len(drawn) == 4 and drawn[:, :, :, 9:23].max() == 0 and drawn[:, :, :, :6].min() == 255


def test_images_that_are_all_black_or_of_unknown_white_are_refused(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(5):
            Image.fromarray(np.full((8, 8), 10 * i, np.uint16)).save(tmp_path / name / f"{i}.png")
    with pytest.raises(ValueError, match="images in .* are of one colour, all of them"):
        load_dataset(str(tmp_path))
    for dtype in (np.int32, np.float32):
        Image.fromarray(np.full((8, 8), 1, dtype)).save(tmp_path / "a" / "x.tiff")
        with pytest.raises(ValueError, match="x.tiff cannot be read .*do not say what is white: save it with 8 or 16"):
            load_dataset(str(tmp_path))


def test_images_that_are_all_white_are_refused(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(5):
            Image.new("L", (8, 8), "white").save(tmp_path / name / f"{i}.png")
    with pytest.raises(ValueError, match="images in .* are of one colour, all of them"):
        load_dataset(str(tmp_path))


def test_large_images_are_averaged(tmp_path):
    """A chessboard of single pixels becomes grey."""
    board = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(5):
            Image.fromarray(board).save(tmp_path / name / f"{i}.png")
    pixels = load_dataset(str(tmp_path)).train.images
    assert 100 < pixels.min() <= pixels.max() < 155


def test_photographs_stand_upright_deep_greys_keep_their_shade_and_shadow_files_are_left_out(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(5):
            Image.fromarray(np.full((8, 8), 20_000, np.uint16)).save(tmp_path / name / f"{i}.png")
        (tmp_path / name / "._0.png").write_bytes(b"of macOS")
    turned = Image.new("RGB", (40, 40))
    turned.paste((255, 0, 0), (0, 0, 40, 20))  # the top, which orientation 6 turns to the right
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "a" / "4.png", exif=exif)
    data = load_dataset(str(tmp_path))
    assert data.train.images.unique().tolist() == [20_000 >> 8]
    (upright,) = data.test.images[data.test.labels == 0]
    assert upright[0, :, 20:].min() > 200 > 50 > upright[0, :, :12].max()
