import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.prune import l1_unstructured

from models.select import select_layers
from pruning_utils import l1, prune_
from quantization_utils import calibrate_, int8_absmax, load_model, mse_optimal, pack_, quantize_, save_model
from quantization_utils.bit_layers import BitConv2d, BitLinear
from quantization_utils.post_training import (
    Settings,
    _slope,
    correct_batch_norm_,
    observe,
    ternarize_,
    ternarize_layer_,
)
from quantization_utils.post_training.layer_inputs import residual_sums
from quantization_utils.post_training.moments import Moments, MomentSum, images_wanted
from quantization_utils.post_training.reconstruction import Reconstruction
from quantization_utils.quantizers import dequantize
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


@pytest.mark.parametrize("act_bits", [None, 8])
@pytest.mark.parametrize("kind", networks.KINDS)
def test_every_layer_ternary_packed_saved_and_loaded(kind: str, act_bits: int | None, tmp_path: Path) -> None:
    model, images = networks.make(kind), networks.images(48)
    layers = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    assert ternarize_(model, images, act_bits=act_bits) is model and not model.training
    for name in layers:
        layer = model.get_submodule(name)
        assert isinstance(layer, (BitConv2d, BitLinear))
        # The codes and scales are the weight itself, bit for bit.
        codes, scale_N = layer.quantized_weight()
        assert torch.equal(codes * scale_N.view(-1, *[1] * (codes.dim() - 1)), layer.weight)
    with torch.no_grad():
        expected = model(images)
    if kind == "vit_like":
        save_model(pack_(copy.deepcopy(model)), tmp_path / "model.safetensors")
        loaded = load_model(tmp_path / "model.safetensors")[0]
    else:
        loaded = pack_(copy.deepcopy(model))
    with torch.no_grad():
        logits = loaded(images)
    assert (logits - expected).abs().max() < (1e-4 if act_bits is None else 0.05) * expected.abs().max()


def test_each_step_of_the_ladder_brings_the_outputs_nearer() -> None:
    torch.manual_seed(1)
    model, images = networks.make("resnet_like"), networks.images(256)

    def error(quantized: nn.Module, seen: slice = slice(128, None)) -> float:
        with torch.no_grad():
            return float((quantized(images[seen]) - model(images[seen])).square().mean())

    nearest = error(quantize_(copy.deepcopy(model), mse_optimal, None))
    corrected = error(ternarize_(copy.deepcopy(model), images[:128], Settings(feedback=False)))
    feedback = error(ternarize_(copy.deepcopy(model), images[:128], Settings(correct=False)))
    closed_form = ternarize_(copy.deepcopy(model), images[:128])
    learned = ternarize_(copy.deepcopy(model), images[:128], reconstruction=Reconstruction(200))
    assert corrected < nearest and feedback < nearest and error(closed_form) < corrected
    # Nearer for every block (test_reconstruction.py), which promises little for a whole network of random weights.
    assert error(learned, slice(128)) < 1.05 * error(closed_form, slice(128))


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


class Twice(nn.Module):
    """A block that runs one of its modules two times, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).clamp_min(0))


def test_a_module_of_two_names_is_reconstructed_as_one() -> None:
    model = nn.Sequential(Twice(), nn.ReLU(), nn.Flatten(), nn.Linear(3072, 5)).eval()
    ternarize_(model, networks.images(32), reconstruction=Reconstruction(3, lr=0.1))
    layer = model[0].first[0]
    assert isinstance(layer, BitConv2d) and layer is model[0].second[0] and isinstance(layer.weight, nn.Parameter)


@pytest.mark.parametrize("reconstruction", [None, Reconstruction(10, lr=0.1)])
def test_pruned_weights_stay_pruned(reconstruction: Reconstruction | None) -> None:
    model = prune_(networks.make("resnet_like"), l1, 0.5)
    zero = {n: m.weight == 0 for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    ternarize_(model, networks.images(32), reconstruction=reconstruction)
    for name, pruned in zero.items():
        layer = model.get_submodule(name)
        assert pruned.any() and not layer.weight[pruned].any()
        assert torch.equal(dequantize(*layer.quantized_weight()), layer.weight)


def test_only_the_chosen_layers_change_and_no_mode() -> None:
    model, images = networks.make("resnet_like").train(), networks.images(32)
    before = copy.deepcopy(model.state_dict())
    assert ternarize_(model, images, keep=("1", "9"), reconstruction=Reconstruction(1)).training
    assert isinstance(model.get_submodule("5.conv1"), BitConv2d)
    for name in ("1", "9"):
        assert type(model.get_submodule(name)) in (nn.Conv2d, nn.Linear)
        assert torch.equal(model.get_submodule(name).weight, before[f"{name}.weight"])


def small_network() -> nn.Module:
    convolution = [nn.Conv2d(3, 4, 5), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*convolution, nn.Flatten(), nn.Linear(4, 5))


def test_a_model_in_training_becomes_what_it_becomes_in_evaluation() -> None:
    model, images = small_network(), torch.rand(16, 3, 8, 8)
    trained, evaluated = (ternarize_(copy.deepcopy(model).train(mode), images).state_dict() for mode in (True, False))
    torch.testing.assert_close(trained, evaluated, rtol=0, atol=0)


def test_steps_of_activations_come_from_all_images() -> None:
    images = torch.rand(16, 3, 8, 8)
    images[:8] *= 0.01
    ternary = ternarize_(small_network().eval(), images, act_bits=8)
    found = copy.deepcopy(ternary.state_dict())
    torch.testing.assert_close(found, calibrate_(ternary, images).state_dict(), rtol=0, atol=0)


def test_layers_that_are_quantized_already_stay_as_they_are() -> None:
    model = quantize_(networks.make("resnet_like"), int8_absmax, None, only="1")
    before = model[1].weight.clone()
    ternarize_(model, networks.images(16))
    assert model[1].weight_bits == 8 and torch.equal(model[1].weight, before) and model[9].weight_bits == "ternary"


class WithALayerThatNeverRuns(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network, self.spare = networks.make("alexnet_like"), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


def test_a_model_that_is_refused_stays_in_training() -> None:
    model = WithALayerThatNeverRuns().train()
    with pytest.raises(ValueError, match="spare did not run"):
        ternarize_(model, networks.images(16))
    assert all(module.training for module in model.modules())
    ternarize_(model, networks.images(16), keep=("spare",))


def test_a_model_that_is_refused_half_way_is_as_it_was() -> None:
    model = networks.make("alexnet_like").train()
    first, *_, last = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    first.eval()  # frozen, as in a fine-tuning
    last.weight.data[0] = torch.inf
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="non-finite"):
        ternarize_(model, networks.images(32))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [m for m in model.modules() if not m.training] == [first]


def test_a_model_that_is_interrupted_half_way_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("quantization_utils.post_training.correct_", interrupt)
    model = networks.make("alexnet_like")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyboardInterrupt):
        ternarize_(model, networks.images(16))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("act_bits", "sentence"), [(16, "2 to 8 bits"), (8, "relu runs more than once")])
def test_what_quantization_refuses_is_refused_before_the_work(act_bits: int, sentence: str) -> None:
    class OneReLU(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.relu = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.ReLU()
            self.last = nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.relu(self.two(self.relu(self.one(x)))).mean((2, 3)))

    model = OneReLU().eval()
    before, structure = copy.deepcopy(model.state_dict()), str(model)
    with pytest.raises(ValueError, match=sentence):
        ternarize_(model, networks.images(16), act_bits=act_bits)
    assert str(model) == structure
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@torch.inference_mode()
def test_in_inference_mode_rounding_is_not_learned_and_all_else_works() -> None:
    model, images = networks.make("resnet_like"), networks.images(16)
    with pytest.raises(ValueError, match="outside of torch.inference_mode"):
        ternarize_(model, images, act_bits=8, reconstruction=Reconstruction(2))
    ternarize_(model, images, act_bits=8)
    assert all(isinstance(layer, (BitConv2d, BitLinear)) for _, layer in select_layers(model))


def test_a_relu_in_place_changes_nothing() -> None:
    def ternary(inplace: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 4, 3), nn.ReLU(inplace), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.ReLU(inplace)]
        model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).eval()
        return ternarize_(model, networks.images(16), reconstruction=Reconstruction(2)).state_dict()

    torch.testing.assert_close(ternary(True), ternary(False), rtol=0, atol=0)


def test_wrong_input_is_refused_in_a_sentence() -> None:
    images = networks.images(32)
    with pytest.raises(ValueError, match="at least 16 images .* not 3"):
        ternarize_(networks.make("alexnet_like"), images[:3])
    with pytest.raises(ValueError, match="images are one tensor .*, not a list"):
        ternarize_(networks.make("alexnet_like"), list(images))  # type: ignore[arg-type]
    pruned = networks.alexnet_like()
    l1_unstructured(pruned.get_submodule("1"), "weight", 0.5)
    with pytest.raises(ValueError, match="1 computes its weight from other tensors"):
        ternarize_(pruned, images)
    with pytest.raises(ValueError, match=r"1 has torch.float64 weights: post-training takes float32 \(model.float"):
        ternarize_(networks.make("alexnet_like").double(), images.double())
    no_statistics = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, track_running_stats=False)).eval()
    with pytest.raises(ValueError, match=r"1 has no running statistics to correct: leave 0 out"):
        ternarize_(no_statistics, images)
    grouped = nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 900, 2)).eval()
    with pytest.raises(ValueError, match="0 is a grouped convolution"):
        ternarize_(grouped, images)
    for padding in ({"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}):
        padded = nn.Sequential(nn.Conv2d(3, 2, 3, **padding), nn.ReLU(), nn.Flatten(), nn.Linear(2048, 2)).eval()
        with pytest.raises(ValueError, match="0 is padded with other than a number of zeros"):
            ternarize_(padded, images)
    attention = nn.Sequential(nn.Conv2d(3, 2, 3), nn.modules.linear.NonDynamicallyQuantizableLinear(30, 2)).eval()
    before = copy.deepcopy(attention.state_dict())
    with pytest.raises(ValueError, match="1 is a NonDynamicallyQuantizableLinear"):
        ternarize_(attention, images)
    assert all(torch.equal(value, before[name]) for name, value in attention.state_dict().items())
    for name in ("damping", "target_damping"):
        with pytest.raises(ValueError, match="damping is above 0, not 0.0"):
            Settings(**{name: 0.0})
    with pytest.raises(ValueError, match="nothing to quantize"):
        ternarize_(networks.make("alexnet_like"), images, only=nn.LSTM)
    broken = networks.make("alexnet_like")
    broken.get_submodule("2").running_mean.fill_(torch.nan)
    with pytest.raises(ValueError, match="non-finite"):
        ternarize_(broken, images)


@pytest.mark.filterwarnings("default:fewer positions than weights")
def test_fewer_images_than_weights_of_a_channel_are_said() -> None:
    with pytest.warns(UserWarning, match="fewer positions than weights per channel in 11: .* no full rank"):
        ternarize_(networks.make("alexnet_like"), networks.images(32))


@pytest.mark.filterwarnings("default:fewer positions than weights")
def test_positions_are_thinned_out_by_the_number_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four of each image are 64, and a channel has 75 weights; all would be 256."""
    monkeypatch.setattr("quantization_utils.post_training.moments.MAX_COLUMNS", 64)
    monkeypatch.setattr("quantization_utils.post_training.moments.LEAST_OF_AN_IMAGE", 1)
    with pytest.warns(UserWarning, match="fewer positions than weights per channel in 0:"):
        ternarize_(small_network(), torch.rand(16, 3, 8, 8))


@pytest.mark.filterwarnings("default:fewer positions than weights")
def test_as_many_images_as_weights_of_a_channel_are_not_too_few(recwarn: pytest.WarningsRecorder) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
    assert ternarize_(model, torch.rand(16, 4, 2, 2)) is model and not recwarn.list


def test_each_setting_reaches_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def matching(weight, inputs, cross, damping):
        seen.append(damping)
        return weight

    def codes(weight, inputs, damping, kept, sweeps=None):
        seen.extend((damping, sweeps))
        return mse_optimal(weight)

    monkeypatch.setattr("quantization_utils.post_training.matching_weight", matching)
    monkeypatch.setattr("quantization_utils.post_training.ternarize", codes)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    ternarize_(model, torch.rand(64, 3, 2, 2), Settings(damping=0.5, target_damping=0.25, sweeps=7))
    assert seen == [0.25, 0.5, 7]


def test_how_many_positions_of_an_image_count() -> None:
    assert [MomentSum(nn.Linear(2, 2), images).per_image for images in (100, 100_000)] == [250, 24]
    assert [images_wanted(positions) for positions in (1024, 24, 4, 1)] == [1042, 1042, 6250, 25_000]


@pytest.mark.parametrize("reconstruction", [None, Reconstruction(steps=1)])
def test_layers_look_at_as_many_images_as_they_want(reconstruction, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 100 images a convolution at 36 positions wants 96 / 24, a linear layer 96; a reconstruction wants all."""
    seen: dict[str, int] = {}

    def observed(reference, stream, name, *rest):
        seen[name] = sum(len(call.args[0]) for call in stream.calls)
        assert seen[name] == sum(len(call.args[0]) for call in reference.calls)
        return observe(reference, stream, name, *rest)

    monkeypatch.setattr("quantization_utils.post_training.moments.MAX_COLUMNS", 96)
    monkeypatch.setattr("quantization_utils.post_training.observe", observed)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4), nn.ReLU(), nn.Linear(4, 2))
    ternarize_(model, torch.rand(100, 3, 8, 8), keep=("3",), reconstruction=reconstruction)
    assert seen == {"0": 100 if reconstruction else 4, "5": 96 if reconstruction is None else 100}


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
