from __future__ import annotations

import pytest
import torch
from torch import nn

from train_test_utils.evaluate import accuracy_pct, agreement_pct, predict


def test_predictions_are_of_images_between_0_and_1_batch_by_batch():
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(predict(nn.Flatten(), images, 2), (images / 255.0).flatten(1))


def test_a_model_predicts_in_evaluation_and_trains_on():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5)).train()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(predict(model, images), (images / 255.0).flatten(1))
    assert all(m.training for m in model.modules())


def test_accuracy_by_hand():
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, -1.0], [0.0, 0.5]])
    assert accuracy_pct(logits, torch.tensor([0, 1, 1, 1])) == 75.0


class Cancels(nn.Module):
    """Of a pixel p of 0 … 255: logits 1e8 + p - 1e8 and 2.5 (0 and 8 are what float32 makes of the first)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1e8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pixel = (x[:, 0, 0, 0] * 255).round()
        return torch.stack([pixel + self.weight - self.weight, torch.full_like(pixel, 2.5)], 1)


def test_agreement_is_with_the_model_in_float64_where_its_own_rounding_could_decide():
    model = Cancels()
    images = torch.full((20, 3, 2, 2), 200, dtype=torch.uint8)
    images[3], images[5] = 3, 1  # classes 0 and 1; both 1 in float32
    logits = predict(model, images)
    assert logits[[3, 5]].tolist() == [[0, 2.5], [0, 2.5]] and logits[0, 0] == 200
    right = logits.clone()
    right[3, 0] = 3
    assert agreement_pct(model, model, images, logits, right) == (100, 100)
    for image, logit in ((5, 0), (7, 1)):  # next to equal in the model too; not a matter of rounding
        wrong = right.clone()
        wrong[image, logit] = 300
        assert agreement_pct(model, model, images, logits, wrong) == (95, 100)
    assert predict(model, images).dtype == torch.float32 and model.weight.dtype == torch.float32


def test_what_a_file_says_in_float64_too_is_not_the_rounding_of_its_kernels():
    model, stored = Cancels(), Cancels()
    images = torch.full((20, 3, 2, 2), 200, dtype=torch.uint8)
    logits = predict(model, images)
    other = logits.clone()
    other[[4, 9], 1] = 300
    stored.register_forward_hook(lambda module, inputs, output: output.flip(1))
    assert agreement_pct(model, stored, images, logits, other) == (90, 90)


@pytest.fixture
def given(monkeypatch):
    """How many images are given to a model in float64, which puts all of them into class 1."""
    given = []

    def predict(model, images, dtype):
        given.append(len(images))
        return torch.tensor([[0.0, 1.0]] * len(images))

    monkeypatch.setattr("train_test_utils.evaluate.predict", predict)
    return given


def test_a_tenth_of_the_images_at_most_is_given_to_the_model_in_float64(given):
    images, tied = torch.zeros(50, 3, 2, 2, dtype=torch.uint8), torch.tensor([[1e-9, 0.0]] * 50)
    agreement_pct(nn.Identity(), nn.Identity(), images, tied, torch.tensor([[1.0, 0.0]] * 50))
    assert given == [5, 5, 5]  # and where that gives another class to both


def test_one_image_whose_logits_differ_makes_no_others_doubtful(given):
    logits = torch.tensor([[1.0, 0.0]] * 200)
    others = logits.clone()
    others[0, 0] = 300
    assert agreement_pct(nn.Identity(), nn.Identity(), torch.zeros(200, 3, 2, 2), logits, others) == (100, 100)
    assert not given
