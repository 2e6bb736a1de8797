"""The three verbs on every kind of network, together with pruning."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.prune import l1_unstructured

from pruning_utils import l1, l2_filters, prune_, zero_fraction
from quantization_utils import absmean_fitted, calibrate_, int8_absmax, mse_optimal, pack_, quantize_
from quantization_utils.bit_layers import (
    BitConv2d,
    BitLinear,
    PackedConv2d,
    PackedLinear,
    Quantized,
    StaticQuantizer,
)
from quantization_utils.network import PackedNetwork
from tests.networks import CHAINS, KINDS, images, layers, logits_of, make


@pytest.mark.parametrize("kind", KINDS)
def test_quantize_with_nothing_but_a_model(kind):
    model = make(kind)
    names = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    assert quantize_(model) is model
    bit = [n for n, m in model.named_modules() if isinstance(m, (BitLinear, BitConv2d))]
    assert bit == names and all(m.input_quantizer.bits == 8 for m in layers(model))
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_only_keep_and_a_second_quantizer_for_the_rest():
    model = make("alexnet_like")
    quantize_(model, int8_absmax, act_bits=None, only=("1", "14"))
    quantize_(model, mse_optimal, act_bits=8, keep=["11"])
    kinds = [(type(m).__name__, getattr(m, "weight_bits", None)) for m in layers(model)]
    assert kinds == [("BitConv2d", 8), ("BitConv2d", "ternary"), ("Linear", None), ("BitLinear", 8)]
    assert [getattr(getattr(m, "input_quantizer", None), "bits", None) for m in layers(model)] == [None, 8, None, None]


@pytest.mark.parametrize(
    "how, sentence",
    [
        ({"act_bits": 9}, "2 to 8 bits or None .float., not 9"),
        ({"act_bits": 1}, "2 to 8 bits"),
        ({"act_bits": 7.5}, "2 to 8 bits"),
        ({"act_bits": 8.0}, "2 to 8 bits"),
        ({"quantizer": "absmean"}, "a quantizer is a function .*, not 'absmean'"),
        ({"act_bits": "8"}, "2 to 8 bits"),
        ({"only": "conv9"}, "only='conv9' matches no layer"),
        ({"only": nn.LSTM}, "only=.*LSTM.*, keep=.*: nothing to quantize"),
        ({"keep": ["fc"]}, "keep='fc' matches no layer"),
    ],
)
def test_mistakes_are_told_before_anything_is_changed(how, sentence):
    model = make("alexnet_like")
    with pytest.raises(ValueError, match=sentence):
        quantize_(model, **how)
    assert not layers(model, (BitLinear, BitConv2d))


@pytest.mark.parametrize("act_bits", [None, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_without_calibration_is_the_trainable_model(kind, act_bits):
    model = quantize_(make(kind), absmean_fitted, act_bits=act_bits)
    batch = images(8)
    expected = logits_of(model, batch)
    packed = pack_(model)
    assert packed is model and layers(packed) == [] and layers(packed, (PackedLinear, PackedConv2d))
    got = logits_of(packed, batch)
    if act_bits is None:
        assert torch.equal(got, expected)
    # A rounding of 1e-7 can move an activation by one code, 1/127 of the largest of its layer.
    torch.testing.assert_close(got, expected, rtol=0, atol=0.03 * float(expected.max() - expected.min()))


@pytest.mark.parametrize("act_bits", [8, 6, 4])
@pytest.mark.parametrize("kind", CHAINS)
def test_packed_network_has_the_classes_of_the_trainable_model(kind, act_bits):
    model = calibrate_(quantize_(make(kind), absmean_fitted, act_bits=act_bits), images(64))
    batch = images(100)
    expected = logits_of(model, batch)
    packed = pack_(model)
    assert packed is model and isinstance(packed, PackedNetwork)
    got = logits_of(packed, batch)
    assert (got.argmax(1) == expected.argmax(1)).float().mean() >= 0.99
    torch.testing.assert_close(got, expected, rtol=0, atol=0.02 * float(expected.max() - expected.min()))


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_packing_twice_changes_nothing(kind, calibrated):
    model = quantize_(make(kind))
    model = calibrate_(model, images(8)) if calibrated else model
    batch = images(2)
    packed = pack_(model.train())
    assert not packed.training
    before = logits_of(packed, batch)
    assert pack_(packed.train()) is packed and not packed.training
    assert torch.equal(logits_of(packed, batch), before)
    assert not any(p.requires_grad for p in packed.parameters())


def test_a_packed_model_cannot_be_changed():
    packed = pack_(calibrate_(quantize_(make("alexnet_like")), images(8)))
    partly = pack_(quantize_(make("alexnet_like"), keep="14"))
    for model in (packed, partly):
        for change in (quantize_, partial(prune_, score=l1, amount=0.5), zero_fraction):
            with pytest.raises(ValueError, match="the model is packed, .*: do this before pack_"):
                change(model)


def test_a_packed_network_is_no_empty_state_dict():
    packed = pack_(calibrate_(quantize_(make("alexnet_like")), images(8)))
    for call in (packed.state_dict, partial(packed.load_state_dict, {})):
        with pytest.raises(ValueError, match="no state dict: use save_model and load_model"):
            call()


def test_packing_a_float_model_leaves_it_as_it_is():
    model, batch = make("resnet_like"), images(2)
    expected = logits_of(model, batch)
    assert torch.equal(logits_of(pack_(model), batch), expected)


@pytest.mark.parametrize("score", [l1, l2_filters])
@pytest.mark.parametrize("prune_first", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_pruned_quantized_packed(kind, prune_first, score):
    """Pruned weights are zero codes in every state, and the three states agree."""
    model = make(kind)
    if prune_first:
        prune_(model, score, 0.5)
    quantize_(model, absmean_fitted)
    if not prune_first:
        prune_(model, score, 0.5)
    calibrate_(model, images(32))
    for layer in layers(model)[:-1]:
        codes, _ = layer.quantized_weight()
        assert (codes[layer.weight == 0] == 0).all() and (layer.weight == 0).float().mean() > 0.3
    assert zero_fraction(model) >= 0.4
    batch = images(50)
    expected = logits_of(model, batch)
    got = logits_of(pack_(copy.deepcopy(model)), batch)
    torch.testing.assert_close(got, expected, rtol=0, atol=0.03 * float(expected.max() - expected.min()))


@pytest.mark.parametrize("kind", KINDS)
def test_everything_that_is_trainable_gets_a_gradient(kind):
    model = calibrate_(quantize_(make(kind)), images(16)).train()
    model(images(8)).square().mean().backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert missing == []
    steps = [q.step.grad for q in layers(model, StaticQuantizer)]
    assert all(float(g.abs()) > 0 for g in steps) and bool(steps) == (kind in CHAINS)


def test_a_layer_under_two_names_stays_one_layer():
    model = make("alexnet_like")
    model.again = model[1]
    names = ["1", "again"]
    quantize_(model)
    assert isinstance(model[1], BitConv2d) and model.get_submodule("again") is model[1]
    model.forward = lambda x: nn.Sequential.forward(model[:15], x)
    quantize_(nn.Sequential(nn.Linear(2, 2)))
    pack_(model)
    assert [type(model.get_submodule(name)) for name in names] == [PackedConv2d] * 2


def test_layers_of_derived_classes_are_not_taken_for_plain_ones():
    class Shifted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 100

    model = nn.Sequential(nn.Linear(4, 4), Shifted(4, 4))
    with pytest.raises(ValueError, match=r"1 is a Shifted, whose own computation would be lost: leave it out"):
        quantize_(model)
    assert type(model[0]) is nn.Linear
    quantize_(model, keep="1")
    assert isinstance(model[0], BitLinear)


@pytest.mark.parametrize(
    "compute, tensor",
    [
        (weight_norm, "weight"),
        (partial(l1_unstructured, name="weight", amount=0.5), "weight"),
        (partial(weight_norm, name="bias", dim=None), "bias"),
    ],
)
def test_what_is_computed_from_other_tensors_is_asked_for_as_a_parameter(compute, tensor):
    model = nn.Sequential(nn.Linear(4, 4), compute(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match=f"1 computes its {tensor} from other tensors .*: make it a parameter again"):
        quantize_(model)
    assert type(model[0]) is nn.Linear


def test_hooks_are_not_lost_without_a_word():
    model = make("alexnet_like")
    handle = model[5].register_forward_hook(lambda module, args, output: None)
    with pytest.raises(ValueError, match="5 has hooks, .*: remove them first"):
        quantize_(model)
    handle.remove()
    handle = quantize_(model)[5].register_forward_pre_hook(lambda module, args: None)
    with pytest.raises(ValueError, match="5 has hooks, .*: remove them first"):
        pack_(model)
    handle.remove()
    assert isinstance(pack_(model)[5], PackedConv2d)
    vit = quantize_(make("vit_like"))
    vit.network.vit.layers[0].register_forward_hook(lambda module, args, output: 0 * output)
    batch = images(2)
    expected = logits_of(vit, batch)
    torch.testing.assert_close(logits_of(pack_(vit), batch), expected, rtol=0, atol=1e-2)
    assert logits_of(vit, batch).std(0).max() < 1e-5  # nothing of the images is left


def test_what_cannot_be_packed_is_as_it_was():
    model = quantize_(make("alexnet_like")).double().train()
    model[5].padding = "same"
    with pytest.raises(ValueError, match="5 can't be packed"):
        pack_(model)
    assert all(module.training for module in model.modules()) and model[5].weight.dtype == torch.float64


@pytest.mark.parametrize("kind", ["alexnet_like", "vit_like"])
def test_bytes_are_no_images(kind):
    pixels = images(2).mul(255).byte()
    for model in (make(kind), quantize_(make(kind)), pack_(quantize_(make(kind)))):
        with pytest.raises(ValueError, match="numbers in .0, 1., not torch.uint8"):
            model(pixels)
    if kind in CHAINS:
        with pytest.raises(ValueError, match="numbers in .0, 1., not torch.uint8"):
            calibrate_(quantize_(make(kind)), pixels)


def test_a_layer_itself_cannot_be_replaced():
    with pytest.raises(ValueError, match="put it into an nn.Sequential"):
        quantize_(nn.Linear(4, 3))


def test_masks_of_batch_norms_end_with_training():
    model = quantize_(prune_(make("resnet_like"), l2_filters, 0.5))
    batch = images(2)
    expected = logits_of(copy.deepcopy(model), batch)
    packed = pickle.loads(pickle.dumps(pack_(model)))  # which parametrized modules can't be
    torch.testing.assert_close(logits_of(packed, batch), expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("quantizer", [absmean_fitted, mse_optimal])
def test_a_trainable_model_can_be_exported(quantizer):
    model, batch = calibrate_(quantize_(make("resnet_like"), quantizer), images(8)), images(2)
    program = torch.export.export(model, (batch,))
    torch.testing.assert_close(program.module()(batch), logits_of(model, batch))


def test_the_fast_path_of_a_transformer_layer_does_not_read_float_weights():
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True).eval()
    model, x = quantize_(nn.Sequential(layer), keep="0.self_attn.out_proj"), torch.randn(2, 5, 32)
    trainable = model(x)
    torch.testing.assert_close(logits_of(model, x), trainable)
    torch.testing.assert_close(logits_of(pack_(model), x), trainable, rtol=0, atol=1e-4)


def test_a_transformer_with_padded_sequences_is_given_whole_tensors():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2)
    quantize_(model, keep="*out_proj").eval()
    x, padded = torch.randn(2, 5, 16), torch.arange(5).expand(2, 5) >= torch.tensor([[3], [5]])
    with torch.inference_mode():
        out = model(x, src_key_padding_mask=padded)
        torch.testing.assert_close(out[:1, :3], model(x[:1, :3]))


@pytest.mark.parametrize("kind, dtype", [("alexnet_like", torch.bfloat16), ("vit_like", torch.float64)])
def test_models_of_other_types_are_packed_in_float32(kind, dtype):
    model = quantize_(make(kind)).to(dtype)
    batch = images(4)
    expected = logits_of(copy.deepcopy(model).float(), batch)
    torch.testing.assert_close(logits_of(pack_(model), batch), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_model_is_neither_calibrated_nor_packed(value):
    model = quantize_(make("alexnet_like"))
    model[1].bias = nn.Parameter(torch.full((8,), value))
    before = str(model)
    with pytest.raises(ValueError, match="3 is not finite on the calibration images"):
        calibrate_(model, images(8))
    assert str(model) == before
    model[5].weight.data[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match="5 has a weight that is not finite: has training diverged"):
        pack_(model)
    assert isinstance(model[1], BitConv2d), "nothing is packed"


def test_a_layer_whose_sums_32_bits_cannot_hold_is_told_before_training():
    model = nn.Sequential(nn.Linear(1, 66_312), nn.ReLU(), nn.Linear(66_312, 2))
    with pytest.raises(ValueError, match=r"2 has 66,312 inputs, whose sums 32 bits can't hold: make it ternary"):
        quantize_(model, int8_absmax)
    assert not layers(model, (BitLinear, BitConv2d))
    assert len(layers(quantize_(copy.deepcopy(model)), BitLinear)) == 2
    assert len(layers(quantize_(model, int8_absmax, act_bits=None), BitLinear)) == 2
    assert quantize_(nn.Sequential(nn.Linear(66_311, 1)), int8_absmax)


@pytest.mark.parametrize(
    "quantizer",
    [
        lambda w: (w.sign(), w.flatten(1).abs().mean(1)),
        lambda w: (w.sign().to(torch.int8), w.abs().mean()),
        lambda w: (w.sign().to(torch.int8).flatten(1), w.flatten(1).abs().mean(1)),
        lambda w: (w.sign().to(torch.int8), torch.zeros(len(w))),
        lambda w: w.sign().to(torch.int8),
    ],
    ids=["float codes", "one scale", "flat codes", "scales of 0", "no scales"],
)
def test_what_is_no_quantizer_is_told_before_a_training(quantizer):
    model = make("alexnet_like")
    with pytest.raises(ValueError, match="is no quantizer: .* int8 of that shape, and a scale of each channel"):
        quantize_(model, quantizer)
    assert not [m for m in model.modules() if isinstance(m, (BitLinear, BitConv2d))]


@pytest.mark.parametrize("verb", [lambda model: calibrate_(model, images(8)), pack_])
def test_a_compiled_model_is_no_model_to_change(verb):
    model = quantize_(make("alexnet_like"))
    with pytest.raises(ValueError, match=r"the model is compiled: give what was compiled \(model._orig_mod\)"):
        verb(torch.compile(model, backend="eager"))
    assert not any(isinstance(m, (PackedConv2d, Quantized)) for m in model.modules())


def test_what_was_made_in_inference_mode_can_be_trained():
    model, batch = make("alexnet_like"), images(8)
    with torch.inference_mode():
        calibrate_(quantize_(prune_(model, l1, 0.5)), batch)
    model.train()(batch).sum().backward()
    steps = [m.step for m in model.modules() if isinstance(m, StaticQuantizer)]
    assert steps and all(step.grad is not None and step.grad != 0 for step in steps)
    layer_by_layer = make("resnet_like")
    with torch.inference_mode():
        pack_(quantize_(layer_by_layer))
    layer_by_layer(batch.requires_grad_())


def test_pytorchs_default_type_makes_no_other_network():
    model, before = calibrate_(quantize_(make("alexnet_like")), images(8)), torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert isinstance(pack_(model), PackedNetwork)
    finally:
        torch.set_default_dtype(before)


def test_what_is_not_ready_to_be_packed_says_so():
    model = quantize_(make("alexnet_like"))
    layers(model)[1].quantized_part = 0.5
    with pytest.raises(ValueError, match=r"is quantized in part \(0.5\): set its quantized_part to 1 first"):
        pack_(model)
    with pytest.raises(ValueError, match="1 has no values, it is on the device meta"):
        pack_(quantize_(make("alexnet_like")).to("meta"))
    with pytest.raises(ValueError, match="the model is a layer itself"):
        pack_(layers(model)[0])


@pytest.mark.parametrize("score", [l1, l2_filters])  # masks of weights, and of batch norms too
def test_packing_a_copy_leaves_the_original_its_masks(score):
    model = prune_(make("resnet_like"), score, 0.5, only=nn.Conv2d)
    quantize_(model, mse_optimal, None, only=nn.Linear)
    batch = images(4)
    before = logits_of(model, batch)
    packed = pack_(copy.deepcopy(model))
    assert torch.equal(logits_of(model, batch), before) and zero_fraction(model) > 0.4
    torch.testing.assert_close(logits_of(packed, batch), before)


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_hooks_of_the_backward_pass_are_refused_too(register):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    getattr(model[1], register)(lambda *_: None)
    with pytest.raises(ValueError, match="1 has hooks"):
        quantize_(model)
