"""Model files: round trips, a second reader written from the specification, damage, forgery, full disks, kills."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from safetensors import safe_open
from torch import nn

from benchmarks.fuzz_files import fuzz, small_models
from models import build
from pruning_utils import l2_filters, prune_
from quantization_utils import calibrate_, file_format, int8_absmax, pack_, quantize_, storage
from quantization_utils.inspection import inspect_file
from quantization_utils.kernels import build as kernel_build
from quantization_utils.network import PackedNetwork
from quantization_utils.storage import (
    ModelFileError,
    Stored,
    _set_backend,
    check_values,
    decode_record,
    is_float16,
    load_model,
    save_model,
)
from quantization_utils.storage_checks import Record
from tests.golden.make_version_1 import images

GOLDEN = Path(__file__).parents[1] / "golden"
FAMILIES = ("alexnet", "resnet_18", "vit")
METADATA = {"classes": [str(i) for i in range(10)], "test_accuracy_pct": 90.5, "provenance": {"epochs": 3, "π": "ü"}}


@pytest.fixture(scope="module")
def small():
    return small_models()


@pytest.fixture
def good(small, tmp_path):
    """A good file, to be spoilt."""
    path = tmp_path / "model.safetensors"
    save_model(small["vit"], path, METADATA)
    return path


def variants():
    def vit(**how):
        return lambda: pack_(quantize_(build("vit", 10, width=64, depth=2, patch_size=16), **how))

    def resnet(calibrated, **how):
        def make():
            model = quantize_(build("resnet_18", 10, stem="maxpool").eval(), **how)
            return pack_(calibrate_(model, images()) if calibrated else model)

        return make

    def thinned(name, **options):
        def make():
            model = prune_(build(name, 10, **options).eval(), l2_filters, 0.5, only=nn.Conv2d)
            return pack_(calibrate_(quantize_(model), images()))

        return make

    def two_kinds():
        model = build("vit", 10, width=64, depth=1, patch_size=16)
        return pack_(quantize_(quantize_(model, int8_absmax, only="*classifier"), act_bits=None))

    return {
        "vit float": lambda: build("vit", 10, width=64, depth=1, patch_size=16).eval(), "vit": vit(),
        "vit weight only": vit(act_bits=None), "vit partly": vit(keep=["*classifier"]),
        "vit with 8-bit head": two_kinds,
        "resnet float": lambda: build("resnet_18", 10, stem="maxpool").eval(), "resnet": resnet(True),
        "resnet linear": resnet(False, only=nn.Linear, act_bits=None),
        "resnet half calibrated": resnet(True, keep=["conv1"]),
        "resnet without half its filters": thinned("resnet_18", stem="maxpool"),
        "vit without half its patch filters": thinned("vit", width=64, depth=1, patch_size=16),
    }  # fmt: skip


@pytest.mark.parametrize("name", variants())
def test_reloaded_equals_packed_and_saves_to_the_same_bytes(name, tmp_path):
    torch.manual_seed(0)
    model = variants()[name]()
    size = save_model(model, tmp_path / "one", METADATA)
    assert size == (tmp_path / "one").stat().st_size
    loaded, metadata = load_model(tmp_path / "one", backend="reference")
    _set_backend(model, "reference")
    with torch.no_grad():
        assert torch.equal(loaded(images()), model(images()))
    assert {k: metadata[k] for k in METADATA} == METADATA and metadata["format_version"] == 1
    assert model.constructor and metadata["constructor"] == json.loads(json.dumps(model.constructor))
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    save_model(loaded, tmp_path / "two", metadata)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_golden_files_of_version_1_load_for_ever(family):
    model, metadata = load_model(GOLDEN / f"version_1_{family}.safetensors", backend="reference")
    assert metadata["classes"][3] == "class 3" and metadata["test_accuracy_pct"] == 12.5
    logits = torch.tensor(json.loads((GOLDEN / f"version_1_{family}.json").read_text()))
    with torch.no_grad():
        # A chain network is exact; a ViT's float parts depend on the machine's matrix product.
        torch.testing.assert_close(model(images()), logits, rtol=0, atol=1e-2 if family == "vit" else 1e-5)


def read_by_the_specification(data: bytes):
    """A reader of `packing.py`'s docstring that shares no code with the project: codes by tensor name."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__")
    digest = metadata["file_sha256"]
    assert hashlib.sha256(data.replace(digest.encode(), b"0" * 64)).hexdigest() == digest
    found = {}
    for name, entry in json.loads(metadata["tensors"]).items():
        begin, end = (8 + length + offset for offset in header[name]["data_offsets"])
        stored = data[begin:end]
        assert hashlib.sha256(stored).hexdigest() == entry["sha256"]
        if "encoding" not in entry:
            continue
        base, _, squeezed = entry["encoding"].partition("+")
        if base == "gaps":
            m, s = struct.unpack("<II", stored[:8])
            gaps, values, codes = stored[8 : 8 + s], stored[8 + s :], []
            gaps = zstandard.decompress(gaps) if squeezed else gaps
            assert len(gaps) == m and entry["bits"] == "ternary"
            nonzero = 0
            for gap in gaps:
                codes += [0] * gap
                if gap < 255:
                    sign = values[nonzero // 8] >> nonzero % 8 & 1 if nonzero < 8 * len(values) else 0
                    codes.append(-1 if sign else 1)
                    nonzero += 1
            codes.pop()
        else:
            plain = zstandard.decompress(stored) if squeezed else stored
            digits = [byte // 3**i % 3 for byte in plain for i in range(5)]
            codes = [(0, 1, -1)[d] for d in digits] if base == "trits" else [b - 256 * (b > 127) for b in plain]
        shape = torch.Size(entry["shape"])
        found[name] = torch.tensor(codes[: shape.numel()], dtype=torch.int8).view(shape)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reader_from_the_specification_alone_agrees(family):
    path = GOLDEN / f"version_1_{family}.safetensors"
    found = read_by_the_specification(path.read_bytes())
    model, _ = load_model(path)
    if isinstance(model, PackedNetwork):
        expected = {f"nodes.{i}.codes": node.codes for i, node in enumerate(model.nodes) if node.codes is not None}
    else:
        expected = {k: v for k, v in model.state_dict().items() if k.endswith(".codes")}
    assert found.keys() == expected.keys() and len(found) >= 4
    assert all(torch.equal(found[k], expected[k]) for k in found)


def test_any_safetensors_reader_reads_it(good):
    with safe_open(good, "pt") as file:
        assert file.metadata()["format"] == "packed-vision-model"
        recorded = json.loads(file.metadata()["tensors"])
        assert set(file.keys()) == set(recorded)
        for name in file.keys():  # noqa: SIM118  it is no dict
            assert (
                hashlib.sha256(file.get_tensor(name).contiguous().numpy().tobytes()).hexdigest()
                == recorded[name]["sha256"]
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_mutated_files_are_refused(family, small, tmp_path):
    figures = fuzz(small[family], tmp_path, 250, seed=7)
    assert figures["failures"] == [] and figures["outcomes"]["refused"] > 150


def test_every_single_byte_counts(small, tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(small["alexnet"], path)
    data = path.read_bytes()
    for at in range(0, len(data), 29):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        with pytest.raises(ModelFileError):
            load_model(path)
    for length in range(0, len(data), 97):
        path.write_bytes(data[:length])
        with pytest.raises(ModelFileError):
            load_model(path)


def forge(path: Path, change) -> None:
    """Apply `change(metadata with its JSON parsed, header)` and make the hash of the file right again."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    metadata = header["__metadata__"]
    parsed = {k: json.loads(v) for k, v in metadata.items() if v[:1] in "[{n"}
    change(parsed, header)
    metadata.update({k: json.dumps(v) for k, v in parsed.items()} | {"file_sha256": "0" * 64})
    text = json.dumps(header, separators=(",", ":")).encode()
    data = struct.pack("<Q", len(text)) + text + data[8 + length :]
    path.write_bytes(data.replace(b'"' + b"0" * 64, b'"' + hashlib.sha256(data).hexdigest().encode(), 1))


def reshape(parsed, layer, shape) -> None:
    entry = parsed["tensors"][f"network.vit.layers.0.{layer}.codes"]
    entry["shape"] = shape(*entry["shape"])


FORGERIES = {
    "version": (lambda p, h: h["__metadata__"].update(format_version="2"), "version"),
    "format": (lambda p, h: h["__metadata__"].update(format="gguf"), "other safetensors"),
    "checkpoint": (lambda p, h: p["constructor"]["options"].update(checkpoint="gpt2"), "checkpoint"),
    "address": (
        lambda p, h: p["constructor"]["options"]["config"].update(attn_implementation="evil/kernel"),
        "address",
    ),
    "private option": (
        lambda p, h: p["constructor"]["options"]["config"].update(_attn_implementation="eager"),
        "odd option",
    ),
    "endless model": (lambda p, h: p["constructor"]["options"]["config"].update(num_hidden_layers=60_000), "more"),
    "endless list": (lambda p, h: p["constructor"]["options"]["config"].update(num_labels=2**31), "beyond"),
    "unknown model": (lambda p, h: p["constructor"].update(name="gpt"), "does not build"),
    "narrower model": (lambda p, h: p["constructor"]["options"]["config"].update(intermediate_size=32), "shape"),
    "neurons of one layer": (lambda p, h: reshape(p, "mlp.fc2", lambda n, k: [2 * n, k // 2]), "shape"),
    "inputs of neurons": (lambda p, h: reshape(p, "mlp.fc1", lambda n, k: [n // 2, 2 * k]), "shape"),
    "many codes": (lambda p, h: p["tensors"]["network.classifier.codes"].update(shape=[2**30, 2**30]), "claim"),
    "other shape": (lambda p, h: p["tensors"]["network.classifier.codes"].update(shape=[64, 10]), "shape"),
    "other mean": (lambda p, h: p["normalization"].update(mean=[0, 0, 0]), "normalisation"),
    "next to no deviation": (lambda p, h: p["constructor"]["options"].update(std=[1e-12] * 3), "divides by nothing"),
    "classes": (lambda p, h: p["metadata"].update(classes=["one"]), "classes"),
    "other type": (lambda p, h: h["network.classifier.scale"].update(dtype="I32"), "is int32, its model float32"),
    "whole model quantized": (lambda p, h: p["modules"]["quantized"].update({"": {"bits": 8}}), "no module ''"),
    "quantized twice": (
        lambda p, h: p["modules"]["quantized"].update({"network.vit": {"bits": 8}, "network.vit.layers": {"bits": 8}}),
        "no module 'network.vit' to quantize",
    ),
    "layer of no kind": (lambda p, h: p["modules"]["packed"].pop("network.classifier"), "classifier"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_files_with_right_hashes_are_refused_for_the_right_reason(name, good):
    change, reason = FORGERIES[name]
    forge(good, lambda p, h: None)
    load_model(good)  # the forging itself is sound
    forge(good, change)
    with pytest.raises(ModelFileError, match=reason) as caught:
        load_model(good)
    assert str(good) in str(caught.value) and "\n" not in str(caught.value)


def test_a_variance_below_zero_is_refused():
    check_values({}, {"2.running_var": torch.tensor([1.0, 0.0])})
    with pytest.raises(ModelFileError, match="variances '2.running_var' are not all positive or zero"):
        check_values({}, {"2.running_var": torch.tensor([1.0, -1.0])})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_scales_that_are_not_right(value, small, tmp_path, monkeypatch):
    model = copy.deepcopy(small["vit"])
    model.network.classifier.scale[3] = value
    path = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match="cannot be saved: .*classifier.scale"):
        save_model(model, path)
    assert list(tmp_path.iterdir()) == []
    with monkeypatch.context() as forger:
        forger.setattr(storage, "check_values", lambda *_: None)
        save_model(model, path)
    for read in (load_model, inspect_file):
        with pytest.raises(ModelFileError, match=f"{path}: .*classifier.scale"):
            read(path)


def test_truth_values_are_0_or_1():
    stored = Stored("BOOL", (2,), np.array([0, 2], np.uint8))
    with pytest.raises(ModelFileError, match="truth values that are none"):
        decode_record("mask", Record(stored, (2,), "bool"))


def test_a_backend_without_a_kernel_for_a_layer_is_refused(monkeypatch):
    monkeypatch.setattr("quantization_utils.kernels.available_backends", lambda: ("cpu",))
    with pytest.raises(ValueError, match="backend 'cpu' has no kernel for a convolution"):
        _set_backend(pack_(quantize_(nn.Sequential(nn.Conv2d(3, 2, 3)))), "cpu")


def test_what_cannot_be_saved(tmp_path, small):
    with pytest.raises(ValueError, match="pack_"):
        save_model(quantize_(build("vit", 10, width=64, depth=1)), tmp_path / "x")
    with pytest.raises(ValueError, match="layer '0' is still trainable: call pack_"):
        save_model(quantize_(nn.Sequential(nn.Linear(2, 2))), tmp_path / "x")
    with pytest.raises(ValueError, match="models.build"):
        save_model(nn.Linear(2, 2), tmp_path / "x")
    with pytest.raises(ValueError, match="JSON"):
        save_model(small["vit"], tmp_path / "x", {"accuracy": float("nan")})
    with pytest.raises(ValueError, match="classes"):
        save_model(small["vit"], tmp_path / "x", {"classes": ["cat"]})
    with pytest.raises(FileNotFoundError, match="folder"):
        save_model(small["vit"], tmp_path / "missing" / "x")
    os.mkfifo(pipe := tmp_path / "pipe")
    with pytest.raises(OSError, match="no regular file"):  # nor is /dev/null
        save_model(small["vit"], pipe)
    assert list(tmp_path.iterdir()) == [pipe] and pipe.is_fifo()


@pytest.mark.parametrize("family", ["resnet_18", "vit"])
def test_pytorchs_default_type_does_not_matter(family, small, tmp_path):
    save_model(small[family], tmp_path / "x")
    pictures = images()
    expected = load_model(tmp_path / "x")[0](pictures)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(load_model(tmp_path / "x")[0](pictures), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("names", [[], ["cat"]])
def test_a_network_of_no_constructor_has_a_name_for_every_logit(names, tmp_path, small):
    network = copy.deepcopy(small["resnet_18"])
    network.constructor = None
    with pytest.raises(ValueError, match=f"10 logits for {len(names)} classes"):
        save_model(network, tmp_path / "x", {"classes": names})
    save_model(network, tmp_path / "x", METADATA)
    assert load_model(tmp_path / "x")[1]["classes"] == METADATA["classes"]


def test_what_is_no_file(tmp_path, good):
    with pytest.raises(FileNotFoundError, match="no such"):
        load_model(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="no such"):
        load_model(good / "within")
    with pytest.raises(ModelFileError, match="folder"):
        load_model(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelFileError, match="not a regular file"):  # without waiting for somebody who writes
        load_model(tmp_path / "pipe")
    with pytest.raises(ValueError, match="backend"):
        load_model(good, backend="abacus")
    for device in ("nonsense", "cuda:99"):
        with pytest.raises(ValueError, match=f"there is no device '{device}' here: choose cpu"):
            load_model(good, device)


def test_kernels_that_were_asked_for_and_cannot_be_built_say_why(good, monkeypatch):
    def load():
        raise kernel_build.BuildError("no compiler was found")

    monkeypatch.setattr(kernel_build, "load", load)
    with pytest.raises(ValueError, match="'cpu' cannot run here: no compiler was found"):
        load_model(good, backend="cpu")


def test_calibration_images_halve_the_scales_and_keep_the_classes(small, tmp_path):
    pictures = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    small = copy.deepcopy(small)
    small["vit"].network.classifier.bias[0] += 1  # what is untrained cannot decide between classes, and rounding would
    for name, model in small.items():
        plain = save_model(model, tmp_path / "plain")
        with torch.no_grad():
            before = model(pictures)
            small_size = save_model(model, tmp_path / "small", calibration_images=pictures)
            loaded, metadata = load_model(tmp_path / "small")
            assert torch.equal(loaded(pictures).argmax(1), before.argmax(1)) and torch.equal(model(pictures), before)
        # The others have fewer than 32 scales a layer.
        assert small_size < plain if name == "vit" else small_size <= plain
        save_model(loaded, tmp_path / "again", metadata)
        assert (tmp_path / "again").read_bytes() == (tmp_path / "small").read_bytes()


@pytest.mark.parametrize("fails", ["fsync", "_sync_folder"])
def test_an_error_says_which_file_is_there_now(fails, small, tmp_path, monkeypatch):
    path = tmp_path / "model"
    path.write_bytes(b"before")

    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(file_format if fails == "_sync_folder" else os, fails, full)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)) as caught:
        save_model(small["alexnet"], path)
    unchanged = path.read_bytes() == b"before"
    assert unchanged == (fails == "fsync") == ("what was there before is unchanged" in str(caught.value))
    assert list(tmp_path.iterdir()) == [path]
    if not unchanged:
        load_model(path)


def test_every_value_is_looked_at_before_16_bits_are_enough():
    tensor = torch.ones(100)
    assert is_float16(tensor)
    tensor[99] += 2.0**-13
    assert not is_float16(tensor)


def test_convolutions_without_integers_take_any_backend():
    model = pack_(quantize_(nn.Sequential(nn.Conv2d(3, 2, 3)), act_bits=None))
    _set_backend(model, "cpu")
    assert model[0].has_kernel and model[0].backend == "cpu"
