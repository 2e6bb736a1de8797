from __future__ import annotations

import torch
from torch import nn

from train_test_utils.evaluate import accuracy_pct, predict


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
