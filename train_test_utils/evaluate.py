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
        return torch.cat([model(to_float(batch).to(dtype)).cpu() for batch in images_u8.split(batch_size)])


def accuracy_pct(logits: Tensor, labels: Tensor) -> float:
    """Share of images whose largest logit is the label's, in percent."""
    return _equal_pct(logits.argmax(1), labels.cpu())


def agreement_pct(
    model: nn.Module, stored: nn.Module, images_u8: Tensor, model_logits: Tensor, file_logits: Tensor
) -> tuple[float, float]:
    """Share of images, in percent, to which a trained model and its packed file give the same class; in float64, too.

    `model_logits`, `file_logits`: float32 (N, classes). Small differences between the two are as often the trained
    model's error as the file's: a float32 sum that ends on the wrong side of a rounding boundary makes an activation
    wrong by a whole step. So the images whose two best classes are closer than such differences, at most a tenth of
    all, are classified by the model in float64.

    For the second share, both classify the images on which they then differ in float64, the file as `stored`, on the
    reference kernels: differences that remain are not the rounding of float32. (A packed convolution network computes
    in integers and float32 whatever it is given, so there the two shares are the same.)
    """
    first, second = model_logits.topk(2).values.T
    margin = first - second
    noise = (model_logits - file_logits).abs().amax(1).quantile(0.99)
    nearest = margin.argsort()[: math.ceil(len(margin) / 10)]
    doubtful = nearest[margin[nearest] < 2 * noise]
    classes, file_classes = model_logits.argmax(1), file_logits.argmax(1)
    classes[doubtful] = _classes_in_float64(model, images_u8, doubtful)
    agreement = _equal_pct(file_classes, classes)
    different = (file_classes != classes).nonzero().flatten()
    for network, own in ((model, classes), (stored, file_classes)):
        own[different] = _classes_in_float64(network, images_u8, different)
    return agreement, _equal_pct(file_classes, classes)


def _classes_in_float64(model: nn.Module, images_u8: Tensor, indices: Tensor) -> Tensor:
    if not len(indices):
        return indices
    exact = copy.deepcopy(model).double()
    return predict(exact, images_u8[indices.to(images_u8.device)], dtype=torch.float64).argmax(1)


def _equal_pct(a: Tensor, b: Tensor) -> float:
    return 100 * (a == b).double().mean().item()
