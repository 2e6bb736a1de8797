from __future__ import annotations

import pytest
import torch
from torch import nn

from models.state import device_of, evaluating


def test_a_model_without_parameters_is_where_its_buffers_are():
    assert device_of(nn.BatchNorm1d(3, affine=False, device="meta")).type == "meta"
    assert device_of(nn.ReLU()) == torch.device("cpu")


def test_each_module_goes_back_to_its_own_mode_also_from_an_error():
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)).train()
    model[1].eval()  # frozen
    with pytest.raises(AssertionError), evaluating(model):
        assert any(module.training for module in model.modules())  # none is
    assert [module.training for module in model.modules()] == [True, True, False]
