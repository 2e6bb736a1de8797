from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models import build
from pruning_utils import l2_filters, prune_
from quantization_utils import absmean_fitted, calibrate_, pack_, quantize_
from quantization_utils.dead_channels import remove_dead_channels
from quantization_utils.kernels.reference import NetworkExecutor
from quantization_utils.network import to_nodes
from quantization_utils.nodes import Node
from tests.nodes import conv


class Maker:
    """Builds random node lists in which many filters are pruned and many columns are unread."""

    def __init__(self, seed: int, dead: float) -> None:
        self.random, self.dead = torch.Generator().manual_seed(seed), dead
        self.nodes: list[Node] = []

    def chance(self, probability: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.random) < probability

    def layer(self, op: str, n: int, c: int, spatial: int = 1, **options) -> int:
        shape = (n, c, 3, 3) if op == "conv" else (n, c, spatial)
        codes = torch.randint(-1, 2, shape, generator=self.random, dtype=torch.int8)
        rows, columns = self.chance(self.dead, n), self.chance(self.dead / 2, c)
        if options.pop("keep_rows", False):
            rows[:] = False
        codes[rows] = 0
        codes[:, columns] = 0
        bias = torch.randn(n, generator=self.random) * 20
        # A dead row puts out its bias: nothing for most, a negative number or a positive one for some.
        bias[rows & self.chance(0.7, n)] = 0.0
        gain = torch.rand(n, generator=self.random) / c
        if op == "conv":
            options = {"kernel": (3, 3), "padding": (1, 1)} | options
        self.nodes.append(Node(op, codes=codes if op == "conv" else codes.flatten(1), gain=gain, bias=bias, **options))
        return len(self.nodes) - 1

    def pool(self, op: str, source: int, out_max: int | None) -> int:
        if op == "max_pool":
            self.nodes.append(Node(op, source, kernel=(2, 2), stride=(2, 2)))
        else:
            self.nodes.append(Node(op, source, gain=torch.tensor([0.1]), out_max=out_max))
        return len(self.nodes) - 1

    def network(self, width: int, blocks: list[str], head: str) -> list[Node]:
        u8 = {"relu": True, "out_max": 63}
        at = self.layer("conv", width, 3, input=-1, pad_values=torch.tensor([125, 123, 114], dtype=torch.uint8), **u8)
        channels, side = width, 8
        for block in blocks:
            if block == "plain":
                at, channels = self.layer("conv", width + 3, channels, input=at, **u8), width + 3
            elif block == "pool" and side > 2:
                at, side = self.pool("max_pool", at, None), side // 2
            elif block in ("identity", "projection"):
                inner = self.layer("conv", width, channels, input=at, **u8)
                shortcut = at
                if block == "projection":
                    shortcut = self.layer("conv", width + 1, channels, input=at)
                    channels = width + 1
                at = self.layer("conv", channels, width, input=inner, residual=shortcut, residual_gain=0.7, **u8)
        if head == "avg_pool":
            at, side = self.pool("avg_pool", at, 63), 1
        at = self.layer("linear", 9, channels, side * side, input=at, **u8)
        self.layer("linear", 4, 9, input=at, keep_rows=True)
        return self.nodes


def run(nodes: list[Node], images: Tensor) -> Tensor:
    return NetworkExecutor(nodes)(images)


def weights(nodes: list[Node]) -> int:
    return sum(n.codes.numel() for n in nodes if n.codes is not None)


BLOCKS = st.lists(st.sampled_from(["plain", "pool", "identity", "projection"]), max_size=5)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 10**6), st.sampled_from([0.0, 0.3, 0.7, 0.95]), st.integers(1, 7), BLOCKS,
    st.sampled_from(["avg_pool", "flatten"]),
)  # fmt: skip
def test_logits_stay_bit_for_bit(seed, dead, width, blocks, head):
    nodes = Maker(seed, dead).network(width, blocks, head)
    before = [{f.name: getattr(n, f.name) for f in fields(n)} for n in nodes]
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    slim = remove_dead_channels(nodes)
    assert torch.equal(run(slim, images), run(nodes, images))
    assert weights(slim) <= weights(nodes)
    assert all(all(getattr(n, k) is v for k, v in old.items()) for n, old in zip(nodes, before, strict=True))
    again = remove_dead_channels(slim)
    assert weights(again) == weights(slim)


def two_layers(**first) -> list[Node]:
    """Conv 3 → 4, linear 4·(2·2) → 2; filter 1 of the convolution is pruned."""
    codes = torch.ones(4, 3, 1, 1, dtype=torch.int8)
    codes[1] = 0
    conv = Node("conv", -1, codes=codes, gain=torch.ones(4) / 9, bias=torch.tensor([1.0, 0.0, 2.0, 3.0]), relu=True,
                out_max=255)  # fmt: skip
    linear = Node("linear", 0, codes=torch.arange(32).reshape(2, 16).remainder(2).to(torch.int8) * 2 - 1,
                  gain=torch.ones(2), bias=torch.zeros(2))  # fmt: skip
    return [replace(conv, **first), linear]


def test_a_pruned_filter_goes_with_the_columns_that_read_it():
    nodes = two_layers()
    conv, linear = remove_dead_channels(nodes)
    kept = torch.tensor([0, 2, 3])
    assert torch.equal(conv.codes, nodes[0].codes[kept])
    assert torch.equal(conv.gain, nodes[0].gain[kept]) and torch.equal(conv.bias, nodes[0].bias[kept])
    assert torch.equal(linear.codes, nodes[1].codes.view(2, 4, 4)[:, kept].flatten(1))


def test_tensors_that_lose_nothing_are_shared():
    conv, linear = two_layers()
    linear = replace(linear, relu=True, out_max=255)
    last = Node("linear", 1, codes=torch.ones(2, 2, dtype=torch.int8), gain=torch.ones(2), bias=torch.zeros(2))
    slim = remove_dead_channels([conv, linear, last])
    assert slim[1].codes is not linear.codes and slim[1].gain is linear.gain and slim[1].bias is linear.bias
    assert slim[2] is last


@pytest.mark.parametrize(
    "bias, gone", [(0.0, True), (-3.0, True), (0.4, True), (0.5, True), (0.6, False), (5.0, False)]
)
def test_a_channel_that_puts_out_a_constant_other_than_zero_stays(bias, gone):
    nodes = two_layers(bias=torch.tensor([1.0, bias, 2.0, 3.0]))
    assert (len(remove_dead_channels(nodes)[0].codes) == 3) is gone


@pytest.mark.parametrize(
    "relu, out_max, bias, gone",
    [(False, None, 0.0, True), (False, None, -3.0, False), (True, None, -3.0, True), (False, 255, -3.0, True)],
)
def test_a_negative_constant_goes_if_a_relu_or_the_output_codes_make_it_zero(relu, out_max, bias, gone):
    nodes = two_layers(bias=torch.tensor([1.0, bias, 2.0, 3.0]), relu=relu, out_max=out_max)
    assert (len(remove_dead_channels(nodes)[0].codes) == 3) is gone


def test_a_residual_that_another_channel_needs_blocks_removal():
    square = torch.ones(4, 4, 1, 1, dtype=torch.int8)
    first, last = two_layers()
    block = Node("conv", 0, residual=0, residual_gain=1.0, codes=square, gain=torch.ones(4) / 99, bias=torch.ones(4),
                 relu=True, out_max=255)  # fmt: skip
    nodes = [first, block, replace(last, input=1)]
    assert len(remove_dead_channels(nodes)[0].codes) == 4
    dead = square.clone()
    dead[1] = 0
    nodes[1] = replace(block, codes=dead, bias=torch.tensor([1.0, 0.0, 1.0, 1.0]))
    assert [len(n.codes) for n in remove_dead_channels(nodes)] == [3, 3, 2]


def test_logits_stay_that_are_added_to_what_other_nodes_put_out():
    nodes = two_layers()
    nodes[1].codes[1] = 0  # a dead logit
    last = Node("linear", 1, residual=1, residual_gain=1.0, codes=torch.tensor([[1, 0], [0, 0]], dtype=torch.int8),
                gain=torch.ones(2), bias=torch.zeros(2))  # fmt: skip
    nodes = [nodes[0], replace(nodes[1], relu=True, out_max=255), last]
    images = torch.rand(2, 3, 2, 2)
    assert torch.equal(run(remove_dead_channels(nodes), images), run(nodes, images))


def test_one_channel_stays_where_all_are_dead():
    nodes = two_layers(codes=torch.zeros(4, 3, 1, 1, dtype=torch.int8), bias=torch.zeros(4))
    slim = remove_dead_channels(nodes)
    assert len(slim[0].codes) == 1 and slim[1].codes.shape == (2, 4)
    assert torch.equal(run(slim, torch.rand(2, 3, 2, 2)), run(nodes, torch.rand(2, 3, 2, 2)))


def test_a_channel_nobody_reads_goes_and_takes_its_sources_along():
    nodes = two_layers()
    middle = Node("conv", 0, codes=torch.eye(4, dtype=torch.int8).view(4, 4, 1, 1), gain=torch.ones(4),
                  bias=torch.ones(4), relu=True, out_max=255)  # fmt: skip
    last = nodes[1].codes.clone().view(2, 4, 4)
    last[:, 3] = 0
    slim = remove_dead_channels([nodes[0], middle, replace(nodes[1], input=1, codes=last.flatten(1))])
    # Channel 1 of the first is zero; of the second, which adds a bias to it, it is not. Channel 3 is unread in both.
    assert [len(n.codes) for n in slim] == [2, 3, 2]


@pytest.mark.parametrize(
    "name, options, prune_first",
    [("resnet_18", {"stem": "maxpool"}, True), ("resnet_18", {"stem": "maxpool"}, False), ("alexnet", {}, True)],
)
def test_pruned_filters_of_a_model_are_gone_after_packing(name, options, prune_first):
    torch.manual_seed(0)
    model = build(name, 10, **options)
    model.train()(torch.rand(8, 3, 32, 32))  # running statistics that differ from channel to channel
    images = torch.rand(8, 3, 32, 32)
    if prune_first:
        prune_(model, l2_filters, 0.5)
    calibrate_(quantize_(model, absmean_fitted), images)
    if not prune_first:
        prune_(model, l2_filters, 0.5)
    nodes = to_nodes(model.eval())
    slim = pack_(model).nodes
    assert torch.equal(run(slim, images), run(nodes, images))
    if name == "alexnet":
        assert [len(n.codes) for n in slim if n.codes is not None] == [32, 96, 192, 128, 128, 2048, 2048, 10]
    else:
        inner = [len(n.codes) for n in slim if n.residual is None and n.relu and n.codes is not None][1:]
        assert inner == [32, 32, 64, 64, 128, 128, 256, 256]
    assert weights(slim) < 0.7 * weights(nodes)


@pytest.mark.parametrize("gain", [torch.inf, torch.nan])
def test_a_channel_whose_gain_is_no_number_is_not_zero(gain: float) -> None:
    codes = torch.zeros(4, 3, 3, 3, dtype=torch.int8).index_fill_(0, torch.tensor(1), 1)
    first = replace(conv(-1, 4, 3), codes=codes, gain=torch.tensor([gain, 1, 1, 1]), bias=torch.zeros(4))
    assert len(remove_dead_channels([first, conv(0, 2, 4, out_max=None)])[0].codes) == 2
