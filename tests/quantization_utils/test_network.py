"""A packed network against the trainable model it was made from, value by value and in double precision."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.graph import module_of, trace
from models.normalize import Normalize
from models.resnet_18 import BasicBlock
from quantization_utils import absmean_fitted, calibrate_, int8_absmax, load_model, pack_, quantize_, save_model
from quantization_utils.bit_layers import Quantized
from quantization_utils.kernels import reference
from quantization_utils.network import NotANetwork, PackedNetwork, _fold_normalization, to_nodes
from quantization_utils.nodes import IMAGE, Node
from tests.networks import CHAINS, CLASSES, images, make


def values_of(nodes: list[Node], batch: Tensor) -> list[Tensor]:
    """What each node puts out, by the reference."""
    executor = reference.NetworkExecutor(nodes)
    values = {IMAGE: (batch * 255).round()}
    for i, (node, weight) in enumerate(zip(nodes, executor.weights, strict=True)):
        residual = None if node.residual is None else values[node.residual]
        values[i] = reference._run(node, weight, values[node.input], residual)
    return [values[i] for i in range(len(nodes))]


@pytest.fixture(params=[(kind, bits) for kind in CHAINS for bits in (8, 4)], ids=lambda p: f"{p[0]} {p[1]} bits")
def calibrated(request):
    kind, bits = request.param
    return calibrate_(quantize_(make(kind), absmean_fitted, act_bits=bits), images(64))


def test_every_activation_is_that_of_the_trainable_model(calibrated):
    """Codes may differ by one, and hardly ever do: where float32 rounding decides between two."""
    batch, nodes, seen = images(16), to_nodes(calibrated), []
    quantized = [module_of(calibrated, node) for node in trace(calibrated).nodes]
    for module in quantized:
        if isinstance(module, Quantized):
            module.register_forward_hook(lambda m, args, out: seen.append((out / m.quantizer.step).round()))
    with torch.no_grad():
        logits = calibrated(batch)
        values = values_of(nodes, batch)
    codes = [v for v, n in zip(values, nodes, strict=True) if n.out_max is not None]
    assert len(codes) == len(seen) > 2
    for got, expected in zip(codes, seen, strict=True):
        difference = (got.flatten(1) - expected.flatten(1)).abs()
        assert difference.max() <= 1 and (difference > 0).float().mean() < 2e-3
    torch.testing.assert_close(values[-1], logits, rtol=0, atol=0.02 * float(logits.max() - logits.min()))


def test_codes_are_those_of_the_layers(calibrated):
    layers = [m for m in calibrated.modules() if hasattr(m, "quantized_weight")]
    nodes = [n for n in to_nodes(calibrated) if n.codes is not None]
    expected = sorted((m.quantized_weight()[0].flatten().tolist() for m in layers), key=str)
    assert sorted((n.codes.flatten().tolist() for n in nodes), key=str) == expected
    assert all(n.codes.dtype == torch.int8 and n.gain.dtype == n.bias.dtype == torch.float32 for n in nodes)


def test_nodes_read_what_comes_before_them(calibrated):
    nodes = to_nodes(calibrated)
    for i, node in enumerate(nodes):
        assert IMAGE <= node.input < i and (node.residual is None or IMAGE <= node.residual < i)
        assert node.out_max in (None, 2 ** calibrated_bits(calibrated) - 1)
    assert nodes[-1].op == "linear" and nodes[-1].out_max is None
    assert (nodes[0].pad_values == torch.tensor([125, 123, 114])).all()


def calibrated_bits(model: nn.Module) -> int:
    return next(m.quantizer.bits for m in model.modules() if isinstance(m, Quantized))


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("quantizer", [absmean_fitted, int8_absmax])
def test_batch_norm_and_normalisation_fold_exactly(quantizer, bias, padding):
    """The first node before rounding, against convolution and batch norm in double precision."""
    norm = nn.BatchNorm2d(5, eps=1e-3)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    norm.running_mean.normal_(), norm.running_var.uniform_(0.1, 3)
    first = nn.Conv2d(3, 5, 3, padding=padding, bias=bias)
    side = 30 + 2 * padding
    model = nn.Sequential(Normalize(), first, norm, nn.ReLU(), nn.Flatten(), nn.Linear(5 * side**2, 2)).eval()
    batch = images(4)
    calibrate_(quantize_(model, quantizer), batch)
    node, step = to_nodes(model)[0], float(model[3].quantizer.step.detach())

    codes, scale = model[1].quantized_weight()
    pixels = (batch * 255).round().double()
    mean = torch.tensor([125, 123, 114], dtype=torch.float64).view(3, 1, 1)
    weight = codes.double() * scale.double().view(-1, 1, 1, 1)
    real = F.conv2d((pixels - mean) / 63, weight, model[1].bias.detach().double() if bias else None, padding=padding)
    real = F.batch_norm(
        real, norm.running_mean.double(), norm.running_var.double(), norm.weight.detach().double(),
        norm.bias.detach().double(), eps=norm.eps,
    )  # fmt: skip

    padded = F.pad(pixels - mean, [padding] * 4) + mean
    accumulator = F.conv2d(padded, node.codes.double())
    y = accumulator * node.gain.double().view(-1, 1, 1) + node.bias.double().view(-1, 1, 1)
    torch.testing.assert_close(y * step, real, rtol=1e-5, atol=1e-5 * float(real.abs().max()))


def test_a_step_that_training_brought_to_zero_is_the_smallest_there_is():
    model, batch = calibrate_(quantize_(make("alexnet_like"), absmean_fitted), images(8)), images(4)
    next(m for m in model.modules() if isinstance(m, Quantized)).quantizer.step.data.zero_()
    expected = model(batch).detach()
    torch.testing.assert_close(pack_(model)(batch), expected, rtol=0, atol=0.02 * float(expected.abs().max()))


def test_average_pool_by_its_formula():
    model = calibrate_(quantize_(make("resnet_like"), absmean_fitted), images(32))
    nodes, batch = to_nodes(model), images(3)
    values = values_of(nodes, batch)
    at = next(i for i, n in enumerate(nodes) if n.op == "avg_pool")
    quantizers = [m.quantizer for m in model.modules() if isinstance(m, Quantized)]
    before, after = (float(q.step.detach()) for q in quantizers[-2:])
    exact = values[nodes[at].input].double().mean((2, 3)) * before / after
    assert ((values[at] - exact.clamp(0, 255)).abs() <= 0.5 + 1e-4).all()


def test_shortcuts_are_residuals_and_projections_nodes_of_their_own():
    nodes = to_nodes(calibrate_(quantize_(make("resnet_like"), absmean_fitted), images(16)))
    residual = [n for n in nodes if n.residual is not None]
    assert len(residual) == 2
    identity, projected = (nodes[n.residual] for n in residual)
    assert identity.op == "max_pool" and residual[0].residual_gain > 0
    assert projected.op == "conv" and projected.kernel == (1, 1) and projected.out_max is None and not projected.relu


@pytest.mark.parametrize("pooled", [True, False])
def test_a_network_is_packed_for_images_of_the_size_that_it_was_calibrated_with(pooled, tmp_path):
    torch.manual_seed(0)
    ends = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)] if pooled else [nn.Flatten(), nn.Linear(8 * 396, 5)]
    model = nn.Sequential(Normalize(), nn.Conv2d(3, 8, 3), nn.ReLU(), *ends).eval()
    batch = torch.randint(0, 256, (4, 3, 20, 24)).float() / 255
    expected = calibrate_(quantize_(model), batch)(batch)
    packed = pack_(model)
    assert isinstance(packed, PackedNetwork) and packed.image_shape == (3, 20, 24)
    torch.testing.assert_close(packed(batch), expected, rtol=0, atol=1e-4)
    save_model(packed, tmp_path / "model.safetensors")
    assert torch.equal(load_model(tmp_path / "model.safetensors")[0](batch), packed(batch))


@pytest.fixture
def packed():
    return pack_(calibrate_(quantize_(make("resnet_like"), absmean_fitted), images(16)))


def test_a_packed_network_is_never_cast(packed):
    batch = images(2)
    expected = packed(batch)
    packed.half().double()
    layers = [n for n in packed.nodes if n.codes is not None]
    assert all(n.gain.dtype == torch.float32 and n.codes.dtype == torch.int8 for n in layers)
    assert torch.equal(packed(batch), expected)


def test_a_packed_network_can_be_copied(packed):
    batch = images(2)
    expected = packed(batch)
    again, changed = copy.deepcopy(packed), copy.deepcopy(packed)
    changed.nodes[0].codes.zero_()
    assert not torch.equal(changed(batch), expected)  # its own nodes, not those that had run before the copy
    assert torch.equal(again(batch), expected) and again.nodes[0].codes is not packed.nodes[0].codes
    again.nodes[0].codes.zero_()
    assert torch.equal(packed(batch), expected)


def test_a_network_that_has_run_takes_another_backend(packed):
    network = copy.deepcopy(packed)
    network(images(1))
    network.backend = "reference"
    assert network.executor.backend == "reference"


def test_an_unknown_backend_is_told(packed):
    packed.backend = "quantum"
    with pytest.raises(ValueError, match="unknown backend 'quantum': choose one of auto, reference"):
        packed(images(1))


class BlockInPlace(BasicBlock):
    def forward(self, x_NCHW: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x_NCHW)))))
        out += self.shortcut(x_NCHW)
        return self.relu2(out)


class BlockWithAFunction(BasicBlock):
    def forward(self, x_NCHW: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x_NCHW)))))
        return self.relu2(torch.add(out, self.shortcut(x_NCHW)))


@pytest.mark.parametrize("size, kind", [(16, BasicBlock), (40, BlockInPlace), (8, BlockWithAFunction)])
def test_images_of_another_size(size, kind):
    """An average pool over the whole image knows its side, so a network is packed for one size."""
    block = nn.Sequential(Normalize(), nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), kind(4, 4, 1), nn.Dropout2d())
    model = nn.Sequential(block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES)).eval()
    batch = torch.randint(0, 256, (4, 3, size, size)).float() / 255
    calibrate_(quantize_(model, absmean_fitted), batch)
    with torch.no_grad():
        expected = model(batch)
        got = reference.NetworkExecutor(to_nodes(model, (3, size, size)))(batch)
    torch.testing.assert_close(got, expected, rtol=0, atol=0.03 * float(expected.abs().max()))


def test_one_mean_for_all_channels_pads_all_of_them():
    """The kernels read one value a channel."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 32 * 32, 5)]
    model, batch = nn.Sequential(Normalize((128,), (64,)), *layers).eval(), images(8)
    expected = calibrate_(quantize_(model), batch)(batch)
    packed = pack_(model)
    assert isinstance(packed, PackedNetwork) and packed.nodes[0].pad_values.tolist() == [128] * 3
    torch.testing.assert_close(packed(batch), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 3, 64, 64), (2, 1, 32, 32), (3, 32, 32)])
def test_images_that_a_network_was_not_packed_for(packed, shape):
    given = "×".join(map(str, shape[1:]))
    with pytest.raises(ValueError, match=f"packed for batches of images of 3×32×32, not {given}"):
        packed(torch.rand(shape))


def test_a_packed_network_takes_no_bytes_and_forgets_its_executor_when_it_is_moved():
    packed = pack_(calibrate_(quantize_(make("alexnet_like")), images(8)))
    assert isinstance(packed, PackedNetwork)
    with pytest.raises(ValueError, match="numbers in .0, 1., not torch.uint8"):
        packed(images(2).mul(255).byte())
    packed(images(1))
    assert packed.to("cpu")._executor is None


def test_pixels_that_are_not_normalized_count_in_units_of_255():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 900, 5)).eval()
    quantize_(quantize_(model, act_bits=None, only="0"))
    batch = images(4)
    expected = calibrate_(model, batch)(batch)
    node, step = to_nodes(model)[0], model[1].quantizer.step.detach()
    torch.testing.assert_close(node.gain * step, model[0].quantized_weight()[1] / 255, rtol=1e-5, atol=0)
    assert node.pad_values is None
    torch.testing.assert_close(pack_(model)(batch), expected, rtol=0, atol=1e-3)


def test_a_mean_beyond_the_pixels_is_no_padding():
    codes = torch.ones(1, 3, 1, 1, dtype=torch.int8)

    def padding(mean):
        return _fold_normalization(Normalize((mean,) * 3, (1,) * 3), codes, torch.ones(1), torch.zeros(1))[2].tolist()

    assert padding(255) == [255] * 3 and padding(0) == [0] * 3
    with pytest.raises(NotANetwork):
        padding(256)
