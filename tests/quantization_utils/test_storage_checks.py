"""What a file says of its model, one step from what is right."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from quantization_utils.file_format import ModelFileError, Stored
from quantization_utils.packing import Bits
from quantization_utils.rebuilding import rebuild
from quantization_utils.storage import _describe_modules, _to_records, check_description
from quantization_utils.storage_checks import (
    NODE_DTYPES,
    Record,
    bounded_construction,
    check_constructor,
    check_network,
    check_normalization,
    check_record,
)
from tests.networks import packed_vit

Change = Callable[[Any, Any], object]  # of what a file says, and of its tensors


def layer(index: int, codes: tuple[int, ...], bits: Bits = "ternary") -> dict[str, Record]:
    """The tensors of a node."""
    shapes = {"codes": (codes, bits), "gain": (codes[:1], None), "bias": (codes[:1], None)}
    return {
        f"nodes.{index}.{name}": Record(Stored("", (), b""), shape, NODE_DTYPES[name], of_codes)
        for name, (shape, of_codes) in shapes.items()
    }


def node(index: int, **members: object) -> Change:
    return lambda n, r: n["nodes"][index].update(members)


def pool(**members: object) -> Change:
    """A max-pool of 2×2 between the two nodes."""

    def change(network: Any, records: dict[str, Record]) -> None:
        network["nodes"].insert(1, {"op": "max_pool", "input": 0, "kernel": [2, 2], "stride": [2, 2]} | members)
        network["nodes"][2]["input"] = 1
        records.clear()
        records.update(layer(0, (4, 3, 3, 3)) | layer(2, (5, 4 * 4 * 4)))

    return change


def average_of_a_linear_layer(network: Any, records: dict[str, Record]) -> None:
    linear, average = ({"op": op, "input": i, "out_max": 255} for i, op in enumerate(("linear", "avg_pool")))
    network["nodes"][1:] = [linear | {"relu": True}, average, {"op": "linear", "input": 2}]
    records.update(layer(3, (5, 5)) | {"nodes.2.gain": Record(Stored("", (), b""), (1,), "float32")})


def a_convolution_alone(network: Any, records: dict[str, Record]) -> None:
    del network["nodes"][1], records["nodes.1.codes"], records["nodes.1.gain"], records["nodes.1.bias"]
    network["nodes"][0].update(out_max=None)
    records.update(layer(0, (5, 3, 3, 3)))


def a_kernel_of_eleven(network: Any, records: dict[str, Record]) -> None:
    network["nodes"][0].update(kernel=[11, 3])
    records.update(layer(0, (4, 3, 11, 3)))


def padding_values_inside(network: Any, records: dict[str, Record]) -> None:
    network["nodes"].insert(1, {"op": "conv", "input": 0, "relu": True, "out_max": 255})
    network["nodes"][2]["input"] = 1
    pads = {"nodes.1.pad_values": Record(Stored("", (), b""), (4,), "uint8")}
    records.update(layer(1, (4, 4, 1, 1)) | layer(2, (5, 4 * 8 * 8)) | pads)


def a_convolution_of_a_linear_layer(network: Any, records: dict[str, Record]) -> None:
    network["nodes"][1].update(out_max=255)
    network["nodes"].append({"op": "conv", "input": 1})
    records.update(layer(2, (5, 5, 1, 1)))


CHANGES = {
    "a list for a node": (lambda n, r: n["nodes"].insert(0, ["op", "input"]), "node 0 is none"),
    "no input": (lambda n, r: n["nodes"][1].pop("input"), "node 1 is none"),
    "reads itself": (node(0, input=0), "reads a node that does not come before"),
    "adds the image": (node(0, residual=-1), "adds a node that does not come before"),
    "no stride": (node(0, stride=[0, 1]), "a stride that is none"),
    "a stride beyond all images": (node(0, stride=[1, 5000]), "a stride that is none"),
    "a kernel of three": (node(0, kernel=[3, 3, 3]), "a kernel that is none"),
    "a kernel larger than the image": (a_kernel_of_eleven, "a kernel larger than its input"),
    "no residual gain": (node(0, residual_gain=1e39), "residual gain that is not finite"),
    "a residual gain that is true": (node(0, residual_gain=True), "residual gain that is not finite"),
    "a ReLU that is a number": (node(0, relu=1), "a relu that is none"),
    "no power of two of codes": (node(0, out_max=100), "no such out_max"),
    "one bit": (node(0, out_max=1), "no such out_max"),
    "nine bits": (node(0, out_max=511), "no such out_max"),
    "four bits": (node(0, weight_bits=4), "no such bits"),
    "bits that are a float": (node(0, weight_bits=8.0), "no such bits"),
    "another member": (node(0, dilation=[2, 2]), "of an unknown kind"),
    "another operation": (node(0, op="relu"), "of an unknown kind"),
    "a pool of padding": (pool(kernel=[3, 3], padding=[2, 2]), "pads more than half"),
    "a pool with a ReLU": (pool(relu=True), "does more"),
    "a pool that rescales": (pool(out_max=255), "does more"),
    "a pool that adds": (pool(residual=0, kernel=[1, 1], stride=[1, 1]), "adds node 0"),
    "an average of a linear layer": (average_of_a_linear_layer, "tensors and input of a pool"),
    "no bias": (lambda n, r: r.pop("nodes.1.bias"), "tensors missing, left over or misshaped"),
    "gains of some channels": (
        lambda n, r: vars(r["nodes.0.gain"]).update(shape=(3,)), "tensors missing, left over or misshaped",
    ),
    "no outputs": (lambda n, r: r.update(layer(0, (4, 0, 3, 3))), "no codes of 4 dimensions"),
    "codes of a linear layer like a convolution's": (
        lambda n, r: r.update(layer(1, (5, 256, 1, 1))), "no codes of 2 dimensions",
    ),
    "padding values inside": (padding_values_inside, "node 1 has tensors missing, left over or misshaped"),
    "a convolution of a linear layer": (a_convolution_of_a_linear_layer, "takes 5 channels and gets shape"),
    "other channels": (lambda n, r: r.update(layer(0, (4, 2, 3, 3))), "takes 2 channels"),
    "other inputs": (lambda n, r: r.update(layer(1, (5, 100))), "takes 100 inputs and gets 256"),
    "a layer left over": (lambda n, r: r.update(layer(2, (5, 5))), "no place for tensor 'nodes.2.bias'"),
    "a linear layer of the image": (node(1, input=-1), "reads the image and is no convolution"),
    "codes at the end": (node(1, out_max=255), "does not end in logits"),
    "planes at the end": (a_convolution_alone, "does not end in logits"),
    "nothing": (lambda n, r: (n.update(nodes=[]), r.clear()), "no nodes"),
    "too much": (lambda n, r: n["nodes"].extend(n["nodes"][1:] * 999), "more than 1000"),
    "an image that is too wide": (lambda n, r: n.update(image=[3, 8, 5000]), "no image shape"),
    "an image of four dimensions": (lambda n, r: n.update(image=[3, 8, 8, 8]), "no image shape"),
    "no image": (lambda n, r: n.update(image=[3, 0, 8]), "no image shape"),
    "gains of another type": (lambda n, r: vars(r["nodes.0.gain"]).update(dtype="float64"), "is float64"),
    "a float output that is read": (lambda n, r: n["nodes"][0].update(out_max=None), "puts out no codes"),
    "codes of other bits": (lambda n, r: r.update(layer(0, (4, 3, 3, 3), 8)), "codes of other bits"),
    "sums beyond int32": (
        lambda n, r: (n.update(image=[3, 3300, 3300]), r.update(layer(1, (5, 4 * 3300**2)))),
        "more than an int32 holds",
    ),
    "more logits than classes": (lambda n, r: r.update(layer(1, (6, 256))), "6 logits for 5 classes"),
    "a sum of two shapes": (lambda n, r: n["nodes"][1].update(residual=0), "adds node 0, .* another shape"),
    "padding as wide as the kernel": (lambda n, r: n["nodes"][0].update(padding=[3, 3]), "padding than kernel"),
    "a linear layer with padding": (lambda n, r: n["nodes"][1].update(kernel=[9, 1], padding=[8, 0]), "whole input"),
    "another kernel": (lambda n, r: n["nodes"][0].update(kernel=[1, 1], padding=[0, 0]), "not its codes'"),
}


@pytest.mark.parametrize("change, sentence", CHANGES.values(), ids=CHANGES)
def test_a_network_that_is_none_is_refused(change, sentence):
    first = {"op": "conv", "input": -1, "kernel": [3, 3], "padding": [1, 1], "relu": True, "out_max": 255}
    network = {"image": [3, 8, 8], "nodes": [first, {"op": "linear", "input": 0}]}
    records = layer(0, (4, 3, 3, 3)) | layer(1, (5, 4 * 8 * 8))
    assert len(check_network(network, records, classes=5)) == 2
    change(network, records)
    with pytest.raises(ModelFileError, match=sentence):
        check_network(network, records, classes=5)


def test_a_pool_is_no_mistake():
    first = {"op": "conv", "input": -1, "kernel": [3, 3], "padding": [1, 1], "relu": True, "out_max": 255}
    network, records = {"image": [3, 8, 8], "nodes": [first, {"op": "linear", "input": 0}]}, {}
    pool()(network, records)
    assert len(check_network(network, records, classes=5)) == 3


CODES = {"sha256": "", "encoding": "bytes", "bits": 8, "shape": [2, 2]}


@pytest.mark.parametrize(
    "dtype, shape, entry, sentence",
    [
        ("U8", (4,), CODES | {"bits": 8.0}, "unknown encoding"),
        ("I8", (4,), CODES, "not stored as bytes"),
        ("U8", (2, 2), CODES, "not stored as bytes"),
        ("U8", (4,), CODES | {"more": 1}, "not described as codes are"),
        ("U8", (4,), CODES | {"shape": [2, -2]}, "a shape that is none"),
        ("F64", (4,), {"sha256": "", "dtype": "float32"}, "cannot be read as 'float32'"),
        ("F32", (4,), {"sha256": "", "more": 1}, "cannot be read as 'float32'"),
    ],
)
def test_tensors_that_are_stored_otherwise_than_said_are_refused(dtype, shape, entry, sentence):
    assert check_record("x", Stored("U8", (4,), bytes(4)), CODES).shape == (2, 2)
    assert check_record("x", Stored("F16", (4,), bytes(8)), {"sha256": "", "dtype": "float32"}).dtype == "float32"
    with pytest.raises(ModelFileError, match=sentence):
        check_record("x", Stored(dtype, shape, bytes(32)), entry)


OWN = {"kind": "network", "constructor": "null", "normalization": "null", "metadata": "{}", "network": "{}",
       "tensors": "{}"}  # fmt: skip
MODULES = {k: v for k, v in OWN.items() if k != "network"} | {"kind": "modules", "modules": "{}"}


@pytest.mark.parametrize(
    "own, sentence",
    [
        (OWN | {"more": "1"}, "members missing or left over"),
        ({k: v for k, v in OWN.items() if k != "metadata"}, "members missing or left over"),
        (OWN | {"kind": "modules", "modules": "{}"}, "left over"),
        ({k: v for k, v in OWN.items() if k != "kind"}, "names no kind"),
        (MODULES, "it has no constructor"),
        (OWN | {"metadata": "[]"}, "no JSON object"),
        (OWN | {"metadata": '{"classes":[1,2]}'}, "not as many names"),
        (OWN | {"normalization": '{"mean":[0],"std":[1]}'}, "names another"),
    ],
)
def test_a_description_that_is_none_is_refused(own, sentence):
    with pytest.raises(ModelFileError, match=sentence):
        check_description(own, {})


@pytest.mark.parametrize(
    "change",
    [{"num_classes": 1}, {"num_classes": True}, {"num_classes": 2**17}, {"name": 3}, {"more": 1},
     {"options": {"checkpoint": "plain"}}, {"options": {"config": {"name": "../x"}}},
     *({"options": {"config": {"sizes": value}}}
       for value in (["https://example.org/x"], [{"_private": 1}], -(2**17), [2**17]))],
)  # fmt: skip
def test_a_constructor_takes_plain_small_values_alone(change):
    constructor = {"name": "vit", "num_classes": 10, "options": {"config": {"sizes": [1, -2, "gelu"], "name": "x"}}}
    check_constructor(constructor)
    with pytest.raises(ModelFileError, match="its constructor"):
        check_constructor(constructor | change)


def test_what_a_constructor_makes_is_bounded_in_its_own_thread():
    made: list[nn.Module] = []
    with bounded_construction(2):
        other = threading.Thread(target=lambda: made.append(nn.Sequential(*(nn.Linear(1, 1) for _ in range(300)))))
        other.start()
        other.join()
        nn.Linear(1, 1)
        with pytest.raises(ModelFileError, match="more parameters than"):
            nn.Linear(1, 1)
    assert made
    with bounded_construction(1), pytest.raises(ModelFileError, match="more modules than"):
        nn.Sequential(*(nn.ReLU() for _ in range(16 + 257)))
    nn.Sequential(*(nn.Linear(1, 1) for _ in range(300)))  # afterwards it is not


def hidden(of: int) -> Change:
    """So many neurons in the first MLP."""
    shapes = {"fc1.codes": (of, 64), "fc1.scale": (of,), "fc1.bias": (of,), "fc2.codes": (64, of)}
    return lambda m, r: [vars(r[f"network.vit.layers.0.mlp.{name}"]).update(shape=s) for name, s in shapes.items()]


def in_fc1(**members: object) -> Change:
    return lambda m, r: m["packed"]["network.vit.layers.0.mlp.fc1"].update(members)


REBUILDS: dict[str, tuple[Change, str]] = {
    "nine bits": (in_fc1(act_bits=9), "has no such bits"),
    "one bit": (in_fc1(act_bits=1), "has no such bits"),
    "another member": (in_fc1(more=9), "has no such bits"),
    "nine bits of a module": (
        lambda m, r: m["quantized"].update({"network.vit.layernorm": {"bits": 9}}), "no such bits",
    ),
    "another member of a module": (
        lambda m, r: m["quantized"].update({"network.vit.layernorm": {"bits": 8, "more": 9}}), "no such bits",
    ),
    "a list of nothing": (lambda m, r: m.pop("quantized"), "its list of packed layers is none"),
    "names alone": (lambda m, r: m.update(packed=[*m["packed"]]), "its list of packed layers is none"),
    "a module that is no layer": (
        lambda m, r: (m["packed"].update({"": {"act_bits": 8}}), r.update({".codes": r["network.classifier.codes"]})),
        "no layer '' to pack",
    ),
    "codes of no dimension": (
        lambda m, r: vars(r["network.vit.layers.0.mlp.fc1.codes"]).update(shape=()), "wrong shape",
    ),
    "quantized and packed": (
        lambda m, r: m["quantized"].update({"network.classifier": {"bits": 8}}), "no module .* to quantize",
    ),
    "codes without bits": (lambda m, r: vars(r["network.classifier.codes"]).update(bits=None), "no layer .* to pack"),
    "bits without codes": (lambda m, r: vars(r["network.classifier.bias"]).update(bits=8), "stored in the wrong way"),
    "a tensor left over": (lambda m, r: r.update(more=r["network.classifier.bias"]), "no place for tensor 'more'"),
    "a tensor missing": (lambda m, r: r.pop("network.classifier.bias"), "tensor 'network.classifier.bias' is missing"),
    "no neurons": (hidden(0), "wrong shape"),
    "neurons that no pruning adds": (hidden(300), "wrong shape"),
}


@pytest.mark.parametrize("change, sentence", REBUILDS.values(), ids=REBUILDS)
def test_modules_are_rebuilt_of_what_fits_alone(change, sentence):
    tensors, own = _describe_modules(packed_vit(width=64, depth=1))
    constructor, modules, records = own["constructor"], json.loads(json.dumps(own["modules"])), _to_records(tensors)
    rebuild(constructor, modules, records)
    change(modules, records)
    with pytest.raises(ModelFileError, match=sentence):
        rebuild(constructor, modules, records)


@pytest.mark.parametrize("mean", [[1.0, 2.0], [1.0] * 4, [1e10], [True], []])
def test_a_normalisation_that_is_none_is_refused(mean):
    with pytest.raises(ModelFileError, match="its normalisation is none"):
        check_normalization(mean, [1.0])


def test_a_normalisation_that_divides_by_next_to_nothing_is_refused():
    check_normalization([0.0], [1e-6])
    with pytest.raises(ModelFileError, match="divides by nothing"):
        check_normalization([0.0], [1e-12])
