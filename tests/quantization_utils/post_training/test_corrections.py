"""What ternary layers aim at: sums with their shortcuts, and the means and slopes of the float network."""

import copy

import pytest
import torch
from torch import Tensor, nn

from quantization_utils.bit_layers import BitConv2d
from quantization_utils.post_training import (
    Settings,
    _slope,
    correct_batch_norm_,
    ternarize_,
    ternarize_layer_,
)
from quantization_utils.post_training.layer_inputs import residual_sums
from quantization_utils.post_training.moments import Moments, MomentSum
from quantization_utils.post_training.reconstruction import Reconstruction
from tests import networks

pytestmark = pytest.mark.filterwarnings("ignore:fewer positions than weights:UserWarning")


def outputs_of(model: nn.Module, kinds: tuple[type, ...], images: Tensor) -> list[Tensor]:
    """Output of every module of these kinds, (channels, positions), in order of execution."""
    found: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, kinds):
            module.register_forward_hook(lambda m, a, out: found.append(out.movedim(1, 0).flatten(1)))
    with torch.no_grad():
        model(images)
    return found


def read_by_relus(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Input of every ReLU, (channels, positions)."""
    found: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_pre_hook(lambda m, args: found.append(args[0].movedim(1, 0).flatten(1)))
    with torch.no_grad():
        model(images)
    return found


def assert_equal_means(found: list[Tensor], wanted: list[Tensor]) -> None:
    """Of every channel."""
    assert found
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.mean(1), other.mean(1), rtol=1e-3, atol=1e-3)


@pytest.fixture
def every_position(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantization_utils.post_training.moments.MAX_COLUMNS", 1_000_000)


def test_what_relus_read_has_the_mean_of_the_float_network(every_position: None) -> None:
    """Behind batch norms, and behind sums with shortcuts."""
    model, images = networks.make("resnet_like"), networks.images(64)
    ternary = ternarize_(copy.deepcopy(model), images)
    assert_equal_means(read_by_relus(ternary, images), read_by_relus(model, images))


def test_no_other_slope_of_a_batch_norm_is_nearer_to_the_float_network(every_position: None) -> None:
    model, images = networks.make("resnet_like"), networks.images(64)
    ternary = ternarize_(copy.deepcopy(model), images)
    pairs = zip(*(outputs_of(m, (nn.BatchNorm2d,), images) for m in (ternary, model)), strict=True)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    for name, (found, wanted) in zip(names, pairs, strict=True):
        if not name.endswith("bn2"):  # those aim at a sum
            found = found - found.mean(1, keepdim=True)
            slope = (found * wanted).mean(1) / found.square().mean(1)
            torch.testing.assert_close(slope, torch.ones_like(slope), rtol=1e-2, atol=1e-2)


def test_a_slope_next_to_zero_makes_up_for_nothing() -> None:
    norm = nn.BatchNorm2d(3)
    norm.weight.data[:2] = torch.tensor([1e-6, -1.0])  # a negative one turns a channel around
    assert _slope(norm).isinf().tolist() == [True, False, False]


@pytest.mark.parametrize("weight, wanted, slope", [(1, 100, 2), (1, 0.01, 0.5), (1, -9, 0.5), (0, 9, 1)])
def test_a_slope_is_at_most_doubled_or_halved_and_stays_where_nothing_changes(
    weight: float, wanted: float, slope: float
) -> None:
    """`wanted`: what is wanted is so many times the output."""
    norm = nn.BatchNorm1d(1, eps=0.1)
    moments = Moments(torch.eye(2), torch.zeros(2), torch.tensor([[wanted, 0.0]]), torch.zeros(1), 9)
    correct_batch_norm_(norm, copy.deepcopy(norm), moments, torch.tensor([[weight, 0.0]]))
    assert float(norm.running_var + norm.eps) == pytest.approx((1 + norm.eps) / slope**2)


@pytest.mark.parametrize("bias, settings, same", [
    (True, Settings(), True), (True, Settings(correct=False), False), (False, Settings(), False)
])  # fmt: skip
def test_codes_do_not_care_for_a_mean_that_a_bias_makes_up_for(bias: bool, settings: Settings, same: bool) -> None:
    model, inputs = nn.Sequential(nn.Linear(8, 20, bias=bias)), torch.randn(200, 8)
    found = []
    for shift in (0.0, 3.0):
        ternary, total = copy.deepcopy(model), MomentSum(model.get_submodule("0"), images=200)
        with torch.no_grad():
            total.add(inputs + shift, (inputs + shift) @ ternary.get_submodule("0").weight.T)
        ternarize_layer_(model, ternary, "0", None, total.result(), settings)
        found.append(ternary.get_submodule("0").weight.sign())
    assert torch.equal(*found) == same


class Body(nn.Sequential):
    """A block whose sum is outside of it."""


class AroundBodies(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bodies, self.relus = (nn.ModuleList(kind() for _ in range(2)) for kind in (Body, nn.ReLU))
        for body in self.bodies:
            body.append(nn.Conv2d(3, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        for body, relu in zip(self.bodies, self.relus, strict=True):
            x = relu(body(x) + x)
        return x


class AroundALayer(nn.Module):
    """The name of what reads the sum only begins as the layer's does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.conv_relu = nn.Conv2d(3, 3, 1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_relu(self.conv(x) + x)


def test_a_layer_that_aims_at_a_sum_is_made_ternary_after_the_shortcut(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def noted(float_model, model, name, *rest):
        seen.append(name)
        ternarize_layer_(float_model, model, name, *rest)

    monkeypatch.setattr("quantization_utils.post_training.ternarize_layer_", noted)
    ternarize_(networks.resnet_like(), networks.images(16))
    assert seen == ["1", "5.conv1", "5.conv2", "6.conv1", "6.shortcut.0", "6.conv2", "9"]


@pytest.mark.parametrize("kind, names", [(AroundBodies, ["bodies.0.0", "bodies.1.0"]), (AroundALayer, ["conv"])])
def test_a_sum_outside_of_its_layers_block_is_not_aimed_at(kind: type[nn.Module], names: list[str]) -> None:
    model = kind()
    assert list(residual_sums(model)) == names
    ternarize_(model, networks.images(16))
    assert all(isinstance(model.get_submodule(name), BitConv2d) for name in names)


def test_a_sum_is_nearer_to_the_float_network_if_its_last_layer_makes_up_for_the_shortcut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, images = networks.make("resnet_like"), networks.images(256)

    def error() -> float:
        sums = [read_by_relus(m, images)[-1] for m in (ternarize_(copy.deepcopy(model), images), model)]
        return float((sums[0] - sums[1]).square().mean())

    with_targets = error()
    monkeypatch.setattr("quantization_utils.post_training.residual_sums", lambda model: {})
    assert with_targets < 0.95 * error()


def test_a_batch_norm_outside_of_a_block_follows_what_reconstruction_learned(every_position: None) -> None:
    model, images = networks.make("alexnet_like"), networks.images(64)
    ternary = ternarize_(copy.deepcopy(model), images, reconstruction=Reconstruction(300, lr=0.01))
    norms = (nn.BatchNorm1d, nn.BatchNorm2d)
    assert_equal_means(outputs_of(ternary, norms, images), outputs_of(model, norms, images))


def test_means_and_slopes_stay_where_they_are_not_to_be_corrected() -> None:
    model = networks.make("alexnet_like")
    ternary = ternarize_(copy.deepcopy(model), networks.images(32), Settings(correct=False),
                         reconstruction=Reconstruction(20, lr=0.01))  # fmt: skip
    for name, module in model.named_modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            assert torch.equal(ternary.get_submodule(name).running_mean, module.running_mean)
            assert torch.equal(ternary.get_submodule(name).running_var, module.running_var)


@pytest.mark.parametrize("reconstruction", [None, Reconstruction(20, lr=0.01)])
def test_biases_give_the_mean_of_the_float_network(every_position: None, reconstruction: Reconstruction | None) -> None:
    model, images = networks.make("alexnet_like_without_batch_norm"), networks.images(64)
    ternary = ternarize_(copy.deepcopy(model), images, reconstruction=reconstruction)
    layers = (nn.Conv2d, nn.Linear)
    assert_equal_means(outputs_of(ternary, layers, images), outputs_of(model, layers, images))


def test_a_bias_before_a_batch_norm_is_part_of_the_mean(every_position: None) -> None:
    model, images = networks.make("alexnet_like"), networks.images(64)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.bias = nn.Parameter(torch.randn(module.out_channels))
    ternary = ternarize_(copy.deepcopy(model), images)
    norms = (nn.BatchNorm2d,)
    assert_equal_means(outputs_of(ternary, norms, images), outputs_of(model, norms, images))


def test_a_corrected_variance_is_not_below_zero():
    norm, float_norm = nn.BatchNorm2d(1), nn.BatchNorm2d(1)
    float_norm.running_var.zero_()
    moments = Moments(torch.eye(2), torch.zeros(2), torch.tensor([[9.0, 9.0]]), torch.zeros(1), 10)
    correct_batch_norm_(norm, float_norm, moments, torch.ones(1, 2))
    assert norm.running_var.item() == 0


def test_a_batch_norm_without_weights_has_a_slope():
    norm = nn.BatchNorm2d(2, eps=1.0, affine=False)
    norm.running_var.fill_(3)
    assert _slope(norm).tolist() == [0.5, 0.5]
