from __future__ import annotations

import torch
from torch import nn

from models.state import device_of


def test_a_model_without_parameters_is_where_its_buffers_are():
    assert device_of(nn.BatchNorm1d(3, affine=False, device="meta")).type == "meta"
    assert device_of(nn.ReLU()) == torch.device("cpu")
