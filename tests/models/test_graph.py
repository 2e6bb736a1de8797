from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import orthogonal

from models.graph import module_of, replace_module, trace
from pruning_utils import l1, prune_
from pruning_utils.masks import mask_of
from quantization_utils import quantize_
from tests.networks import CHAINS, KINDS, make


@pytest.mark.parametrize("kind", KINDS)
def test_chains_are_those_with_relu_modules(kind):
    assert (trace(make(kind)) is not None) == (kind in CHAINS)
    assert trace(nn.Sequential(make(kind), nn.ReLU(), nn.LayerNorm(10))) is None


def test_a_network_of_other_nonlinearities_is_no_chain():
    assert trace(nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 2))) is None


@pytest.mark.parametrize("kind", CHAINS)
def test_the_trace_calls_every_leaf_once(kind):
    model = make(kind)
    called = [str(node.target) for node in trace(model).nodes if module_of(model, node) is not None]
    leaves = [name for name, module in model.named_modules() if not list(module.children())]
    assert sorted(called) == sorted(leaves)


def test_a_model_whose_python_depends_on_the_images_is_no_chain():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu, self.head = nn.ReLU(), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.relu(x) if x.sum() > 0 else x)

    assert trace(Branch()) is None


def test_the_trace_is_that_of_evaluation():
    class WithAnAuxiliaryHead(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu, self.head, self.auxiliary = nn.ReLU(), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            x = self.relu(x)
            return (self.head(x), self.auxiliary(x)) if self.training else self.head(x)

    model = WithAnAuxiliaryHead().train()
    assert "auxiliary" not in str(trace(model)) and model.training


def test_an_argument_that_is_left_out_has_its_default():
    class WithTwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu, self.head, self.other = nn.ReLU(), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x, extra=None, *, features=False):
            x = self.relu(x)
            return x if features else self.head(x) if extra is None else self.other(x)

    graph = trace(WithTwoHeads())
    assert [str(node.target) for node in graph.nodes] == ["images", "relu", "head", "output"]


def test_a_masked_layer_is_still_one_step():
    model = prune_(make("alexnet_like"), l1, 0.5)
    assert not any("parametrizations" in str(node.target) for node in trace(model).nodes)


def test_replace_module_does_not_compute_a_weight_anew():
    """`orthogonal` would fit its base to the tensor that it is registered for."""
    model = nn.Sequential(orthogonal(nn.Linear(4, 4)))
    weight = model[0].weight.clone()
    quantize_(model, act_bits=None)
    assert torch.equal(model[0].weight, weight)
    model[0].weight.sum().backward()
    assert model[0].parametrizations.weight.original.grad.any()


def test_replace_module_carries_masks_over():
    model = prune_(make("resnet_like"), l1, 0.5)
    name, old = next((n, m) for n, m in model.named_modules() if n.endswith("conv2"))
    mask = mask_of(old).mask.clone()
    new = nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1, bias=False)
    replace_module(model, name, new)
    assert model.get_submodule(name) is new
    assert torch.equal(new.weight != 0, mask)
    assert new.state_dict().keys() == old.state_dict().keys()
