"""Digits, held-out images, orders; augmentation against a plain loop."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from train_test_utils.data import GREY, augment, epoch_order, load_dataset, to_float
from train_test_utils.dataset import ImageDataset, Split


def test_digits():
    data = load_dataset("digits")
    assert len(data.train) + len(data.test) == 1797
    assert data.train.labels.bincount(minlength=10).min() > 130
    assert not data.flip
    # Nearest neighbour on pixels gets nearly all: the labels belong to the images, in both splits.
    train, test = (s.images[:, 0].flatten(1).float() for s in (data.train, data.test))
    nearest = torch.cdist(test, train).argmin(1)
    assert (data.train.labels[nearest] == data.test.labels).float().mean() > 0.97


def test_the_digits_are_the_same_at_all_times():
    """Results of before are only added to if they are: every step of their enlargement is exact in float32."""
    assert load_dataset("digits").fingerprint == "59054187932ee747"


def test_held_out_images_are_training_images_and_no_longer_trained_on():
    data = load_dataset("digits")
    part = data.held_out(0.1)
    assert (len(part.train), len(part.test)) == (1298, 144)
    rows = {image.numpy().tobytes() for image in data.train.images}
    train = [image.numpy().tobytes() for image in part.train.images]
    held = [image.numpy().tobytes() for image in part.test.images]
    assert set(train) | set(held) == rows
    assert len(train) + len(held) == len(data.train)
    assert part.fingerprint != data.fingerprint
    for fraction in (0.0001, 1.0):
        with pytest.raises(ValueError, match=f"a held-out fraction of {fraction:g} leaves no images"):
            data.held_out(fraction)


def ten_images():
    """A data set whose images are numbered by their pixels."""
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 3, 32, 32)
    return ImageDataset("ten", ("a", "b"), Split(images, torch.arange(10) % 2), Split(images[:3], torch.arange(3) % 2))


def test_the_same_images_are_held_out_at_all_times():
    part = ten_images().held_out(0.3)
    assert part.name == "ten-heldout0.3" and part.test.images[:, 0, 0, 0].tolist() == [4, 1, 7]


@pytest.mark.parametrize("which", ["train", "test"])
def test_the_fingerprint_changes_with_images_and_labels(which):
    data = ten_images()
    split = getattr(data, which)
    others = [Split(split.images + 1, split.labels), Split(split.images, 1 - split.labels)]
    fingerprints = [data.fingerprint, *(replace(data, **{which: other}).fingerprint for other in others)]
    assert len(set(fingerprints)) == 3 and ten_images().fingerprint == data.fingerprint


def test_epochs_have_their_own_orders():
    orders = [tuple(epoch_order(100, seed, epoch).tolist()) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    assert all(sorted(o) == list(range(100)) for o in orders)
    assert torch.equal(epoch_order(100, 1, 1), epoch_order(100, 1, 1))


def test_augmented_images_are_shifted_mirrored_and_blanked_ones():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (40, 3, 9, 7), dtype=torch.uint8)
    images[images == GREY] += 1
    torch.manual_seed(1)
    out = augment(images, crop_padding=2, flip=True, cutout=3)
    seen = set()
    for image, result in zip(images, out, strict=True):
        padded = torch.nn.functional.pad(image[None].float(), (2, 2, 2, 2), mode="reflect")[0]
        blank = (result == GREY).all(0)
        match = [
            (dy, dx, mirrored)
            for dy in range(5) for dx in range(5) for mirrored in (False, True)
            for crop in [padded[:, dy : dy + 9, dx : dx + 7]]
            if torch.where(blank, result.float(), crop.flip(2) if mirrored else crop).equal(result.float())
        ]  # fmt: skip
        assert len(match) == 1
        assert 0 < blank.sum() <= 9
        seen |= set(match)
    assert len(seen) > 20
    assert {mirrored for *_, mirrored in seen} == {False, True}


def test_half_of_the_images_are_mirrored():
    images = torch.arange(9, dtype=torch.uint8).expand(2000, 3, 9, 9)
    mirrored = augment(images, crop_padding=0)[:, 0, 0, 0] == 8
    assert 900 < mirrored.sum() < 1100


def test_images_are_shifted_to_either_side_and_not_at_all():
    columns = torch.arange(9, dtype=torch.uint8).expand(200, 3, 9, 9)
    for images in (columns, columns.mT):
        middle = augment(images, crop_padding=2, flip=False)[:, 0, 4, 4]
        assert middle.unique().tolist() == [2, 3, 4, 5, 6]


def test_a_blanked_square_may_stand_over_the_edge():
    images = torch.zeros(500, 3, 9, 7, dtype=torch.uint8)
    blank = augment(images, crop_padding=0, cutout=4)[:, 0] == GREY
    assert blank.sum((1, 2)).min() == 4 and blank.any(0).all()


def test_no_augmentation_is_the_image():
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(augment(images, crop_padding=0, flip=False, cutout=0), images)


def test_to_float_hits_both_ends():
    assert to_float(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == pytest.approx([0.0, 0.2, 1.0])


TWO = Split(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("images", "labels", "said"),
    [
        (torch.zeros(2, 3, 32, 32), [0, 1], "not uint8"),
        (torch.zeros(2, 1, 32, 32, dtype=torch.uint8), [0, 1], "not uint8"),
        (torch.zeros(2, 3, 32, dtype=torch.uint8), [0, 1], "not uint8"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), [0, -1], "has the label -1"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), [0], "2 images and 1 labels"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), [0.0, 1.0], "labels of it are torch.float32, not int64"),
    ],
)
def test_a_data_set_is_checked(images, labels, said):
    with pytest.raises(ValueError, match=said):
        ImageDataset("it", ("a", "b"), Split(images, torch.tensor(labels)), TWO)


def test_the_test_split_is_checked_too():
    with pytest.raises(ValueError, match="the test split of it has the label 2; labels go from 0 to 1"):
        ImageDataset("it", ("a", "b"), TWO, replace(TWO, labels=torch.tensor([0, 2])))
    with pytest.raises(ValueError, match="the test split of it has 0 images and 0 labels"):
        ImageDataset("it", ("a", "b"), TWO, TWO[:0])


def test_one_class_is_none():
    alike = replace(TWO, labels=torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="it has 1 class: at least two are needed"):
        ImageDataset("it", ("a",), alike, alike)
