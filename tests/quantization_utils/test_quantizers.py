"""Each quantizer against its paper's formula or brute force, in plain Python over one channel at a time."""

from __future__ import annotations

import itertools
import statistics

import pytest
import torch
from torch import nn

from quantization_utils.quantizers import (
    TERNARY,
    absmean,
    absmean_fitted,
    absmean_per_tensor,
    absmedian,
    as_is,
    block_length,
    dequantize,
    int8_absmax,
    is_finite,
    mse_optimal,
    twn,
)

SHAPES = [(1, 1), (3, 5), (7, 97), (4, 3, 3, 3), (257, 2), (2, 1025)]
FITTED = (absmean_fitted, absmedian, twn, mse_optimal)  # their scale is that of least squares for their codes


def error(weight, codes, scale):
    return (weight - dequantize(codes, scale)).double().square().flatten(1).sum(1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("quantizer", TERNARY)
def test_what_every_ternary_quantizer_keeps_to(quantizer, shape):
    weight = torch.randn(shape)
    copy = weight.clone()
    codes, scale = quantizer(weight)
    assert codes.dtype == torch.int8 and codes.shape == weight.shape and codes.abs().max() <= 1
    assert scale.dtype == torch.float32 and scale.shape == (shape[0],) and (scale > 0).all() and scale.isfinite().all()
    assert torch.equal(weight, copy)
    assert ((codes == 0) | (codes == weight.sign())).all(), "a code never turns a weight's sign around"
    mirrored, same_scale = quantizer(-weight)
    assert torch.equal(mirrored, -codes) and torch.equal(same_scale, scale)


@pytest.mark.parametrize("quantizer", TERNARY)
def test_codes_do_not_depend_on_the_unit_or_the_layout(quantizer):
    weight = torch.randn(5, 3, 3, 3)
    codes, scale = quantizer(weight)
    larger, larger_scale = quantizer(weight * 2**10)
    assert torch.equal(larger, codes) and torch.equal(larger_scale, scale * 2**10)
    strided, strided_scale = quantizer(weight.contiguous(memory_format=torch.channels_last))
    assert torch.equal(strided, codes) and torch.equal(strided_scale, scale)


@pytest.mark.parametrize("quantizer", [*TERNARY, int8_absmax])
def test_pruned_weights_do_not_enter_the_scale(quantizer):
    """The weights that are left get the codes and the scale that they get alone."""
    weight = torch.randn(6, 40)
    kept = torch.stack([torch.randperm(40)[:25].sort().values for _ in range(6)])
    pruned = torch.zeros_like(weight).scatter(1, kept, weight.gather(1, kept))
    codes, scale = quantizer(pruned)
    alone, alone_scale = quantizer(weight.gather(1, kept).contiguous())
    assert (codes[pruned == 0] == 0).all()
    assert torch.equal(codes.gather(1, kept), alone)
    torch.testing.assert_close(scale, alone_scale, rtol=1e-6, atol=0)


@pytest.mark.parametrize("quantizer", [*TERNARY, int8_absmax])
def test_channels_without_a_weight_left(quantizer):
    weight = torch.randn(4, 9)
    weight[1] = 0
    codes, scale = quantizer(weight)
    assert not codes[1].any() and scale.isfinite().all() and (scale > 0).all()
    others, other_scales = quantizer(weight[[0, 2, 3]])
    assert torch.equal(codes[[0, 2, 3]], others)
    torch.testing.assert_close(scale[[0, 2, 3]], other_scales, rtol=1e-6, atol=0)
    codes, scale = quantizer(torch.zeros(2, 3))
    assert not codes.any() and scale.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("quantizer", TERNARY)
def test_ternary_weights_stay_as_they_are(quantizer):
    """All magnitudes equal: every code is kept, and the scale is that magnitude."""
    weight = torch.randint(0, 2, (5, 30)) * 2.0 - 1
    codes, scale = quantizer(weight * 0.25)
    assert torch.equal(codes.float(), weight) and scale.tolist() == [0.25] * 5


@pytest.mark.parametrize("quantizer", FITTED)
def test_the_scale_is_that_of_least_squares(quantizer):
    weight = torch.randn(9, 33)
    codes, scale = quantizer(weight)
    best = error(weight, codes, scale)
    for factor in (0.99, 1.01):
        assert (error(weight, codes, scale * factor) > best).all()


def test_absmean_by_its_formula():
    weight = torch.randn(4, 21)
    codes, scale = absmean(weight)
    for row, row_codes, row_scale in zip(weight.tolist(), codes.tolist(), scale.tolist(), strict=True):
        mean = sum(abs(w) for w in row) / len(row)
        assert row_scale == pytest.approx(mean, rel=1e-6)
        assert row_codes == [max(-1, min(1, round(w / mean))) for w in row]


def test_absmean_rounds_ties_to_even():
    """|w| / mean |w| is 0.5 and 1.5: 0.5 rounds to 0."""
    codes, scale = absmean(torch.tensor([[0.5, -0.5, 1.5, -1.5]]))
    assert scale.tolist() == [1.0] and codes.tolist() == [[0, 0, 1, -1]]


def test_absmean_is_the_nearest_rounding_of_brevitas():
    """Against brevitas' ternary quantizer with the scale and half of it as the threshold: the same value everywhere."""
    from brevitas.core.quant import TernaryQuant

    class MeanMagnitude(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight.abs().mean(1, keepdim=True)

    weight = torch.randn(16, 45)
    expected, scale, _, _ = TernaryQuant(MeanMagnitude(), threshold=0.5)(weight)
    codes, ours = absmean(weight)
    torch.testing.assert_close(ours, scale.flatten())
    torch.testing.assert_close(dequantize(codes, ours), expected)


def test_absmean_per_tensor_is_that_of_bitnet():
    """Against transformers' BitNet: the same ternary weights but for rounding at the very threshold."""
    bitnet = pytest.importorskip("transformers.integrations.bitnet")
    weight = torch.randn(97, 33) * 0.02
    codes, scale = absmean_per_tensor(weight)
    assert len(set(scale.tolist())) == 1
    with torch.compiler.set_stance("force_eager"):
        expected = bitnet.WeightQuant.apply(weight)
    sure = ((weight.abs() / scale[0]) - 0.5).abs() > 1e-5
    torch.testing.assert_close(dequantize(codes, scale)[sure], expected[sure], rtol=1e-5, atol=0)
    assert sure.float().mean() > 0.99
    with torch.compiler.set_stance("force_eager"):
        stored = bitnet.unpack_weights(bitnet.pack_weights(codes.clone()), torch.int8)[: len(codes)]
    assert torch.equal(stored, codes)


def test_absmedian_by_its_formula():
    weight = torch.randn(4, 21)
    codes, _ = absmedian(weight)
    for row, row_codes in zip(weight.tolist(), codes.tolist(), strict=True):
        median = statistics.median(abs(w) for w in row)
        assert row_codes == [max(-1, min(1, round(w / median))) for w in row]


def test_twn_by_the_formula_of_its_paper():
    weight = torch.randn(4, 50)
    codes, scale = twn(weight)
    for row, row_codes, row_scale in zip(weight.tolist(), codes.tolist(), scale.tolist(), strict=True):
        threshold = 0.7 * sum(abs(w) for w in row) / len(row)
        assert row_codes == [(w > threshold) - (w < -threshold) for w in row]
        above = [abs(w) for w in row if abs(w) > threshold]
        assert row_scale == pytest.approx(sum(above) / len(above), rel=1e-5)


def test_mse_optimal_against_all_codes_there_are():
    weight = torch.randn(12, 6)
    weight[0, 2:4] = weight[0, 1]  # ties
    weight[1, 3] = 0.0
    codes, scale = mse_optimal(weight)
    got = error(weight, codes, scale)
    every = torch.tensor(list(itertools.product((-1, 0, 1), repeat=6)), dtype=torch.float64)
    for row, row_error in zip(weight.double(), got, strict=True):
        # of each code vector, the error with its best scale: |w|² - <w, c>² / <c, c>
        gain = (every @ row).square() / every.square().sum(1).clamp_min(1)
        assert row_error == pytest.approx(float(row.square().sum() - gain.max()), rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_mse_optimal_is_never_worse_than_any_other(shape):
    weight = torch.randn(shape) * torch.rand(shape[0]).view(-1, *[1] * (len(shape) - 1))
    best = error(weight, *mse_optimal(weight))
    for other in TERNARY:
        assert (best <= error(weight, *other(weight)) * (1 + 1e-5) + 1e-12).all(), other.__name__


def test_mse_optimal_finds_the_best_of_many_codes_that_are_nearly_as_good():
    weight, counts = torch.randn(1, 100_000), torch.arange(1, 100_001)
    sums = weight[0].double().abs().sort(descending=True).values.cumsum(0)
    assert int(mse_optimal(weight)[0].abs().sum()) == int((sums.square() / counts).argmax()) + 1


def test_fitted_scales_are_never_worse_than_the_mean():
    weight = torch.randn(50, 31)
    assert torch.equal(absmean_fitted(weight)[0], absmean(weight)[0])
    assert (error(weight, *absmean_fitted(weight)) <= error(weight, *absmean(weight))).all()
    assert error(weight, *absmean(weight)).sum() <= error(weight, *absmean_per_tensor(weight)).sum() * 1.05


def test_as_is_returns_what_is_ternary_already():
    codes = torch.randint(-1, 2, (6, 3, 3, 3), dtype=torch.int8)
    codes[2] = 0
    scale = torch.rand(6) + 0.1
    back, back_scale = as_is(dequantize(codes, scale))
    assert torch.equal(back, codes)
    expected = scale.clone()
    expected[2] = 1.0
    assert torch.equal(back_scale, expected)


def test_int8_absmax_by_its_formula():
    weight = torch.randn(5, 40)
    codes, scale = int8_absmax(weight)
    assert torch.equal(scale, weight.abs().amax(1) / 127)
    assert (codes.abs().amax(1) == 127).all()
    assert (error(weight, codes, scale) <= 40 * (scale.double() / 2 * (1 + 1e-5)).square()).all()
    assert ((weight - dequantize(codes, scale)).abs() <= scale[:, None] / 2 * (1 + 1e-5)).all()


def test_int8_absmax_keeps_channels_of_small_weights():
    weight = torch.randn(4, 40) * torch.tensor([1.0, 1e-10, 1e-11, 0.0])[:, None]
    codes, scale = int8_absmax(weight)
    assert (codes.abs().amax(1) > 0).tolist() == [True, True, True, False] and scale[3] == 1
    assert ((weight - dequantize(codes, scale)).abs() <= scale[:, None] / 2 * (1 + 1e-5)).all()


@pytest.mark.parametrize("quantizer", [*TERNARY, int8_absmax])
def test_half_precision_weights_are_quantized_in_float32(quantizer):
    weight = torch.randn(3, 1025).bfloat16()
    codes, scale = quantizer(weight)
    same, same_scale = quantizer(weight.float())
    assert scale.dtype == torch.float32 and torch.equal(codes, same)
    torch.testing.assert_close(scale, same_scale)


@pytest.mark.parametrize("quantizer", [absmean, absmean_fitted, twn])
@pytest.mark.parametrize("shape", [(7, 97), (11, 5, 3, 3), (3, 257)])
def test_blocks_of_channels_change_nothing(quantizer, shape, monkeypatch):
    weight = torch.randn(*shape)
    weight[1] = 0
    whole = quantizer(weight)
    dense = whole[0] * whole[1].view(-1, *[1] * (weight.dim() - 1))
    monkeypatch.setattr("quantization_utils.quantizers.block_length", lambda x: 2)
    assert all(torch.equal(a, b) for a, b in zip(quantizer(weight), whole, strict=True))
    assert torch.equal(dequantize(*whole), dense)
    assert torch.equal(dequantize(*whole, torch.bfloat16), dense.bfloat16())


def test_a_block_is_small_and_never_empty():
    for shape in [(4096, 9216), (64, 3, 3, 3), (2, 2**20), (0, 5), (5, 0)]:
        weight = torch.empty(shape, device="meta")
        length = block_length(weight)
        assert length == 1 or weight[:1].numel() * length <= 2**17
        assert weight.split(length)


@pytest.mark.parametrize("quantizer", [*TERNARY, as_is, int8_absmax])
def test_a_parameter_is_a_weight_too(quantizer):
    weight = torch.nn.Parameter(torch.randn(3, 8))
    assert torch.equal(quantizer(weight)[0], quantizer(weight.detach())[0])


@pytest.mark.parametrize("quantizer", [*TERNARY, as_is, int8_absmax])
def test_a_weight_that_is_not_a_number_is_not_hidden(quantizer):
    for broken in (torch.nan, torch.inf):
        weight = torch.randn(3, 8)
        weight[1] = broken
        assert not quantizer(weight)[1].isfinite().all()


@pytest.mark.parametrize("size", [1e-13, 8e-13, 1e-9])
@pytest.mark.parametrize("quantizer", [*TERNARY, int8_absmax])
def test_weights_next_to_nothing_stay_so(quantizer, size):
    assert dequantize(*quantizer(torch.randn(4, 9) * size)).abs().max() < max(1e-11, 4 * size)


def test_weights_whose_sum_is_infinite_are_finite():
    assert is_finite(torch.full((4,), 3e38))
    assert not is_finite(torch.tensor([1.0, torch.inf])) and not is_finite(torch.tensor([torch.inf, -torch.inf]))
