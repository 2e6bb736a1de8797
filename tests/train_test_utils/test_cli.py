from __future__ import annotations

from pathlib import Path

import pytest
import torch

from train_test_utils import cli
from train_test_utils.cli import can_compile, parse_arguments, parse_options, pick_device, pick_precision, sentence


def parse(*words):
    return parse_arguments("alexnet", list(words))


def test_what_holds_unless_told_otherwise():
    given = parse()
    assert given.dataset == ("cifar10", "cifar100") and given.budget == 1.0 and given.seeds == (0,) and given.only == ()
    assert given.out == Path("runs") and given.wandb == "online" and given.options == {} and not given.quick
    assert given.checkpoint_seconds == 60 and given.data_dir == Path("data")


def test_quick_is_digits_at_a_small_budget_unless_told_otherwise():
    assert (parse("--quick").dataset, parse("--quick").budget) == (("digits",), 0.015)
    given = parse("--quick", "--budget", "0.01", "--dataset", "cifar10")
    assert (given.dataset, given.budget) == (("cifar10",), 0.01)
    assert parse("--budget", "2").budget == 2


def test_a_data_set_that_is_named_twice_is_done_once():
    assert parse("--dataset", "digits", "digits").dataset == ("digits",)


def test_lists_and_options():
    given = parse(*"--seeds 0 2 0 --only qat* float --options batch_norm=false dropout=0.1 --device cpu".split())
    assert given.seeds == (0, 2) and given.only == ("qat*", "float")
    assert given.options == {"batch_norm": False, "dropout": 0.1} and given.device == torch.device("cpu")
    words = "--seeds 0 --only float --options dropout=0.1 --seeds 1 --only ptq_all --options batch_norm=false"
    twice = parse(*words.split())
    assert twice.seeds == (0, 1) and twice.only == ("float", "ptq_all") and len(twice.options) == 2


@pytest.mark.parametrize(
    "word, value",
    [("a=1", 1), ("a=0.5", 0.5), ("a=false", False), ("a=True", True), ("a=None", None), ("a=x=y", "x=y")],
)
def test_values_of_options(word, value):
    assert parse_options([word]) == {"a": value}


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--device", "tpu"], "unknown device 'tpu': choose auto, cpu, cuda or cuda:N"),
        (["--device", "cuda:x"], "unknown device 'cuda:x'"),
        (["--device", "cpu:"], "unknown device 'cpu:'"),
        (["--device", "cuda:99"], "this machine has no device cuda:99"),
        (["--budget", "0"], "--budget is from above 0 to 100"),
        (["--budget", "-1"], "--budget is from above 0 to 100"),
        (["--budget", "nan"], "--budget is from above 0 to 100"),
        (["--budget", "101"], "--budget is from above 0 to 100"),
        (["--out", "x" * 300], "File name too long"),
        (["--budget", "x"], "invalid float value: 'x'"),
        (["--holdout", "nan"], "--holdout is a fraction in [0, 1)"),
        (["--holdout", "inf"], "--holdout is a fraction in [0, 1)"),
        (["--holdout", "-0.1"], "--holdout is a fraction in [0, 1)"),
        (["--seeds", "0", "-1"], "--seeds are whole numbers from 0 to 2^32 - 1, not -1"),
        (["--seeds", str(2**70)], "--seeds are whole numbers"),
        (["--seeds", str(2**32)], "--seeds are whole numbers"),
        (["--checkpoint-seconds", "nan"], "--checkpoint-seconds is a time from 0 on, not nan"),
        (["--checkpoint-seconds", "-1"], "--checkpoint-seconds is a time from 0 on, not -1"),
        (["--precision", "int4"], "invalid choice: 'int4'"),
        (["--wandb", "maybe"], "invalid choice: 'maybe'"),
        (["--options", "stem"], "--options takes KEY=VALUE words, not 'stem'"),
        (["--options", "stem="], "--options takes KEY=VALUE words, not 'stem='"),
        (["--options", "=3"], "--options takes KEY=VALUE words, not '=3'"),
        (["--options", "depth=3"], "alexnet has no option 'depth': choose from batch_norm, dropout"),
        (["--options", "num_classes=3"], "alexnet has no option 'num_classes'"),
        (["--options", "name=vit"], "alexnet has no option 'name'"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["--onl", "float"], "unrecognized arguments: --onl float"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(words, sentence, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(*words)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence in line


@pytest.mark.parametrize("option", ["--out", "--data-dir"])
def test_a_file_is_no_folder(option, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        parse(option, str(tmp_path / "file"))
    assert f"{option} is a folder, and {tmp_path / 'file'} is a file" in capsys.readouterr().err


def test_training_is_compiled_on_a_gpu_where_triton_finds_its_compiler(monkeypatch, capsys, tmp_path):
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    for compiler in ("clang", "gcc"):
        monkeypatch.setattr("shutil.which", lambda name, compiler=compiler: name if name == compiler else None)
        assert can_compile(torch.device("cuda")) and not can_compile(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert parse("--device", "cuda", "--precision", "fp32").compile and not parse("--device", "cpu").compile
    monkeypatch.setattr("shutil.which", lambda name: "/opt/mycc" if name == "mycc" else None)
    monkeypatch.setenv("CC", "mycc")
    assert can_compile(torch.device("cuda"))
    monkeypatch.setattr("sysconfig.get_path", lambda name: "/nowhere")
    assert not can_compile(torch.device("cuda"))
    assert capsys.readouterr().err.startswith("no Python.h was found, so training is not compiled and slower")
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert not can_compile(torch.device("cuda"))
    assert capsys.readouterr().err.startswith("no C compiler was found, so training is not compiled and slower")


def test_gpus_are_numbered_from_0(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(pick_device(name)) for name in ("cuda", "cuda:0", "cuda:1")] == ["cuda", "cuda:0", "cuda:1"]
    with pytest.raises(ValueError, match="this machine has no device cuda:2"):
        pick_device("cuda:2")


def test_errors_in_a_sentence():
    assert sentence(ValueError("a fraction, not 3")) == "a fraction, not 3"
    assert sentence(OSError(28, "No space left on device", "runs/x")) == "runs/x: No space left on device"
    assert sentence(OSError(28, "No space left on device")) == "No space left on device"
    on_a_cpu = RuntimeError("[enforce fail at a.cpp:127] . DefaultCPUAllocator: can't allocate memory: 9 bytes\nframe")
    assert sentence(on_a_cpu) == "can't allocate memory: 9 bytes"
    assert sentence(FileNotFoundError("x is not there: make it")) == "x is not there: make it"
    assert sentence(MemoryError()) == "MemoryError"


def test_precision(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert pick_precision("fp16", cpu) == torch.float16 and pick_precision("fp32", gpu) == torch.float32
    for capability, expected in (((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert pick_precision("auto", gpu) == expected
    for has, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("train_test_utils.cli._cpu_has_bf16", lambda has=has: has)
        assert pick_precision("auto", cpu) == expected


@pytest.mark.parametrize("flags, has", [("avx512f avx512_bf16", True), ("avx512f avx512_vnni", False), (None, False)])
def test_whether_the_processor_multiplies_in_bfloat16(flags, has, monkeypatch):
    def read_text(path):
        if flags is None:
            raise FileNotFoundError(path)
        return f"flags : {flags}\n"

    monkeypatch.setattr(Path, "read_text", read_text)
    assert cli._cpu_has_bf16() == has


def test_auto_is_cuda_where_there_is_one(monkeypatch):
    for there, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert pick_device("auto") == torch.device(expected)


def test_a_folder_that_safetensors_could_not_name_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        parse("--out", "runs/\udcff")  # as Python has a byte that is no UTF-8
    assert ended.value.code == 2 and "no name in UTF-8" in capsys.readouterr().err
