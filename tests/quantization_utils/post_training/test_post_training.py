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
    observe,
    ternarize_,
)
from quantization_utils.post_training.reconstruction import Reconstruction
from quantization_utils.quantizers import dequantize
from tests import networks

pytestmark = pytest.mark.filterwarnings("ignore:fewer positions than weights:UserWarning")


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
    with pytest.raises(ValueError, match="no float linear or convolution layer"):
        ternarize_(quantize_(networks.make("alexnet_like")), images)
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

    def codes(weight, inputs, damping, kept, sweeps=None, ways=None):
        seen.extend((damping, sweeps, ways))
        return mse_optimal(weight)

    monkeypatch.setattr("quantization_utils.post_training.matching_weight", matching)
    monkeypatch.setattr("quantization_utils.post_training.ternarize", codes)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    ternarize_(model, torch.rand(64, 3, 2, 2), Settings(search=9, damping=0.5, target_damping=0.25, sweeps=7))
    assert seen == [0.25, 0.5, 7, 9]


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
