"""Trainable layers: they compute what the packed ones will, and have the gradients of their papers."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from quantization_utils.bit_layers import (
    BitConv2d,
    BitLinear,
    DynamicQuantizer,
    PackedLinear,
    Quantized,
    StaticQuantizer,
    fixed_weights,
)
from quantization_utils.quantizers import TERNARY, absmean, absmean_per_tensor, dequantize, int8_absmax, mse_optimal
from tests.layers import CONVOLUTIONS, conv, linear

QUANTIZERS = [*TERNARY, int8_absmax]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_linear_equals_dense_with_quantized_values(quantizer, bias):
    layer, x = linear(quantizer, bias=bias), torch.randn(4, 5, 37)
    dense = nn.Linear(37, 11, bias=bias)
    dense.weight.data = dequantize(*layer.quantized_weight())
    if bias:
        dense.bias.data = layer.bias.data
    assert torch.equal(layer(x), dense(x))
    assert torch.equal(layer.train()(x), dense(x))


@pytest.mark.parametrize("options", CONVOLUTIONS)
@pytest.mark.parametrize("quantizer", [absmean, int8_absmax])
def test_convolution_equals_dense_with_quantized_values(quantizer, options):
    layer, x = conv(quantizer, **options), torch.randn(2, 6, 9, 8)
    dense = nn.Conv2d(6, 9, 3, **options)
    dense.load_state_dict(layer.state_dict())
    dense.weight.data = dequantize(*layer.quantized_weight())
    assert torch.equal(layer(x), dense(x))


@pytest.mark.parametrize("make, shape", [(linear, (4, 37)), (conv, (2, 6, 5, 5))])
def test_the_bias_is_used(make, shape):
    layer, x = make(), torch.randn(shape)
    with_bias = layer(x)
    bias = layer.bias.detach().clone()
    layer.bias.data.zero_()
    torch.testing.assert_close(with_bias - layer(x), bias.view(-1, *[1] * (len(shape) - 2)).expand_as(with_bias))


def test_weights_and_biases_are_taken_over_as_they_are():
    dense = nn.Linear(5, 3).eval()
    layer = BitLinear.from_float(dense, absmean, 8)
    assert layer.weight is dense.weight and layer.bias is dense.bias and not layer.training
    assert layer.weight_bits == "ternary" and linear(int8_absmax).weight_bits == 8
    assert layer.state_dict().keys() == dense.state_dict().keys()


def test_the_bits_of_a_quantizer_made_from_another_are_those_of_its_codes():
    assert [linear(partial(quantizer)).weight_bits for quantizer in (int8_absmax, absmean)] == [8, "ternary"]


@pytest.mark.parametrize("part", [1.0, 0.25])
def test_the_gradient_of_the_weight_passes_straight_through(part):
    """It is that of a dense layer with the weight that was used, whatever rounding made of it."""
    layer, x = linear(act_bits=None), torch.randn(6, 37)
    layer.quantized_part = part
    used = (1 - part) * layer.weight + part * dequantize(*layer.quantized_weight())
    dense = used.detach().clone().requires_grad_()
    out, target = layer(x), torch.randn(6, 11)
    torch.testing.assert_close(out, F.linear(x, used, layer.bias))
    F.mse_loss(out, target).backward()
    F.mse_loss(F.linear(x, dense, layer.bias.detach()), target).backward()
    torch.testing.assert_close(layer.weight.grad, dense.grad)
    assert layer.bias.grad.any()


def test_a_ramp_begins_with_the_float_weight():
    layer, x = linear(), torch.randn(6, 37)
    layer.quantized_part = 0.0
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=0, atol=0)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_dynamic_activations_per_token_by_their_formula(bits):
    x = torch.randn(3, 4, 33)
    x[1, 2] = 0
    top = 2 ** (bits - 1) - 1
    quantizer = DynamicQuantizer(bits, "token")
    for row, got in zip(x.flatten(0, 1), quantizer(x).flatten(0, 1), strict=True):
        scale = max(float(row.abs().max()), 1e-5) / top
        expected = (row / scale).round().clamp(-top - 1, top) * scale
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=scale * 1e-3)
        assert len(got.unique()) <= 2**bits


def test_dynamic_activations_per_image_have_one_scale_each():
    x = torch.randn(3, 2, 5, 5) * torch.tensor([1.0, 10.0, 0.1]).view(3, 1, 1, 1)
    out = DynamicQuantizer(8, "image")(x)
    for image, got in zip(x, out, strict=True):
        scale = float(image.abs().max()) / 127
        codes = got / scale
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)
        assert float((got - image).abs().max()) <= scale / 2 * 1.001


def test_the_gradient_of_dynamic_activations_passes_straight_through():
    x = torch.randn(3, 9, requires_grad=True)
    grad = torch.randn(3, 9)
    DynamicQuantizer(8, "token")(x).backward(grad)
    assert torch.equal(x.grad, grad)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_static_activations_round_and_clip(bits):
    quantizer = StaticQuantizer(bits, 0.1)
    x = torch.linspace(-1, 0.1 * 2**bits + 1, 1001)
    expected = (x / quantizer.step.detach()).round().clamp(0, 2**bits - 1) * quantizer.step.detach()
    assert torch.equal(quantizer(x), expected) and quantizer.code_max == 2**bits - 1


def test_static_activations_have_the_gradients_of_lsq():
    """Esser et al., arXiv 1902.08153, eq. 2 and 3, and section 2.2's factor 1 / sqrt(number · largest code)."""
    step, top = 0.37, 15
    quantizer = StaticQuantizer(4, step)
    x = torch.tensor([-1.0, -0.1, 0.05, 0.3, 1.0, 2.345, 5.54, 5.56, 9.0], requires_grad=True)
    grad = torch.randn(9)
    quantizer(x).backward(grad)
    slope, passed = [], []
    for value in x.tolist():
        ratio = value / step
        slope.append(0.0 if ratio <= 0 else float(top) if ratio >= top else round(ratio) - ratio)
        passed.append(0.0 < ratio < top)
    assert torch.equal(x.grad, grad * torch.tensor(passed))
    expected = float((torch.tensor(slope) * grad).sum()) / (9 * top) ** 0.5
    assert float(quantizer.step.grad) == pytest.approx(expected, rel=1e-4)


def test_blocks_of_activations_change_no_gradient(monkeypatch):
    x, found = torch.rand(6, 40_000), []
    for _ in range(2):
        quantizer, leaf = StaticQuantizer(4, 0.05), x.clone().requires_grad_()
        quantizer(leaf).square().sum().backward()
        found.append((leaf.grad, quantizer.step.grad))
        monkeypatch.setattr("quantization_utils.quantizers.block_length", len)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("step", [0.0, -0.1])
def test_a_step_that_training_has_moved_too_far_stays_positive(step):
    out = StaticQuantizer(4, step)(torch.tensor([-1.0, 0.0, 1.0]))
    assert (out >= 0).all() and (out < 1e-6).all()


def test_a_learned_step_finds_the_range():
    """Stepping along its gradient reduces the error of a quantizer that begins with a step twice too large."""
    quantizer, x = StaticQuantizer(4, 0.6), torch.rand(4096) * 4.5
    first = float((quantizer(x) - x).square().mean().detach())
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.5)
    for _ in range(60):
        optimizer.zero_grad()
        ((quantizer(x) - x).square().mean() * 100).backward()
        optimizer.step()
    assert float((quantizer(x) - x).square().mean().detach()) < first / 2 and 0.2 < float(quantizer.step.detach()) < 0.4


def test_quantized_puts_the_quantizer_behind_the_module():
    x = torch.tensor([-1.0, 0.26, 0.24, 99.0])
    assert Quantized(nn.ReLU(), StaticQuantizer(2, 0.5))(x).tolist() == [0.0, 0.5, 0.0, 1.5]


def test_linear_of_transformers_bitnet_agrees():
    """The same codes and scale in the layer that loads BitNet's checkpoints."""
    bitnet = pytest.importorskip("transformers.integrations.bitnet")
    layer = linear(absmean_per_tensor, 8, bias=False)
    codes, scale = layer.quantized_weight()
    theirs = bitnet.AutoBitLinear(37, 11, bias=False)
    theirs.weight.data, theirs.weight_scale.data = codes.float(), scale[:1]
    x = torch.randn(4, 37)
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        expected = theirs(x)
    torch.testing.assert_close(PackedLinear.from_bit_layer(layer, 8)(x), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer(x).detach(), expected, rtol=1e-5, atol=1e-6)


def test_mixed_precision_quantizes_in_float32():
    layer, x = linear(mse_optimal, 8), torch.randn(4, 37)
    codes, _ = layer.quantized_weight()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        inside, _ = layer.quantized_weight()
    assert out.dtype == torch.bfloat16 and torch.equal(inside, codes)
    torch.testing.assert_close(out.float(), layer(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("make, shape", [(linear, (4, 37)), (conv, (2, 6, 5, 5))])
def test_a_trainable_layer_in_half_precision_computes_in_it(make, shape):
    layer, x = make(act_bits=8), torch.randn(shape)
    expected = layer(x)
    out = layer.bfloat16()(x.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)


def test_the_gradient_of_a_step_is_computed_in_float32():
    x, steps = (torch.rand(500) * 30).bfloat16(), []
    for values in (x, x.float()):
        quantizer = StaticQuantizer(8, 0.1)
        quantizer(values).sum().backward()
        steps.append(quantizer.step.grad)
    assert torch.equal(*steps)


@pytest.mark.parametrize("quantizer", [StaticQuantizer(8, 1.0), DynamicQuantizer(8, "token")])
def test_in_float64_a_value_that_float32_puts_on_a_tie_is_rounded_to_its_side(quantizer):
    above, top = 2.5 + 1e-9, 127.0  # the largest value makes the dynamic scale 1, too
    x = torch.tensor([[above, top]], dtype=torch.float64)
    assert quantizer(x).tolist() == [[3, top]] and quantizer(x.float()).tolist() == [[2, top]]


def test_a_weight_that_is_computed_is_computed_once_in_a_forward_pass() -> None:
    """As a pruned one is, by its mask: for AlexNet's 57 million that takes a fifth of a training step."""

    class Counted(nn.Module):
        calls = 0

        def forward(self, tensor: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return tensor

    linear, convolution = nn.Linear(8, 4), nn.Conv2d(3, 4, 3)
    for layer in (BitLinear.from_float(linear, absmean, 8), BitConv2d.from_float(convolution, absmean, 8)):
        counted = Counted()
        parametrize.register_parametrization(layer, "weight", counted, unsafe=True)
        counted.calls = 0
        layer(torch.randn(2, 8) if isinstance(layer, BitLinear) else torch.randn(2, 3, 5, 5)).sum().backward()
        assert counted.calls == 1


def test_weights_are_quantized_once_where_they_are_fixed() -> None:
    calls = []

    def counting(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(1)
        return absmean(weight)

    model = nn.Sequential(linear(counting, 8), nn.ReLU(), linear(counting, 8, k=11, n=3))
    x = torch.randn(4, 37)
    before = model(x)
    calls.clear()
    with fixed_weights(model):
        with fixed_weights(model[0]):  # whoever fixes what is fixed leaves it fixed
            assert torch.equal(model(x), before)
        assert torch.equal(model(x), before)
    assert len(calls) == 2
    with pytest.raises(RuntimeError), fixed_weights(model):
        model(x[:, 1:])
    with torch.no_grad():
        model[2].weight.neg_()
    assert not torch.equal(model(x), before)  # and quantized anew afterwards


@pytest.mark.parametrize("quantizer", [absmean, absmean_per_tensor])
def test_the_weight_under_autocast_is_rounded_once_and_its_gradient_stays_float(quantizer):
    layer = linear(quantizer, k=40)
    x = torch.randn(6, 40)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.effective_weight().dtype == torch.bfloat16
        y = layer(x)
    dense = dequantize(*layer.quantized_weight()).bfloat16().requires_grad_()
    expected = F.linear(x.bfloat16(), dense, layer.bias.bfloat16())
    y.float().square().sum().backward()
    expected.float().square().sum().backward()
    assert torch.equal(y, expected)
    assert layer.weight.grad.dtype == torch.float32 and torch.equal(layer.weight.grad, dense.grad.float())


def test_a_quantizer_of_ones_own_computes_in_float32_under_autocast():
    def own(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return weight.sign().to(torch.int8), weight.abs() @ torch.full(weight.shape[1:], 1 / weight.shape[1])

    layer = linear(own)
    expected = layer.effective_weight().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.effective_weight(), expected)


def test_a_ramp_under_autocast_mixes_what_is_not_rounded():
    layer = linear()
    layer.quantized_part = 0.25
    expected = layer.effective_weight()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.effective_weight(), expected)


def test_an_empty_batch_moves_no_step():
    quantizer = StaticQuantizer(8, 0.1)
    quantizer(torch.zeros(0, 3, requires_grad=True)).sum().backward()
    assert quantizer.step.grad.item() == 0
