from __future__ import annotations

import pytest
import torch
from torch import nn

from models import build
from models.resnet_18 import BasicBlock


@pytest.mark.parametrize("stem, side", [("cifar", 32), ("maxpool", 16)])
def test_stem_and_stages(stem, side):
    model = build("resnet_18", 10, stem=stem).eval()
    shapes = []
    for stage in model.stages:
        stage.register_forward_hook(lambda m, args, out: shapes.append(tuple(out.shape[1:])))
    with torch.no_grad():
        model(torch.rand(1, 3, 32, 32))
    assert shapes == [(64 * scale, side // scale, side // scale) for scale in (1, 2, 4, 8)]
    if stem == "maxpool":
        assert (model.pool.kernel_size, model.pool.stride, model.pool.padding) == (3, 2, 1), "the paper's"
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 20  # 17 of the paper, and three projections
    assert sum(p.numel() for p in model.parameters()) == 11_173_962  # ResNet-18 for ten classes with the 3×3 stem


def test_cifar_is_the_default_stem():
    assert isinstance(build("resnet_18", 10).pool, nn.Identity)


def test_convolutions_start_as_he_et_al_draw_them_by_what_they_lead_to():
    for layer in (m for m in build("resnet_18", 10).modules() if isinstance(m, nn.Conv2d)):
        fan_out = layer.weight[:, 0].numel()
        assert layer.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)


@pytest.mark.parametrize("channels, stride", [(6, 2), (6, 1), (4, 2)])
def test_a_block_against_its_formula(channels, stride):
    block = BasicBlock(4, channels, stride).eval()
    for norm in (block.bn1, block.bn2, block.shortcut[1]):
        norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 4, 8, 8)
    inner = block.bn1(block.conv1(x)).clamp_min(0)
    expected = (block.bn2(block.conv2(inner)) + block.shortcut[1](block.shortcut[0](x))).clamp_min(0)
    assert torch.equal(block(x), expected)
