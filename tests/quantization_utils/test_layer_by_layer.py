"""Models that are no network, a list of nodes: packed layer by layer, they keep their outputs."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from models.normalize import Normalize
from quantization_utils import calibrate_, pack_, quantize_
from quantization_utils.network import NotANetwork, PackedNetwork, to_nodes
from tests.networks import images, make


def assert_packed_layer_by_layer(model: nn.Module, batch: Tensor) -> None:
    """With the outputs that the calibrated model has."""
    expected = calibrate_(quantize_(model), batch)(batch)
    packed = pack_(model)
    assert not isinstance(packed, PackedNetwork)
    torch.testing.assert_close(packed(batch), expected, rtol=0, atol=1e-4)


def spoil(which: str) -> nn.Module:
    """A calibrated chain that cannot be a list of nodes."""
    model = make("alexnet_like")
    if which == "a float layer":
        return calibrate_(quantize_(model, keep=["1"]), images(8))
    if which == "no calibration":
        return quantize_(model)
    if which == "a normalisation that is not in whole pixels":
        model[0] = Normalize((125.5, 123, 114), (63, 63, 63))
    if which == "a weight-only layer":
        return quantize_(model, act_bits=None)
    return calibrate_(quantize_(model), images(8))


@pytest.mark.parametrize(
    "which",
    ["a float layer", "no calibration", "a normalisation that is not in whole pixels", "a weight-only layer"],
)
def test_what_is_not_a_network_is_packed_layer_by_layer(which):
    model = spoil(which)
    with pytest.raises(NotANetwork):
        to_nodes(model)
    assert not isinstance(pack_(model), PackedNetwork)


JOINTS = {
    "a sum with a factor": lambda m, x: m.relu(torch.add(m.conv(x), x, alpha=0.5)),
    "a batch norm behind a sum": lambda m, x: m.relu(m.bn(m.conv(x) + x)),
    "a parameter of its own": lambda m, x: m.relu(m.conv(x) * m.gain + x),
    "an input given by name": lambda m, x: m.relu(m.conv(input=x) + x),
    "a second shortcut": lambda m, x: m.relu(m.conv(x) + x + x),
    "a constant": lambda m, x: m.relu(m.conv(x) + 0.1),
    "a sum": lambda m, x: m.relu(m.conv(x) + x),
}


class Joint(nn.Module):
    def __init__(self, name: str, channels: int = 8) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()
        self.bn, self.gain, self.name = nn.BatchNorm2d(channels), nn.Parameter(torch.tensor(0.7)), name
        nn.init.uniform_(self.bn.weight, 0.3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return JOINTS[self.name](self, x)

    def __str__(self) -> str:
        return self.name


@pytest.mark.parametrize(
    "layer, pixels",
    [
        (nn.MaxPool2d(3, 2, ceil_mode=True), 8),
        (nn.MaxPool2d(2, 1, dilation=2), 14),
        (nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8, affine=False), nn.ReLU()), 16),
        (nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU()), 16),
        (nn.AdaptiveAvgPool2d(2), 2),
        *((Joint(name), 16) for name in JOINTS if name != "a sum"),
        (nn.Sequential(nn.Conv2d(8, 8, 1, padding=1), nn.ReLU()), 18),
        (nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.ReLU()), 16),
        (nn.Sequential(nn.Conv2d(8, 8, 3, padding=2, dilation=2), nn.ReLU()), 16),
    ],
    ids=str,
)
def test_options_that_nodes_do_not_have_are_not_lost(layer, pixels):
    torch.manual_seed(0)
    layers = [Normalize(), nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), layer, nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(8 * pixels**2, 5)).eval()
    batch = images(8)
    assert_packed_layer_by_layer(model, batch)


class Broadcasting(nn.Module):
    """Its sum adds one pixel, or one channel, to all."""

    def __init__(self, channels: int, pool: bool) -> None:
        super().__init__()
        self.normalize, self.first, self.relu = Normalize(), nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()
        self.main, self.side = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, channels, 1)
        self.pool = nn.AdaptiveAvgPool2d(1) if pool else nn.Identity()
        self.last_relu, self.mean, self.flatten = nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.last = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.first(self.normalize(x)))
        x = self.last_relu(self.main(x) + self.side(self.pool(x)))
        return self.last(self.flatten(self.mean(x)))


class Reshaping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.normalize, self.first, self.relu = Normalize(), nn.Conv2d(3, 4, 3), nn.ReLU()
        self.last = nn.Linear(3600, 5)

    def forward(self, x: Tensor) -> Tensor:
        count = x.size(0)
        return self.last(self.relu(self.first(self.normalize(x))).view(count, -1))


class Preactivated(nn.Module):
    """The ReLU changes in place what the sum reads after it."""

    def __init__(self) -> None:
        super().__init__()
        self.normalize, self.first, self.relu = Normalize(), nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True)
        self.inner, self.last_relu, self.flatten = nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Flatten()
        self.dropout, self.last = nn.Dropout(), nn.Linear(8192, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.normalize(x))
        return self.last(self.flatten(self.last_relu(x + self.inner(self.relu(self.dropout(x))))))


class SummedInPlace(Preactivated):
    """What the second sum reads is what the first has made of it."""

    def forward(self, x: Tensor) -> Tensor:
        x = also_x = self.relu(self.first(self.normalize(x)))
        x += self.inner(x)
        return self.last(self.flatten(self.last_relu(self.inner(self.middle_relu(x)) + also_x)))

    def __init__(self) -> None:
        super().__init__()
        self.relu, self.middle_relu = nn.ReLU(), nn.ReLU()


class Doubled(nn.Identity):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Steeper(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def small(*middle: nn.Module) -> nn.Module:
    layers = [Normalize(), nn.Conv2d(3, 8, 3), nn.ReLU(), *middle, nn.Conv2d(8, 4, 3), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(4 * 28 * 28, 5))


def hooked(before: bool) -> nn.Module:
    model = small()
    if before:
        model[2].register_forward_pre_hook(lambda module, args: (2 * args[0],))
    else:
        model[2].register_forward_hook(lambda module, args, output: 2 * output)
    return model


@pytest.mark.parametrize(
    "make_model",
    [
        *(partial(Broadcasting, channels, pool) for channels, pool in ((1, False), (8, True), (1, True))),
        Reshaping, Preactivated, SummedInPlace, partial(hooked, False), partial(hooked, True),
        partial(small, Doubled()), partial(small, nn.Conv2d(8, 8, 1), Steeper()),
    ],
    ids=["one channel", "one pixel", "one number", "view", "in place", "sum in place", "hook", "pre-hook",
         "own identity", "own ReLU"],
)  # fmt: skip
def test_what_nodes_do_not_say_is_packed_layer_by_layer(make_model):
    torch.manual_seed(0)
    model, batch = make_model().eval(), images(4)
    assert_packed_layer_by_layer(model, batch)


NOT_FOLDED = {
    "two normalisations": [Normalize(), Normalize((10,) * 3, (5,) * 3), nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten()],
    "a normalisation later on": [nn.Conv2d(3, 3, 3), nn.ReLU(), Normalize((1,) * 3, (5,) * 3), nn.Flatten()],
    "a batch norm of pixels": [Normalize(), nn.Conv2d(3, 4, 25), nn.Flatten(), nn.BatchNorm1d(256), nn.ReLU()],
}


@pytest.mark.parametrize("layers", NOT_FOLDED.values(), ids=NOT_FOLDED)
def test_what_does_not_fold_is_not_lost(layers):
    torch.manual_seed(0)
    inputs = nn.Sequential(*layers).eval()(images(2)).shape[1]
    model = nn.Sequential(*layers, nn.Linear(inputs, 5)).eval()
    batch = images(8)
    assert_packed_layer_by_layer(model, batch)


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(30, 5), nn.ReLU(), nn.Flatten(), nn.Linear(600, 3)],
        [nn.Conv2d(3, 1, (3, 1)), nn.ReLU(), nn.Linear(32, 32)],
        [nn.Conv2d(3, 1, 3), nn.ReLU(), nn.Flatten(2), nn.Linear(900, 5)],
        [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(2), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(900, 5)],
        [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Flatten()],
    ],
    ids=["two linear layers", "no flattening", "a channel by itself", "a pool", "a convolution at the end"],
)
def test_what_is_not_flattened_to_vectors_keeps_its_shape(layers):
    torch.manual_seed(0)
    model, batch = nn.Sequential(Normalize(), *layers).eval(), images(4)
    assert_packed_layer_by_layer(model, batch)


def test_transformers_are_not_chains():
    with pytest.raises(NotANetwork):
        to_nodes(quantize_(make("vit_like")))


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Flatten(), nn.Linear(3 * 32 * 32, 9), nn.ReLU(), nn.Linear(9, 5)],
        [nn.MaxPool2d(2), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 14 * 14, 5)],
        [Joint("a sum", channels=3), nn.Flatten(), nn.Linear(3 * 32 * 32, 5)],
    ],
    ids=["a linear layer", "a pool", "a sum"],
)
def test_what_reads_the_image_and_is_no_convolution_keeps_the_normalisation(layers):
    model, batch = nn.Sequential(Normalize(), *layers).eval(), images(8)
    assert_packed_layer_by_layer(model, batch)


@pytest.mark.parametrize(
    "mean, std",
    [((300, 123, 114), (63, 63, 63)), ((125, -1, 114), (63, 63, 63)), ((125, 123, 114), (63, 62, 67))],
)
def test_a_normalisation_that_does_not_fold_is_told(mean, std):
    model = make("alexnet_like")
    model[0] = Normalize(mean, std)
    with pytest.raises(NotANetwork, match="whole pixels with one standard deviation"):
        to_nodes(calibrate_(quantize_(model), images(8)))


class BehindAPool(nn.Module):
    """No linear layer reads a global pool, or adds to it; or a linear layer adds an image of one pixel."""

    def __init__(self, behind):
        super().__init__()
        self.norm, self.conv, self.relu, self.pool = Normalize(), nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        self.one, self.two, self.relu2 = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.ReLU()
        self.last, self.flat, self.fc, self.behind = nn.MaxPool2d(1), nn.Flatten(), nn.Linear(8, 5), behind
        self.whole, self.relu3, self.inner = nn.Conv2d(8, 8, 30), nn.ReLU(), nn.Linear(8, 8)

    def forward(self, images):
        return self.fc(self.flat(self.behind(self, self.relu(self.conv(self.norm(images))))))


@pytest.mark.parametrize(
    "behind",
    [
        lambda m, x: m.relu2(m.one(m.pool(x))),
        lambda m, x: m.last(m.pool(x)),
        lambda m, x: m.relu2(m.one(y := m.pool(x)) + m.two(y)),
        lambda m, x: m.relu2(m.one(y := m.pool(x)) + y),
        lambda m, x: m.relu2(m.inner(y := m.flat(m.relu3(m.whole(x)))) + y),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_what_reads_a_pool_and_is_no_linear_layer(behind, backend):
    torch.manual_seed(0)
    model, batch = BehindAPool(behind).eval(), images(8)
    expected = calibrate_(quantize_(model), batch)(batch)
    packed = pack_(model)
    for module in packed.modules():
        module.backend = backend
    torch.testing.assert_close(packed(batch), expected, rtol=0, atol=1e-4)
