"""Predictions and accuracy over a whole split."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.state import evaluating
from quantization_utils.bit_layers import fixed_weights

from .data import to_float


@torch.inference_mode()
def predict(model: nn.Module, images_u8: Tensor, batch_size: int = 250) -> Tensor:
    """Logits float32 (N, classes) on the CPU for uint8 images (N, 3, H, W), computed on the device of the images."""
    with evaluating(model), fixed_weights(model):
        return torch.cat([model(to_float(batch)).float().cpu() for batch in images_u8.split(batch_size)])


def accuracy_pct(logits: Tensor, labels: Tensor) -> float:
    """Share of images whose largest logit is the label's, in percent."""
    return 100 * (logits.argmax(1) == labels.cpu()).double().mean().item()
