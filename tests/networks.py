"""Small networks of the three kinds, for tests: the layers and joints of the real ones at a fraction of their width."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models import build
from models.normalize import Normalize
from models.resnet_18 import BasicBlock
from pruning_utils import l2_filters, prune_
from quantization_utils import absmean, pack_, quantize_

CLASSES = 10
CHAINS = ("alexnet_like", "alexnet_like_without_batch_norm", "resnet_like")
KINDS = (*CHAINS, "vit_like")


def alexnet_like(batch_norm: bool = True) -> nn.Module:
    layers: list[nn.Module] = [Normalize()]
    for c, n in ((3, 8), (8, 13)):
        layers += [nn.Conv2d(c, n, 3, padding=1, bias=not batch_norm)]
        layers += [nn.BatchNorm2d(n)] if batch_norm else []
        layers += [nn.ReLU(), nn.MaxPool2d(3, 2)]
    layers += [nn.Flatten(), nn.Dropout(0.2), nn.Linear(13 * 49, 24, bias=not batch_norm)]
    layers += [nn.BatchNorm1d(24)] if batch_norm else []
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(24, CLASSES))


def resnet_like() -> nn.Module:
    """A block with an identity shortcut and one with a projection."""
    stem = [Normalize(), nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)]
    blocks = [BasicBlock(8, 8, 1), BasicBlock(8, 12, 2)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, CLASSES))


def make(kind: str) -> nn.Module:
    """A network of the kind in evaluation mode, with batch norms that are neither fresh nor alike."""
    if kind == "vit_like":
        return build("vit", CLASSES, width=64, depth=2, patch_size=16).eval()
    model = resnet_like() if kind == "resnet_like" else alexnet_like(kind == "alexnet_like")
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(module.weight, -0.5, 1.5)  # a negative one turns a channel around
            nn.init.normal_(module.bias, std=0.3)
    model.train()
    for _ in range(20):
        model(images(32))
    return model.eval()


def images(count: int) -> Tensor:
    """8-bit images, float32 in [0, 1]."""
    return torch.randint(0, 256, (count, 3, 32, 32)).float() / 255


def packed_vit(
    quantizer: object = absmean, act_bits: int | None = 8, pruned: float = 0.0, **options: object
) -> nn.Module:
    """`pruned`: fraction of the filters of its linear layers."""
    torch.manual_seed(0)
    sizes: dict[str, object] = {} if "config" in options else {"width": 128, "depth": 2}
    model = build("vit", 10, **(sizes | options)).eval()
    for name, parameter in model.named_parameters():
        if "layernorm" in name or name.endswith("bias"):  # zeros and ones would hide what is left out
            nn.init.normal_(parameter, 1.0 if name.endswith("weight") else 0.0, 0.2)
    if pruned:
        prune_(model, l2_filters, pruned, only=nn.Linear)
    return pack_(quantize_(model, quantizer, act_bits))  # type: ignore[arg-type]


def assert_equal_but_for_rounding(found: Tensor, wanted: Tensor) -> None:
    """Equal but for roundings of floats, and the few codes that these move by one."""
    error, size = (found - wanted).abs(), wanted.abs().max()
    assert error.median() < 1e-5 * size and error.max() < 0.02 * size


def layers(model: nn.Module, kind: type | tuple[type, ...] = (nn.Linear, nn.Conv2d)) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, kind)]


def logits_of(model: nn.Module, batch: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(batch)
