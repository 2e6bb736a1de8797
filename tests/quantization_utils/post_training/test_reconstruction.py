import copy
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from quantization_utils.post_training.layer_inputs import Stream
from quantization_utils.post_training.reconstruction import LatentCodes, Reconstruction, reconstruct_block
from quantization_utils.post_training.second_order import ternarize
from quantization_utils.quantizers import dequantize, mse_optimal
from tests import networks


def streams(model: nn.Module, images: Tensor, block: str, layers: list[str]) -> tuple[Stream, Stream]:
    """The float network and one whose `layers` have their nearest ternary weights, both at `block`."""
    ternary = copy.deepcopy(model)
    for name in layers:
        weight = ternary.get_submodule(name).weight
        weight.data.copy_(dequantize(*mse_optimal(weight.detach())))
    pair = Stream(model, images, 16), Stream(ternary, images, 16)
    for stream in pair:
        stream.enter(block)
    return pair


def error(reference: Stream, stream: Stream) -> float:
    """Mean squared error of the outputs of the block entered."""
    with torch.no_grad():
        pairs = [
            (stream.block(*call.args) - reference.block(*float_call.args)).square().mean()
            for call, float_call in zip(stream.calls, reference.calls, strict=True)
        ]
    return float(torch.stack(pairs).mean())


def test_latent_codes_start_from_the_given_ternary_weight() -> None:
    wanted = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    wanted[2] = 0  # a channel pruned away
    wanted[3, 0] = 0
    ternary = dequantize(*mse_optimal(wanted))
    ternary[4] = -ternary[4]  # codes far from the weight: they stay all the same, until something is learned
    assert torch.equal(LatentCodes(ternary, wanted).weight(), ternary)


def test_latent_codes_start_half_way_to_the_weight_but_for_the_border_of_their_code() -> None:
    codes = LatentCodes(torch.tensor([[0.5, 0.0, -0.5, 0.5, 0.5]]), torch.tensor([[0.4, 0.1, -0.3, -2.0, 2.0]]))
    torch.testing.assert_close(codes.latent.detach(), torch.tensor([[0.9, 0.1, -0.8, 0.51, 1.0]]))


def test_the_gradient_passes_straight_through_the_rounding() -> None:
    codes = LatentCodes(torch.tensor([[0.5, 0.0, -0.5]]), torch.tensor([[0.4, 0.0, -0.3]]))  # the second is pruned
    codes.weight().backward(torch.tensor([[3.0, 5.0, 7.0]]))
    torch.testing.assert_close(codes.latent.grad, torch.tensor([[1.5, 0.0, 3.5]]))
    torch.testing.assert_close(codes.log_gain.grad, torch.tensor([[3.0 * 0.5 - 7.0 * 0.5]]))


@pytest.mark.parametrize("count", [5, 64])
def test_a_linear_layer_comes_near_what_error_feedback_finds_and_not_past_the_best_of_all_codes(count: int) -> None:
    """128 channels with `count` strongly correlated inputs, from the nearest codes."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(256, count, generator=generator) @ torch.randn(count, count, generator=generator)
    model = nn.Sequential(nn.Linear(count, 128, bias=False)).eval()
    layer = model.get_submodule("0")
    layer.weight.data = torch.randn(128, count, generator=generator)
    reference, stream = streams(model, inputs, "0", ["0"])
    nearest = error(reference, stream)

    def error_with(weight: Tensor) -> float:
        stream.model.get_submodule("0").weight.data.copy_(weight)
        return error(reference, stream)

    learned = error_with(reconstruct_block(reference, stream, "0", ["0"], Reconstruction(600, lr=0.01))["0"])
    assert learned < nearest
    if count == 64:
        everything = torch.ones_like(layer.weight, dtype=torch.bool)
        fed_back = ternarize(layer.weight.detach(), inputs.T @ inputs / len(inputs), 1e-4, everything)
        assert learned < 1.15 * error_with(dequantize(*fed_back)) < 0.6 * nearest
    else:
        targets_PN = model(inputs).detach()
        outputs_PC = inputs @ torch.tensor(list(product((-1.0, 0.0, 1.0), repeat=count))).T
        saved_NC = (targets_PN.T @ outputs_PC).square() / outputs_PC.square().sum(0).clamp_min(1e-9)
        best_N = targets_PN.square().sum(0) - saved_NC.amax(1)
        assert learned > 0.999 * float(best_N.mean()) / len(inputs)


def test_a_residual_block_comes_nearer_and_stays_ternary() -> None:
    model, layers = networks.make("resnet_like"), ["5.conv1", "5.conv2"]
    reference, stream = streams(model, networks.images(64), "5", layers)
    before = error(reference, stream)
    learned = reconstruct_block(reference, stream, "5", layers, Reconstruction(100, lr=0.01))
    assert list(learned) == layers
    for name, weight in learned.items():
        magnitudes_NK = weight.flatten(1).abs()
        scale_N = magnitudes_NK.amax(1, keepdim=True)
        assert ((magnitudes_NK == 0) | (magnitudes_NK == scale_N)).all()
        stream.model.get_submodule(name).weight.data.copy_(weight)
    assert error(reference, stream) < 0.8 * before


def test_a_block_makes_up_for_what_earlier_ones_changed() -> None:
    """Its targets are what the float network's block puts out on inputs of its own."""
    model, inputs = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6)), torch.randn(64, 8)
    other = copy.deepcopy(model)
    for parameter in other[0].parameters():
        parameter.data.mul_(2)
    reference, stream = streams(model, inputs, "1", ["1"])[0], streams(other, inputs, "1", ["1"])[1]
    before = error(reference, stream)
    learned = reconstruct_block(reference, stream, "1", ["1"], Reconstruction(100, lr=0.02))
    stream.model[1].weight.data.copy_(learned["1"])
    assert error(reference, stream) < 0.5 * before


class Scaled(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, factor: float) -> Tensor:
        return self.layer(x) * factor


class AroundScaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Scaled(nn.Linear(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, factor=2.0)


@torch.no_grad()
def test_a_block_may_be_given_arguments_by_name_and_gradients_be_off_outside() -> None:
    pair = streams(AroundScaled(), torch.randn(64, 8), "block", ["block.layer"])
    assert list(reconstruct_block(*pair, "block", ["block.layer"], Reconstruction(20, lr=0.01))) == ["block.layer"]


def test_the_rate_falls_to_zero_as_a_half_cosine() -> None:
    pair = streams(nn.Sequential(nn.Linear(8, 6)), torch.randn(64, 8), "0", ["0"])
    rates: list[float] = []
    handle = register_optimizer_step_pre_hook(lambda adam, *_: rates.append(adam.param_groups[0]["lr"]))
    reconstruct_block(*pair, "0", ["0"], Reconstruction(4, lr=1.0))
    handle.remove()
    assert rates == pytest.approx([1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5])


def test_what_is_no_better_is_not_taken() -> None:
    model = networks.make("resnet_like")
    reference, stream = streams(model, networks.images(64), "5", ["5.conv1"])
    assert reconstruct_block(reference, stream, "5", ["5.conv1"], Reconstruction(3, lr=30.0)) == {}


@pytest.mark.parametrize("others, taken", [(16, False), (8, True)])
def test_what_is_learned_from_one_batch_is_judged_by_all_images(others: int, taken: bool) -> None:
    """One weight, which 16 images would double and the others keep. A step on the 16 makes it 2.2 times as large."""
    model, inputs = nn.Sequential(nn.Linear(1, 1, bias=False)).eval(), torch.ones(16 + others, 1)
    model[0].weight.data.fill_(1)
    wanted = inputs.clone()
    wanted[:16] = 2
    pair = Stream(model, wanted, 16), Stream(copy.deepcopy(model), inputs, 16)
    for stream in pair:
        stream.enter("0")
    steps = [Reconstruction(1, lr=0.8, seed=seed) for seed in range(4)]  # some of which begin with the others
    assert any(reconstruct_block(*pair, "0", ["0"], settings) for settings in steps) is taken


class WithFeatures(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x), x


def test_of_several_outputs_the_first_counts() -> None:
    layer, inputs = nn.Linear(8, 6), torch.randn(64, 8)
    alone = nn.Sequential()
    alone.layer = layer
    learned = [
        reconstruct_block(*streams(model, inputs, "", ["layer"]), "", ["layer"], Reconstruction(20, lr=0.01))["layer"]
        for model in (WithFeatures(layer), alone)
    ]
    assert torch.equal(*learned)


def test_every_batch_has_its_turn_before_one_has_another() -> None:
    reference, stream = streams(networks.make("resnet_like"), networks.images(64), "5", ["5.conv1"])
    seen: list[Tensor] = []
    stream.block.register_forward_pre_hook(lambda m, args: seen.append(args[0]) if torch.is_grad_enabled() else None)
    reconstruct_block(reference, stream, "5", ["5.conv1"], Reconstruction(8))
    wanted = sorted(id(call.args[0]) for call in stream.calls)
    assert sorted(map(id, seen[:4])) == sorted(map(id, seen[4:])) == wanted


def test_the_order_of_batches_depends_on_the_seed_alone() -> None:
    model, images = networks.make("resnet_like"), networks.images(64)

    def learned(seed: int) -> Tensor:
        pair = streams(copy.deepcopy(model), images, "5", ["5.conv1"])
        return reconstruct_block(*pair, "5", ["5.conv1"], Reconstruction(30, lr=0.01, seed=seed))["5.conv1"]

    assert torch.equal(learned(0), learned(0)) and not torch.equal(learned(0), learned(1))
