"""Packed layers: what the trainable ones compute, from codes and scales, and what one can do with such a layer."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from quantization_utils import pack_
from quantization_utils.bit_layers import BitConv2d, BitLinear, PackedConv2d, PackedLinear
from quantization_utils.quantizers import absmean, dequantize, int8_absmax, mse_optimal
from tests.layers import CONVOLUTIONS, conv, linear


@pytest.mark.parametrize("k", [1, 37, 97, 1025])
@pytest.mark.parametrize("quantizer", [absmean, mse_optimal, int8_absmax])
def test_packed_linear_is_the_trainable_one(quantizer, k):
    """Integers are exact, so the difference is that of a few float32 roundings of the sum."""
    layer, x = linear(quantizer, 8, k=k), torch.randn(5, 3, k)
    packed = PackedLinear.from_bit_layer(layer, 8)
    codes, scale = layer.quantized_weight()
    magnitude = x.abs() @ dequantize(codes, scale).abs().T + layer.bias.abs()
    with torch.no_grad():
        assert ((packed(x) - layer(x)).abs() <= 2**-18 * magnitude + 1e-7).all()


@pytest.mark.parametrize("bias", [True, False])
def test_packed_linear_by_its_formula_bit_for_bit(bias):
    """y = acc · (scale_n · (a / 127)) + bias_n: the gain rounded, and the product with the sum."""
    layer, x = linear(absmean, 8, bias=bias), torch.randn(7, 37)
    packed = PackedLinear.from_bit_layer(layer, 8)
    codes, scale = layer.quantized_weight()
    absmax = x.abs().amax(1, keepdim=True).clamp_min(1e-5)
    q = (x * (127 / absmax)).round().clamp(-128, 127).long()
    y = (q @ codes.long().T).double() * (scale * (absmax / 127)).double()
    y = (y + layer.bias.double() if bias else y).float()
    for backend in ("reference", "auto"):
        packed.backend, packed._runner = backend, None
        assert torch.equal(packed(x), y)


@pytest.mark.parametrize("act_bits", [None, 8])
@pytest.mark.parametrize("options", CONVOLUTIONS)
def test_packed_convolution_is_the_trainable_one(options, act_bits):
    layer, x = conv(mse_optimal, act_bits, **options), torch.randn(3, 6, 9, 8)
    packed = PackedConv2d.from_bit_layer(layer, act_bits)
    with torch.no_grad():
        assert act_bits is not None or torch.equal(packed(x), layer(x))
        torch.testing.assert_close(packed(x), layer(x), rtol=1e-5, atol=1e-5)
        packed.backend = "reference"
        torch.testing.assert_close(packed.double()(x.double()), layer.double()(x.double()), rtol=1e-13, atol=1e-13)


def test_weight_only_packed_linear_is_exact():
    layer, x = linear(absmean, None), torch.randn(7, 37)
    assert torch.equal(PackedLinear.from_bit_layer(layer, None)(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.double])
def test_weight_only_packed_layers_can_be_cast(dtype):
    x, image = torch.randn(7, 37), torch.randn(2, 6, 5, 5)
    packed = [(PackedLinear.from_bit_layer(linear(), None), x), (PackedConv2d.from_bit_layer(conv(), None), image)]
    for layer, values in packed:
        expected = layer(values)
        got = layer.to(dtype)(values.to(dtype))
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), expected, rtol=0.02, atol=0.02)


def test_a_packed_layer_holds_no_float_weight_and_can_be_copied():
    packed = PackedLinear.from_bit_layer(linear(absmean, 8), 8)
    assert {n: t.dtype for n, t in packed.state_dict().items()} == {
        "codes": torch.int8, "scale": torch.float32, "bias": torch.float32
    }  # fmt: skip
    assert list(packed.parameters()) == []
    x = torch.randn(2, 37)
    assert torch.equal(copy.deepcopy(packed)(x), packed(x))


@pytest.mark.parametrize("act_bits", [None, 8])
def test_a_packed_layer_that_has_run_can_be_pickled(act_bits):
    packed, x = PackedLinear.from_bit_layer(linear(), act_bits), torch.randn(2, 37)
    expected = packed(x)
    assert torch.equal(pickle.loads(pickle.dumps(packed))(x), expected)


def test_a_packed_layer_in_and_after_inference_mode():
    packed, x = PackedLinear.from_bit_layer(linear(), None), torch.randn(2, 37)
    with torch.inference_mode():
        expected = packed(x)
    out = packed(x.requires_grad_())
    out.sum().backward()
    assert torch.equal(out, expected) and x.grad.any()
    with torch.inference_mode():
        assert packed.double()(x.double()).dtype == torch.float64


def test_the_dense_weight_of_a_packed_layer():
    layer = conv(mse_optimal)
    assert torch.equal(PackedConv2d.from_bit_layer(layer, None).weight, dequantize(*layer.quantized_weight()))


@pytest.mark.parametrize("options", [{"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}])
def test_convolutions_that_cannot_be_packed_say_so(options):
    model = nn.Sequential(conv(), conv(**options))
    with pytest.raises(ValueError, match="1 can't be packed: only convolutions with zero padding, given as numbers"):
        pack_(model)
    assert isinstance(model[0], BitConv2d), "nothing is packed"


@pytest.mark.parametrize("act_bits", [None, 8])
def test_a_packed_layer_that_has_run_takes_other_weights(act_bits):
    x = torch.randn(4, 37)
    bit_layers = [BitLinear.from_float(nn.Linear(37, 5), absmean, None) for _ in range(2)]
    one, two = (PackedLinear.from_bit_layer(layer, act_bits) for layer in bit_layers)
    assert not torch.equal(one(x), two(x))
    one.load_state_dict(two.state_dict())
    assert torch.equal(one(x), two(x))
    changed = copy.deepcopy(one)
    for layer in (changed, one):
        layer.scale.mul_(2)
    assert not torch.equal(changed(x), two(x)) and torch.equal(one.to("cpu")(x), changed(x))  # a copy, and moved
    one.bias.zero_()
    assert not torch.equal(one(x), changed(x)) and torch.equal(one(x), copy.deepcopy(one)(x))
    one.codes = -one.codes
    assert torch.equal(one(x), copy.deepcopy(one)(x))
    runner, one.backend = one._runner, "reference"
    assert one(x) is not None and one._runner is not runner


def test_a_packed_layer_takes_a_tensor_that_is_put_in_the_place_of_its_own():
    packed, x = PackedLinear.from_bit_layer(linear(bias=False), None), torch.randn(4, 37)
    before = packed(x)
    packed.scale = 2 * packed.scale
    assert torch.equal(packed(x), 2 * before)


@pytest.mark.parametrize("change", [lambda layer: layer.load_state_dict(layer.state_dict()), nn.Module.float])
def test_a_compiler_finds_nothing_that_was_made_of_a_layers_values_before(change):
    """It traces what is there, and does not compare the tensors."""
    packed = PackedLinear.from_bit_layer(linear(), None)
    packed(torch.randn(4, 37))
    change(packed)
    assert packed._runner is None
