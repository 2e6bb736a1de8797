"""Small ternary layers that tests share."""

from torch import nn

from quantization_utils.bit_layers import BitConv2d, BitLinear
from quantization_utils.quantizers import absmean

CONVOLUTIONS = [
    {}, {"stride": 2, "padding": 1}, {"padding": (0, 2), "bias": False}, {"groups": 3, "padding": 1},
    {"dilation": 2, "padding": 2}, {"stride": 3, "groups": 3}, {"stride": 3, "dilation": 2},
]  # fmt: skip


def linear(quantizer=absmean, act_bits=None, k=37, n=11, bias=True) -> BitLinear:
    return BitLinear.from_float(nn.Linear(k, n, bias=bias), quantizer, act_bits).eval()


def conv(quantizer=absmean, act_bits=None, **options) -> BitConv2d:
    return BitConv2d.from_float(nn.Conv2d(6, 9, 3, **options), quantizer, act_bits).eval()
