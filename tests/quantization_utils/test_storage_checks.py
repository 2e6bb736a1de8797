"""What a file says of a network, one step from what is right."""

from __future__ import annotations

import pytest

from quantization_utils.file_format import ModelFileError, Stored
from quantization_utils.packing import Bits
from quantization_utils.storage_checks import NODE_DTYPES, Record, check_network, check_normalization


def layer(index: int, codes: tuple[int, ...], bits: Bits = "ternary") -> dict[str, Record]:
    """The tensors of a node."""
    shapes = {"codes": (codes, bits), "gain": (codes[:1], None), "bias": (codes[:1], None)}
    return {
        f"nodes.{index}.{name}": Record(Stored("", (), b""), shape, NODE_DTYPES[name], of_codes)
        for name, (shape, of_codes) in shapes.items()
    }


CHANGES = {
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


def test_a_normalisation_that_divides_by_next_to_nothing_is_refused():
    check_normalization([0.0], [1e-6])
    with pytest.raises(ModelFileError, match="divides by nothing"):
        check_normalization([0.0], [1e-12])
