"""Predictions and accuracy over a whole split."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from models.state import evaluating
from quantization_utils.bit_layers import fixed_weights

from .data import to_float


@torch.inference_mode()
def predict(model: nn.Module, images_u8: Tensor, batch_size: int = 64, dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits (N, classes) on the CPU for uint8 images (N, 3, H, W), whose device and `dtype` are the model's."""
    with evaluating(model), fixed_weights(model):
        return torch.cat([model(to_float(batch).to(dtype)).to(dtype).cpu() for batch in images_u8.split(batch_size)])


def accuracy_pct(logits: Tensor, labels: Tensor) -> float:
    """Share of images whose largest logit is the label's, in percent."""
    return 100 * (logits.argmax(1) == labels.cpu()).double().mean().item()


def agreement_pct(model: nn.Module, images_u8: Tensor, model_logits: Tensor, file_logits: Tensor) -> float:
    """Share of images, in percent, to which a trained model and its packed file give the same class.

    Logits float32 (N, classes). Where they differ a little, the model's are off as often as the file's: a float32 sum
    that ends on the wrong side of a step of quantized activations is off by a whole step from there on. So the images
    whose two best classes are as near as that, a tenth of all at most, are given to the model in float64.
    """
    first, second = model_logits.topk(2).values.T
    margin = first - second
    noise = (model_logits - file_logits).abs().amax(1).quantile(0.99)
    nearest = margin.argsort()[: math.ceil(len(margin) / 10)]
    doubtful = nearest[margin[nearest] < 2 * noise]
    classes = model_logits.argmax(1)
    if len(doubtful):
        exact = copy.deepcopy(model).double()
        classes[doubtful] = predict(exact, images_u8[doubtful.to(images_u8.device)], dtype=torch.float64).argmax(1)
    return 100 * (file_logits.argmax(1) == classes).double().mean().item()
