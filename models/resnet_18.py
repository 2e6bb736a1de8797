"""ResNet-18 for 32×32 images.

Reference: K. He, X. Zhang, S. Ren, J. Sun, "Deep Residual Learning for Image Recognition", arXiv 1512.03385, with the
3×3 stem that is usual on CIFAR.
"""

from __future__ import annotations

from torch import Tensor, nn

from .normalize import Normalize


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut: relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(out_channels))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x_NCHW)))))
        return self.relu2(out + self.shortcut(x_NCHW))


class ResNet18(nn.Module):
    """Stem, four stages of two blocks (64, 128, 256, 512 channels), global average pool, linear classifier."""

    def __init__(self, num_classes: int, stem: str) -> None:
        super().__init__()
        self.normalize = Normalize()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.pool: nn.Module = nn.MaxPool2d(3, 2, padding=1) if stem == "maxpool" else nn.Identity()
        stages = [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]
        self.stages = nn.Sequential(
            *[nn.Sequential(BasicBlock(i, o, s), BasicBlock(o, o, 1)) for i, o, s in stages]
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(512, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images_NCHW: Tensor) -> Tensor:
        x = self.pool(self.relu(self.bn1(self.conv1(self.normalize(images_NCHW)))))
        return self.fc(self.flatten(self.avgpool(self.stages(x))))


def resnet_18(num_classes: int, stem: str = "cifar") -> nn.Module:
    """ResNet-18; `stem` is "cifar" (3×3, no max-pool) or "maxpool" (3×3 and a max-pool: a quarter of the work).

    Raises:
        ValueError: another stem.
    """
    if stem not in ("cifar", "maxpool"):
        raise ValueError(f"unknown stem {stem!r}: choose cifar or maxpool")
    return ResNet18(num_classes, stem)
