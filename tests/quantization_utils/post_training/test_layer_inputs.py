import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantization_utils.post_training.layer_inputs import (
    ResidualSum,
    Stream,
    blocks,
    execution_order,
    positions_of,
    replayable_blocks,
    residual_sums,
    sums_last,
)
from tests import networks


def inputs_in_a_whole_pass(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """What every module reads first when the model sees all images at once."""
    seen: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name:
            module.register_forward_pre_hook(lambda m, args, name=name: seen.setdefault(name, args[0]) is None or None)
    with torch.no_grad():
        model(images)
    return seen


@pytest.mark.parametrize("kind", networks.KINDS)
def test_a_stream_sees_what_a_whole_pass_sees(kind: str) -> None:
    model, images = networks.make(kind), networks.images(7)
    layers = list(execution_order(model, images[:2]))
    expected = inputs_in_a_whole_pass(copy.deepcopy(model), images)
    stream = Stream(model, images, batch_size=3)
    seen = []
    for block, names in blocks(model, layers):
        stream.enter(block)
        torch.testing.assert_close(torch.cat([call.args[0] for call in stream.calls]), expected[block])
        for name in names:
            layer = model.get_submodule(name)
            inputs = torch.cat([stream.input_of(layer, call) for call in stream.calls])
            torch.testing.assert_close(inputs, expected[name])
            seen.append(name)
        stream.leave()
    assert sorted(seen) == sorted(n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d)))


def test_a_stream_that_restarts_goes_on_with_all_it_is_given() -> None:
    model, images = networks.make("resnet_like"), networks.images(7)
    expected = inputs_in_a_whole_pass(copy.deepcopy(model), images)
    stream = Stream(model, images[:1], batch_size=3)
    names = [name for name, _ in blocks(model, list(execution_order(model, images[:2])))]
    for number, name in enumerate(names):
        if number == 2:
            stream.restart(images)
        stream.enter(name)
        inputs = torch.cat([call.args[0] for call in stream.calls])
        torch.testing.assert_close(inputs, expected[name][: 1 if number < 2 else 7])
        stream.leave()


def test_where_the_weights_of_a_layer_are_used() -> None:
    assert [*positions_of(networks.make("alexnet_like"), networks.images(1)).values()] == [1024, 225, 1, 1]
    tokens = nn.Sequential(nn.Linear(3, 2), nn.Flatten(), nn.Linear(10, 2))
    assert positions_of(tokens, torch.zeros(1, 5, 3)) == {"0": 5, "2": 1}
    conv = nn.Conv2d(3, 3, 1)  # runs twice, and the first run counts
    assert positions_of(nn.Sequential(conv, nn.MaxPool2d(2), conv), networks.images(1)) == {"0": 1024}


def test_looking_at_the_inputs_leaves_no_trace_in_a_model() -> None:
    model, images = networks.make("resnet_like"), networks.images(4)
    expected = model(images)
    positions_of(model, images)
    stream = Stream(model, images, 2)
    for block, _ in replayable_blocks(model, list(execution_order(model, images[:2])), images):
        stream.enter(block)
        stream.leave()
    torch.testing.assert_close(model(images), expected, rtol=0, atol=0)
    assert not any("forward" in vars(m) or m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_blocks_and_batch_norms_of_a_residual_network() -> None:
    model = networks.make("resnet_like")
    order = execution_order(model, networks.images(2))
    assert order["6.conv1"] == "6.bn1" and order["6.shortcut.0"] == "6.shortcut.1" and order["9"] is None
    assert blocks(model, list(order)) == [
        ("1", ["1"]), ("5", ["5.conv1", "5.conv2"]), ("6", ["6.conv1", "6.conv2", "6.shortcut.0"]), ("9", ["9"]),
    ]  # fmt: skip


@pytest.mark.parametrize("shape, norm", [((4, 8), "1"), ((4, 6, 8), None)])
def test_a_batch_norm_of_tokens_is_not_the_layers(shape: tuple[int, ...], norm: str | None) -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6)).eval()
    assert execution_order(model, torch.randn(shape)) == {"0": norm}


def test_the_layer_with_the_most_weights_closes_a_sum() -> None:
    """In the second block over the shortcut's convolution; a transformer's data flow is not traced."""
    assert residual_sums(networks.make("resnet_like")) == {
        "5.conv2": ResidualSum("5.relu2", "5.bn2", ("5.conv2",)),
        "6.conv2": ResidualSum("6.relu2", "6.bn2", ("6.conv2", "6.shortcut.0")),
    }
    assert residual_sums(networks.make("alexnet_like")) == residual_sums(networks.make("vit_like")) == {}


class Joint(nn.Module):
    def __init__(self, join: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.relu, self.join = nn.Conv2d(3, 3, 1), nn.ReLU(), join
        self.first, self.last = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.join(self, x))


@pytest.mark.parametrize(
    "join, found",
    [
        (lambda m, x: m.conv(x) + x, {"conv": ResidualSum("relu", None, ("conv",))}),
        (lambda m, x: torch.relu(m.conv(x) + x), {}),
        (lambda m, x: m.conv(x) * x, {}),
        (lambda m, x: torch.add(x, m.conv(x), alpha=0.1), {}),
        (lambda m, x: m.conv(x) + x if x.sum() > 0 else x, {}),
        (lambda m, x: (lambda y: m.relu(y) + y)(m.conv(x) + x), {}),
        (lambda m, x: m.last(input=m.conv(input=x)) + x, {"conv": ResidualSum("relu", "last", ("conv",))}),
    ],
    ids=["a sum", "no module reads", "a product", "a factor", "what cannot be traced", "two readers", "called by name"],
)
def test_only_plain_sums_are_aimed_at(join: Callable[[Any, Tensor], Tensor], found: dict[str, ResidualSum]) -> None:
    assert residual_sums(Joint(join)) == found


@pytest.mark.parametrize(
    "join, norm",
    [
        (lambda m, x: m.first(input=m.conv(x)), "first"),
        (lambda m, x: m.conv(m.first(m.conv(x))), "first"),
        (lambda m, x: m.last(m.conv(m.first(m.conv(x)))), "first"),
        (lambda m, x: m.last(m.conv(m.conv(x))), None),
    ],
    ids=["called by name", "behind the first run", "behind both runs", "behind the second run"],
)
def test_the_batch_norm_of_a_layer_is_the_one_behind_its_first_run(
    join: Callable[[Any, Tensor], Tensor], norm: str | None
) -> None:
    assert execution_order(Joint(join).eval(), networks.images(1)) == {"conv": norm}


def test_a_stream_sees_what_a_layer_is_given_by_name() -> None:
    model, images = Joint(lambda m, x: m.conv(input=x * 2)).eval(), networks.images(2)
    stream = Stream(model, images, 2)
    stream.enter("")
    assert torch.equal(stream.input_of(model.conv, stream.calls[0]), images * 2)


class Dense(nn.Module):
    """Every layer reads the outputs of all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4 * (i + 1), 4) for i in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(self.first(x)))


class Holder(nn.Module):
    """Holds a layer and never runs itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)


class AroundHolders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = Holder(), Holder()

    def forward(self, x: Tensor) -> Tensor:
        return self.last.layer(self.first.layer(x))


class Pair(nn.Module):
    """Puts out two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x), x


class AroundPairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = Pair(), Pair()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x)[0])[0]


@pytest.mark.parametrize("kind", [Dense, Twice, AroundHolders, AroundPairs])
def test_blocks_that_cannot_be_replayed_are_one(kind: type[nn.Module]) -> None:
    model, x = kind(), torch.randn(2, 4)
    names = list(execution_order(model, x))
    assert replayable_blocks(model, names, x) == [("", names)] != blocks(model, names)
    assert torch.isfinite(model(x)).all() and "forward" not in vars(model.get_submodule(names[0]))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, *, factor: float) -> Tensor:
        return self.layer(x) * factor


class AroundScaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = Scaled(), Scaled()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x, factor=2.0), factor=3.0)


def test_what_a_block_is_given_by_name_reaches_it() -> None:
    model, x = AroundScaled(), torch.randn(2, 4)
    assert replayable_blocks(model, ["first.layer", "last.layer"], x) == blocks(model, ["first.layer", "last.layer"])
    stream = Stream(model, x, 2)
    for block in (model.first, model.last):
        stream.enter("first" if block is model.first else "last")
        outputs = stream.output_of(block.layer, stream.calls[0])
        stream.leave()
    assert torch.equal(outputs * 3, model(x)) and torch.equal(stream.outputs[0], model(x))


def test_containers_of_pytorch_are_no_blocks() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Sequential(nn.Linear(4, 4)))
    assert blocks(model, ["0.0", "1.0"]) == [("0.0", ["0.0"]), ("1.0", ["1.0"])]


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Holder(), Holder()


def test_of_blocks_in_blocks_the_outermost_count() -> None:
    names = ["0.one.layer", "0.two.layer", "1.one.layer", "1.two.layer"]
    assert blocks(nn.Sequential(Outer(), Outer()), names) == [("0", names[:2]), ("1", names[2:])]


@pytest.mark.parametrize("kind", networks.KINDS)
def test_blocks_of_the_study_can_be_replayed(kind: str) -> None:
    model, images = networks.make(kind), networks.images(2)
    names = list(execution_order(model, images))
    assert replayable_blocks(model, names, images) == blocks(model, names)


def test_a_forward_of_a_module_itself_comes_back() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4)
    forward = model[0].forward
    model[0].forward = lambda x: forward(x) + 100
    expected = model(x)
    replayable_blocks(model, ["0", "1"], x)
    assert torch.equal(model(x), expected)


def test_what_closes_a_sum_follows_what_else_it_adds() -> None:
    sums = {"b": ResidualSum("r", None, ("a", "b")), "c": ResidualSum("s", None, ("c", "shortcut", "kept as it is"))}
    assert sums_last(["a", "b", "c", "d", "shortcut", "e"], sums) == ["a", "b", "d", "shortcut", "c", "e"]


def with_relus(inplace: bool) -> nn.Module:
    """Convolution, ReLU, batch norm: in place, the ReLU writes to what the convolution has put out."""
    torch.manual_seed(0)
    first = [nn.Conv2d(3, 8, 3), nn.ReLU(inplace), nn.BatchNorm2d(8)]
    second = [nn.Conv2d(8, 8, 3), nn.ReLU(inplace), nn.BatchNorm2d(8)]
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(8 * 28 * 28, 5)).eval()


def test_what_relus_do_in_place_is_no_trouble_for_a_stream() -> None:
    images = networks.images(4)
    model, expected = with_relus(True), inputs_in_a_whole_pass(with_relus(False), images)
    stream = Stream(model, images, 2)
    for name in ("0", "3", "7"):
        stream.enter(name)
        assert torch.equal(torch.cat([call.args[0] for call in stream.calls]), expected[name])
        stream.leave()


@pytest.mark.parametrize("inplace", [True, False])
def test_a_batch_norm_behind_a_relu_is_not_that_of_the_layer(inplace: bool) -> None:
    assert execution_order(with_relus(inplace), networks.images(2)) == {"0": None, "3": None, "7": None}
    with torch.inference_mode():
        assert execution_order(networks.make("alexnet_like"), networks.images(2))["1"] == "2"
