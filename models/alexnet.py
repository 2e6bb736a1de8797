"""AlexNet for 32×32 images, with the layer sizes of the study that this one succeeds.

Reference: A. Krizhevsky, I. Sutskever, G. Hinton, "ImageNet Classification with Deep Convolutional Neural Networks",
NeurIPS 2012. All convolutions are 3×3; batch norm (S. Ioffe, C. Szegedy, arXiv 1502.03167) is the default.
"""

from __future__ import annotations

from torch import nn

from .normalize import Normalize

#            out channels, max-pool after it (kernel, stride)     sides of a 32×32 image
CONVOLUTIONS = [
    (64, (2, 2)),  # 32 → 16
    (192, (2, 2)),  # 16 → 8
    (384, None),
    (256, None),
    (256, (3, 1)),  # 8 → 6
]


def alexnet(num_classes: int, batch_norm: bool = True, dropout: float | None = None) -> nn.Module:
    """Convolutions 64-192-384-256-256, classifier 9216-4096-4096-classes; images (N, 3, 32, 32).

    `batch_norm=False` is the original. `dropout` defaults to 0.5 without batch norm and 0.2 with it.

    Raises:
        ValueError: a dropout outside [0, 1), or a batch_norm that is neither true nor false.
    """
    if not isinstance(batch_norm, bool):
        raise ValueError(f"batch_norm is true or false, not {batch_norm!r}")
    rate = dropout if dropout is not None else (0.2 if batch_norm else 0.5)
    if not isinstance(rate, (int, float)) or not 0 <= rate < 1:
        raise ValueError(f"dropout is a fraction in [0, 1), not {rate!r}")
    layers: list[nn.Module] = [Normalize()]
    in_channels = 3
    for out_channels, pool in CONVOLUTIONS:
        layers.append(nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=not batch_norm))
        layers += [nn.BatchNorm2d(out_channels)] if batch_norm else []
        layers.append(nn.ReLU())
        layers += [nn.MaxPool2d(*pool)] if pool else []
        in_channels = out_channels
    layers.append(nn.Flatten())
    in_features = in_channels * 6 * 6
    for _ in range(2):
        layers += [nn.Dropout(rate), nn.Linear(in_features, 4096, bias=not batch_norm)]
        layers += [nn.BatchNorm1d(4096)] if batch_norm else []
        layers.append(nn.ReLU())
        in_features = 4096
    layers.append(nn.Linear(4096, num_classes))
    model = nn.Sequential(*layers)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model
