"""The script's figures are those of the files it looks at."""

from __future__ import annotations

import json
import math
import re
import zlib
from pathlib import Path

import pytest
import torch
from transformers import ViTConfig

import determine_space_saved
from models import build
from quantization_utils import pack_, quantize_
from quantization_utils.inspection import FileReport, Layer, gzip_float_bytes, inspect_file
from quantization_utils.storage import save_model
from train_test_utils import record

GOLDEN = Path(__file__).parent / "golden" / "version_1_vit.safetensors"
TINY = ("tiny", "vit", {"width": 64, "depth": 1, "patch_size": 16})


def test_report_of_a_file(tmp_path):
    torch.manual_seed(0)
    model = build("vit", 10, width=64, depth=1, patch_size=16)
    numbers = sum(p.numel() for p in model.parameters())
    path = tmp_path / "model"
    save_model(pack_(quantize_(model)), path)
    report = inspect_file(path)
    weights = sum(m.codes.numel() for m in model.modules() if hasattr(m, "codes"))
    scales = sum(len(m.scale) for m in model.modules() if hasattr(m, "scale"))
    assert report.file_bytes == path.stat().st_size and report.weights == weights
    assert report.float_bytes == 4 * (numbers + scales)
    zeros = sum(int((m.codes == 0).sum()) for m in model.modules() if hasattr(m, "codes"))
    assert report.zero_fraction == pytest.approx(zeros / weights)
    assert report.log2_3_bytes == pytest.approx(weights * math.log2(3) / 8 + report.other_bytes)
    assert report.other_bytes < report.ideal_bytes < report.log2_3_bytes < report.file_bytes
    assert all(other.bits * other.weights == other.ideal_bits == 8 * other.file_bytes for other in report.others)
    dense = [m.codes * m.scale.view(-1, *[1] * (m.codes.dim() - 1)) for m in model.modules() if hasattr(m, "codes")]
    others = [tensor for name, tensor in model.state_dict().items() if not name.endswith(".codes")]
    numbers = [tensor.detach().float().numpy().tobytes() for tensor in (*dense, *others)]
    assert gzip_float_bytes(path) == sum(len(zlib.compress(tensor, 6)) for tensor in numbers)


def test_layers_of_a_network_are_in_the_order_of_their_numbers(tmp_path):
    report = determine_space_saved.measure_model("resnet_18", {}, tmp_path)
    numbers = [int(layer.name.split(".")[1]) for layer in report.layers]
    assert report.kind == "network" and numbers == sorted(numbers) and numbers[-1] > 9


def test_8_bit_codes_are_reckoned_as_bytes():
    layers = [Layer("l", (5,), bits, "", 5, 5, 0, 0.0) for bits in (8, "ternary")]
    assert FileReport("", "modules", 0, layers, []).log2_3_bytes == pytest.approx(5 + 5 * math.log2(3) / 8)


def test_of_no_codes_none_are_zero():
    assert FileReport("", "modules", 0, [], []).zero_fraction == 0


def test_weights_of_a_network_are_multiplied_out_too():
    path = GOLDEN.with_name("version_1_alexnet.safetensors")
    assert 0 < gzip_float_bytes(path) < inspect_file(path).float_bytes


def test_models_and_files(capsys, monkeypatch):
    monkeypatch.setattr(determine_space_saved, "MODELS", [TINY])
    assert determine_space_saved.main([]) == 0
    out = capsys.readouterr().out
    assert "tiny" in out and "network.classifier" not in out
    assert determine_space_saved.main(["--layers"]) == 0
    assert "network.classifier" in capsys.readouterr().out
    assert determine_space_saved.main([str(GOLDEN)]) == 0
    out = capsys.readouterr().out
    assert "network.classifier" in out and "verified" in out and "gzip" in out
    assert f"{GOLDEN.stat().st_size:,} bytes" in out


def test_recorded_sizes_are_those_that_are_printed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.setattr(determine_space_saved, "MODELS", [TINY])
    assert determine_space_saved.main(["--record"]) == 0
    (line,) = (tmp_path / "results" / "files" / "sizes.jsonl").read_text().splitlines()
    told = json.loads(line)
    assert told["model"] == "tiny"
    assert told["saving"] == round(told["float_bytes"] / told["file_bytes"], 2) > 1
    assert told["file_over_ideal"] == round(told["file_bytes"] / told["ideal_bytes"], 4) > 1
    (printed,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("tiny")]
    assert printed.split()[-2:] == [f"{told['file_over_ideal']:.3f}", f"{told['saving']:.1f}×"]


def test_untrained_models_are_the_same_at_every_call(tmp_path):
    one, two = (determine_space_saved.measure_model(*TINY[1:], tmp_path) for _ in range(2))
    assert one == two


def test_printed_figures_by_hand(capsys, monkeypatch):
    layer = Layer("fc", (4, 2_500_000), "ternary", "zstd", 10_000_000, 2_000_000, 2_500_000, 8e6)
    bias = Layer("fc.bias", (50_000,), 16, "as it is", 50_000, 100_000, 0, 8e5)
    report = FileReport("m", "network", 2_600_000, [layer], [bias])
    monkeypatch.setattr(determine_space_saved, "MODELS", [TINY])
    monkeypatch.setattr(determine_space_saved, "measure_model", lambda *arguments: report)
    monkeypatch.setattr(determine_space_saved, "inspect_file", lambda path: report)
    monkeypatch.setattr(determine_space_saved, "gzip_float_bytes", lambda path: 9_000_000)
    assert determine_space_saved.main([]) == 0
    printed = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert printed[1] == "tiny 10,000,000 40.200 MB 2.600 MB 2.081 MB 1.100 MB 2.364 15.5×"
    assert determine_space_saved.main(["m"]) == 0
    assert [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()] == [
        "m: network, 2,600,000 bytes, SHA-256 of the file and of 2 tensors verified",
        "layer shape encoding bytes bits/weight entropy zeros",
        "fc 4×2500000 zstd 2,000,000 1.600 0.800 25.0%",
        "1 tensors stored as they are, 50,000 numbers 100,000",
        "10,000,000 packed weights, 25.0% zeros, 1.600 bits each; 500,000 bytes of header",
        "this file 2.600 MB 1.00×", "ideal: entropy of the codes 1.100 MB 0.42×",
        "ideal: log2(3) bits 2.081 MB 0.80×", "int8 10.200 MB 3.92×", "float16 20.100 MB 7.73×",
        "float32, the network as it is 40.200 MB 15.46×", "float32, gzip 9.000 MB 3.46×", "",
    ]  # fmt: skip


def test_a_file_beside_what_it_would_be_in_other_encodings(capsys):
    assert determine_space_saved.main([str(GOLDEN)]) == 0
    out, size, report = capsys.readouterr().out, GOLDEN.stat().st_size, inspect_file(GOLDEN)
    header = 8 + int.from_bytes(GOLDEN.read_bytes()[:8], "little")  # of the safetensors format
    assert f"; {header:,} bytes of header" in out
    expected = {"this file": size, "float16": report.bytes_at(2, 2), "float32.*is": report.float_bytes}
    for title, number in expected.items():
        (printed,) = re.findall(rf"^  {title} +([\d.]+) MB +([\d.]+)×$", out, re.MULTILINE)
        assert printed == (f"{number / 1e6:.3f}", f"{number / size:.2f}")


def test_vit_b_16_is_the_one_of_transformers():
    config = ViTConfig(num_labels=10)
    assert all(getattr(config, name) == value for name, value in determine_space_saved.VIT_B_16.items())


def test_float_layers_are_weights_too(tmp_path, capsys):
    layers = [m for m in build("resnet_18", 10).modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    weights = sum(layer.weight.numel() for layer in layers)
    path = tmp_path / "model"
    save_model(pack_(build("resnet_18", 10)), path)
    assert determine_space_saved.main([str(path)]) == 0
    out = capsys.readouterr().out
    assert "packed weights" not in out
    report = inspect_file(path)
    assert report.bytes_at(1, 4) == report.float_bytes - 3 * weights


@pytest.mark.parametrize("content", [None, b"", b"hello, this is no model", GOLDEN.read_bytes()[:-1]])
def test_bad_files_are_one_sentence_and_exit_code_2(content, tmp_path, capsys):
    path = tmp_path / "model"
    if content is not None:
        path.write_bytes(content)
    assert determine_space_saved.main([str(path)]) == 2
    error = capsys.readouterr().err
    assert str(path) in error and error.count("\n") == 1


def test_a_bad_file_keeps_no_other_from_being_shown(tmp_path, capsys):
    assert determine_space_saved.main([str(tmp_path / "missing"), str(GOLDEN), str(tmp_path / "another")]) == 2
    captured = capsys.readouterr()
    assert "verified" in captured.out and captured.err.count("determine_space_saved.py: ") == 2


def test_files_are_not_recorded_as_the_study(capsys):
    with pytest.raises(SystemExit) as stop:
        determine_space_saved.main(["--record", str(GOLDEN)])
    assert stop.value.code == 2 and "leave the files out" in capsys.readouterr().err
