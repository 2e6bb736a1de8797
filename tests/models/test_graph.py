from __future__ import annotations

import pytest
import torch
from torch import nn

from models.graph import module_of, replace_module, trace
from pruning_utils import l1, prune_
from pruning_utils.masks import mask_of
from tests.networks import CHAINS, KINDS, make


@pytest.mark.parametrize("kind", KINDS)
def test_chains_are_those_with_relu_modules(kind):
    assert (trace(make(kind)) is not None) == (kind in CHAINS)


@pytest.mark.parametrize("kind", CHAINS)
def test_the_trace_calls_every_leaf_once(kind):
    model = make(kind)
    called = [str(node.target) for node in trace(model).nodes if module_of(model, node) is not None]
    leaves = [name for name, module in model.named_modules() if not list(module.children())]
    assert sorted(called) == sorted(leaves)


def test_a_masked_layer_is_still_one_step():
    model = prune_(make("alexnet_like"), l1, 0.5)
    assert not any("parametrizations" in str(node.target) for node in trace(model).nodes)


def test_replace_module_carries_masks_over():
    model = prune_(make("resnet_like"), l1, 0.5)
    name, old = next((n, m) for n, m in model.named_modules() if n.endswith("conv2"))
    mask = mask_of(old).mask.clone()
    new = nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1, bias=False)
    replace_module(model, name, new)
    assert model.get_submodule(name) is new
    assert torch.equal(new.weight != 0, mask)
