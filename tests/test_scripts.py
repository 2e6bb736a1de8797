"""The three scripts as a user starts them: mistakes, a tiny run from end to end, a kill and a second start."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from quantization_utils import load_model
from tests.scripts import ROOT, start
from tests.trainings import dataset
from train_test_utils import experiment, run
from train_test_utils.cli import sentence
from train_test_utils.logbook import read_rows
from train_test_utils.recipe import Recipe
from train_test_utils.row_folder import locked
from train_test_utils.rows import Row
from train_test_utils.train import NonFiniteLoss

TINY = (
    "--quick --dataset digits --options checkpoint=none width=64 depth=1 patch_size=16 --budget 0.005 --device cpu "
    "--precision fp32 --wandb disabled --seeds 3"
).split()


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--only", "qta*"], "no row matches 'qta*': --list shows the rows"),
        (["--dataset", "cifar11"], "unknown data set 'cifar11': choose cifar10, cifar100, digits, or a folder"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--quick", "--holdout", "1"], "--holdout is a fraction in [0, 1)"),
        (["--quick", "--options", "stem=none"], "unknown stem None"),
        (["--quick", "--options", "depth=3"], "resnet_18 has no option 'depth'"),
    ],
)
def test_a_users_mistake_is_one_sentence_and_exit_code_2(words, sentence, monkeypatch, capsys, tmp_path):
    assert start(monkeypatch, "resnet_18", *words, "--wandb", "disabled", "--out", str(tmp_path)) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert sentence in error and error.startswith("resnet_18_experiments.py: ")


def test_a_missing_checkpoint_is_one_sentence(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    words = "--dataset digits --options checkpoint=nobody/nothing --wandb disabled --out".split()
    assert start(monkeypatch, "vit", *words, str(tmp_path)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "checkpoint=FOLDER" in error and "checkpoint=none" in error


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A tiny ViT on digits: a float row, one quantized after and one during training, one pruned."""
    out = tmp_path_factory.mktemp("out")
    only = ("--only", "ptq_all", "qat_all", "qat_linear_l1_50")
    with pytest.MonkeyPatch.context() as patch:
        assert start(patch, "vit", *TINY, *only, "--out", str(out)) == 0
    return out, only


def lines_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "vit-digits" / "rows.jsonl").read_text().splitlines()]


def test_rows_from_end_to_end(finished):
    out, _ = finished
    rows = {line["row"]: line for line in lines_of(out)}
    assert list(rows) == ["float", "ptq_all", "qat_all", "qat_linear_l1_50"]
    for name, row in rows.items():
        path = out / "vit-digits" / f"{name}-seed3" / "model.safetensors"
        assert row["file_bytes"] == os.path.getsize(path)
        assert row["float_file_bytes"] == rows["float"]["file_bytes"]
        assert row["reload_agreement_pct"] >= 99 and 0 <= row["test_accuracy_pct"] <= 100
        assert row["model"] == "vit" and row["dataset"] == "digits" and row["seed"] == 3 and row["budget"] == 0.005
        assert row["latency_ms_p90_batch1"] >= row["latency_ms_p50_batch1"] > 0 < row["throughput_images_per_s"]
        assert row["transform_seconds"] >= 0 and (row["train_seconds"] > 0) == (name != "ptq_all")
        _, metadata = load_model(path)
        assert metadata["trained"]["row"]["name"] == name
    assert rows["ptq_all"]["file_bytes"] < rows["float"]["file_bytes"] / 5
    assert rows["float"]["weight_bits"] == 32 and rows["ptq_all"]["weight_bits"] < 1.6
    pruned = rows["qat_linear_l1_50"]  # half of the weights are in the patch embedding, a convolution
    assert pruned["zero_fraction"] > 0.24 and pruned["pruned"] == "50% of single weights of linear layers by l1"
    assert (out / "vit-digits" / "report.html").stat().st_size > 1000
    assert not list(out.rglob("last.pt"))


def test_a_second_run_computes_nothing_again(finished, monkeypatch, capsys):
    out, only = finished
    kept = [*out.rglob("*.safetensors"), *out.rglob("config_hash")]
    before = [p.stat().st_mtime_ns for p in kept]
    lines = lines_of(out)

    def forbidden(*args, **kwargs):
        raise AssertionError("trained or packed again")

    for name in ("train", "pack_", "save_weights"):
        monkeypatch.setattr(run, name, forbidden)
    assert start(monkeypatch, "vit", *TINY, *only, "--out", str(out)) == 0
    assert lines_of(out) == lines and [p.stat().st_mtime_ns for p in kept] == before and len(kept) == 12
    assert capsys.readouterr().out.count("done before") == 4


def test_a_changed_configuration_is_a_new_row_and_the_old_one_is_kept(finished, monkeypatch, capsys, tmp_path):
    out = shutil.copytree(finished[0], tmp_path / "out")
    old = lines_of(out)[0]
    before = (out / "vit-digits" / "float-seed3" / "checkpoint.safetensors").read_bytes()
    assert start(monkeypatch, "vit", *TINY, "--budget", "0.001", "--only", "float", "--out", str(out)) == 0
    new = lines_of(out)[-1]
    assert new["row"] == "float" and new["config_hash"] != old["config_hash"] and lines_of(out)[0] == old
    said = f"float, seed 3: started\nfloat, seed 3: {new['test_accuracy_pct']:.2f}%\n"
    assert capsys.readouterr().out.startswith(said)
    kept = out / "vit-digits" / f"float-seed3.{old['config_hash']}" / "checkpoint.safetensors"
    assert kept.read_bytes() == before


def test_results_that_were_moved_aside_come_back_with_their_configuration(finished, monkeypatch, capsys):
    """To and fro between two configurations: neither is trained twice, and neither gets in the other's way."""
    out, _ = finished
    other = [*TINY, "--budget", "0.002"]
    for words in (other, TINY, other, TINY):
        assert start(monkeypatch, "vit", *words, "--only", "float", "--out", str(out)) == 0
    assert capsys.readouterr().out.count("done before") == 3


def test_a_recipe_that_comes_back_counts_again(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["mine.py", *TINY, "--out", str(tmp_path)])
    for lr in (0.1, 0.2, 0.1, 0.1):
        experiment.main("vit", [Row("float", None, [], Recipe(epochs=2, lr=lr))], ("float",))
    one, other, again = (line["line_hash"] for line in lines_of(tmp_path))
    assert one == again != other


@pytest.mark.parametrize("how", ["gone", "cut", "one bit"])
def test_a_packed_file_that_is_damaged_is_made_from_its_checkpoint(how, finished, monkeypatch, capsys):
    """Before anything that is measured beside it."""
    out, _ = finished
    path = out / "vit-digits" / "float-seed3" / "model.safetensors"
    before = path.read_bytes()
    path.unlink()
    if how != "gone":
        path.write_bytes(before[:1000] if how == "cut" else before[:-1] + bytes([before[-1] ^ 1]))
    assert start(monkeypatch, "vit", *TINY, "--only", "ptq_all", "--out", str(out)) == 0
    assert f"{path} is gone or damaged: the row is packed and measured again" in capsys.readouterr().err
    assert path.stat().st_size == len(before) and lines_of(out)[-1]["row"] == "float"


def test_a_row_whose_folder_cannot_be_made_leaves_the_others(monkeypatch, capsys, finished, tmp_path):
    out = tmp_path / "runs"
    (out / "vit-digits").mkdir(parents=True)
    (out / "vit-digits" / "ptq_all-seed3").touch()
    assert start(monkeypatch, "vit", *TINY, "--only", "ptq_all", "ptq_all_twn", "--out", str(out)) == 2
    said = capsys.readouterr()
    assert "ptq_all, seed 3: " in said.err and "File exists" in said.err
    assert [line["row"] for line in lines_of(out)] == ["float", "ptq_all_twn"] and "report and pictures" in said.out


def test_classes_that_were_renamed_are_renamed_in_the_files(monkeypatch, capsys, tmp_path):
    pets = tmp_path / "pets"
    for name, brightness in (("cat", 50), ("dog", 200)):
        (pets / name).mkdir(parents=True)
        for i in range(20):
            Image.new("RGB", (32, 32), (brightness + i,) * 3).save(pets / name / f"{i}.png")
    words = ("vit", *TINY, "--only", "float", "--dataset", str(pets), "--out", str(tmp_path / "runs"))
    assert start(monkeypatch, *words) == 0
    (pets / "dog").rename(pets / "horse")
    assert start(monkeypatch, *words) == 0
    assert "has other names of classes" in capsys.readouterr().err
    (path,) = (tmp_path / "runs" / "vit-pets").rglob("model.safetensors")
    assert load_model(path)[1]["classes"] == ["cat", "horse"]
    assert start(monkeypatch, *words) == 0 and "names of classes" not in capsys.readouterr().err


def test_other_images_of_the_same_name(finished, monkeypatch, capsys, tmp_path):
    out, _ = finished
    for name in ("a", "b"):
        (tmp_path / "digits" / name).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (32, 32), (i, 0, 0)).save(tmp_path / "digits" / name / f"{i}.png")
    lines, words = lines_of(out), [str(tmp_path / "digits") if w == "digits" else w for w in TINY]
    assert start(monkeypatch, "vit", *words, "--only", "float", "--out", str(out)) == 2
    assert "has results of other images that are called digits too, or of these in another" in capsys.readouterr().err
    assert lines_of(out) == lines
    monkeypatch.setattr(experiment, "run_table", None)  # nothing is done before all sets have been looked at
    two = [*TINY, "--dataset", str(tmp_path / "digits"), "--only", "float", "--out"]
    assert start(monkeypatch, "vit", *two, str(tmp_path / "out")) == 2
    assert "two data sets are called digits: give each an --out of its own" in capsys.readouterr().err


def test_a_report_that_cannot_be_written_loses_nothing_else(finished, monkeypatch, capsys):
    def refused(*_):
        raise PermissionError(errno.EACCES, "Permission denied", "report.html")

    out, only = finished
    monkeypatch.setattr(experiment, "write_report", refused)
    assert start(monkeypatch, "vit", *TINY, *only, "--out", str(out)) == 0
    said = capsys.readouterr().out
    assert "qat_linear_l1_50" in said and "the report could not be written (report.html: Permission denied)" in said


def test_a_mistake_has_its_traceback_for_who_asks_for_one(monkeypatch, tmp_path):
    monkeypatch.setenv("TERNARY_TRACEBACK", "1")
    with pytest.raises(ValueError, match="unknown data set 'cifar11'"):
        start(monkeypatch, "vit", *TINY, "--dataset", "cifar11", "--out", str(tmp_path))


def test_a_programs_own_error_is_no_sentence(monkeypatch, tmp_path):
    def failing(*_, **__):
        raise RuntimeError("a shape that does not fit")

    monkeypatch.setattr(run, "transformed", failing)
    with pytest.raises(RuntimeError, match="does not fit"):
        start(monkeypatch, "vit", *TINY, "--only", "float", "--out", str(tmp_path))


def test_nothing_is_left_of_what_could_not_begin(monkeypatch, capsys, tmp_path):
    words = [*TINY, "--options", "width=65", "--only", "float", "--out", str(tmp_path / "out")]
    assert start(monkeypatch, "vit", *words) == 2
    assert "the width of the compact ViT is a multiple of 64" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_a_held_out_part_of_the_training_images_takes_the_place_of_the_test_images(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(experiment, "run_table", lambda name, options, rows, data, arguments: seen.append(data) or 0)
    assert start(monkeypatch, "vit", *TINY, "--holdout", "0.1", "--out", str(tmp_path)) == 0
    assert [(data.name, len(data.test)) for data in seen] == [("digits-heldout0.1", 144)]


def test_quick_is_a_small_model_in_small_batches(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(experiment, "run_table", lambda *given: seen.append(given) or 0)
    for words in ([], ["--options", "checkpoint=x"], ["--budget", "0.5", "--options", "depth=2"]):
        assert start(monkeypatch, "vit", "--quick", "--device", "cpu", *words, "--out", str(tmp_path)) == 0
    small = {"checkpoint": None, "width": 128, "depth": 4}
    assert [options for _, options, *_ in seen] == [small, {"checkpoint": "x"}, small | {"depth": 2}]
    assert [arguments.budget for *_, arguments in seen] == [0.04, 0.04, 0.5]
    assert {row.recipe.batch_size for row in seen[0][2] if row.recipe} == {64}


def test_what_is_set_before_a_table_is_begun(monkeypatch, tmp_path):
    called = []
    monkeypatch.setattr(experiment, "commit", lambda: called.append("commit"))
    monkeypatch.setattr(experiment, "run_table", lambda *given: called.append("table") or 0)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "before")  # so that what is set now goes with the test
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    assert start(monkeypatch, "vit", *TINY, "--out", str(tmp_path)) == 0
    assert called == ["commit", "table"]
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1" and not torch.backends.cudnn.allow_tf32


def test_every_data_set_is_done_and_the_worst_exit_code_is_the_scripts(monkeypatch, tmp_path):
    codes, done = {"digits": 2, "cifar10": 0}, []

    def run_table(name, options, rows, data, arguments):
        done.append(data.name)
        return codes[data.name]

    monkeypatch.setattr(experiment, "load_dataset", lambda name, folder: replace(dataset(), name=name))
    monkeypatch.setattr(experiment, "run_table", run_table)
    assert start(monkeypatch, "vit", *TINY, "--dataset", "cifar10", "--out", str(tmp_path)) == 2
    assert done == ["digits", "cifar10"]


def test_a_training_that_diverges_takes_its_children_with_it(monkeypatch, capsys, tmp_path):
    def diverged(*args, **kwargs):
        raise NonFiniteLoss("the loss was not finite at step 3")

    monkeypatch.setattr(run, "train", diverged)
    assert start(monkeypatch, "vit", *TINY, "--only", "ptq_all", "--out", str(tmp_path)) == 1
    assert capsys.readouterr().err == "vit_experiments.py: float, seed 3: the loss was not finite at step 3\n"
    assert not list(tmp_path.rglob("rows.jsonl"))


@pytest.mark.parametrize(
    ("error", "code"),
    [(ValueError("a score of another shape."), 2), (torch.OutOfMemoryError("no memory"), 1), (MemoryError(), 1),
     (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1)],
)  # fmt: skip
def test_what_is_wrong_with_one_row_leaves_the_others_and_the_report(error, code, monkeypatch, capsys, tmp_path):
    real = run.transformed

    def failing(row, *args, **kwargs):
        if row.name == "ptq_all":
            raise error
        return real(row, *args, **kwargs)

    monkeypatch.setattr(run, "transformed", failing)
    words = [*TINY, "--only", "ptq_all", "ptq_all_twn", "--out", str(tmp_path)]
    assert start(monkeypatch, "vit", *words) == code
    assert f"vit_experiments.py: ptq_all, seed 3: {sentence(error)}\n" in capsys.readouterr().err
    (folder,) = tmp_path.iterdir()
    assert [row["row"] for row in read_rows(folder / "rows.jsonl")] == ["float", "ptq_all_twn"]
    assert (folder / "report.html").exists()


def test_ctrl_c_says_that_the_same_command_continues(monkeypatch, capsys, tmp_path):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "train", interrupted)
    assert start(monkeypatch, "vit", *TINY, "--only", "float", "--out", str(tmp_path)) == 130
    error = capsys.readouterr().err
    assert error.endswith("vit_experiments.py: interrupted; the same command continues\n") and "Traceback" not in error


@pytest.mark.parametrize("out", ["a file", "a file/below"])
def test_an_output_folder_that_cannot_be(out, monkeypatch, capsys, tmp_path):
    (tmp_path / "a file").touch()
    assert start(monkeypatch, "vit", *TINY, "--only", "float", "--out", str(tmp_path / out)) == 2
    error = capsys.readouterr().err
    assert error.startswith("vit_experiments.py: ") and str(tmp_path / out) in error and "Errno" not in error


def test_killed_and_started_again_ends_in_the_same_bytes(tmp_path):
    """A real SIGKILL in the middle of training."""

    def command(out: Path) -> list[str]:
        words = [*TINY, "--budget", "0.03", "--only", "float", "--checkpoint-seconds", "0", "--out", str(out)]
        return [sys.executable, str(ROOT / "vit_experiments.py"), *words]

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    state = broken / "vit-digits" / "float-seed3" / "last.pt"
    run = subprocess.Popen(command(broken), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not state.exists():
            assert run.poll() is None, "it ended before it saved anything"
            time.sleep(0.01)
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
    assert run.returncode == -signal.SIGKILL and not (state.parent / "checkpoint.safetensors").exists()
    for out in (broken, whole):
        subprocess.run(command(out), cwd=tmp_path, check=True, capture_output=True)
    for name in ("checkpoint.safetensors", "model.safetensors"):
        one, two = (out / "vit-digits" / "float-seed3" / name for out in (whole, broken))
        assert one.read_bytes() == two.read_bytes(), name
    assert not state.exists() and len(lines_of(broken)) == 1


def test_two_processes_do_not_work_in_one_folder(finished, monkeypatch, capsys, tmp_path):
    """Neither does one move aside what another is training, nor do two train the same."""
    for out, words in ((finished[0], [*TINY, "--budget", "0.004"]), (tmp_path, TINY)):
        folder = out / "vit-digits" / "float-seed3"
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            assert start(monkeypatch, "vit", *words, "--only", "float", "--out", str(out)) == 2
        assert f"another process is at work in {folder}: let it finish" in capsys.readouterr().err
    assert (finished[0] / "vit-digits" / "float-seed3" / "model.safetensors").exists()


def test_a_row_is_not_held_against_results_that_another_process_has_put_in_place(finished, monkeypatch, capsys):
    """The other one came while this one had not taken its parent's folder."""
    out, _ = finished
    folder = out / "vit-digits" / "float-seed3"
    before = (folder / "config_hash").read_text()
    loaded = run.Run.recall

    def then_another_comes(run, logbook):
        line = loaded(run, logbook)
        if run.row.name == "float":
            (folder / "config_hash").write_text("another\n")
        return line

    monkeypatch.setattr(run.Run, "recall", then_another_comes)
    assert start(monkeypatch, "vit", *TINY, "--only", "ptq_all_per_tensor", "--out", str(out)) == 2
    assert f"{folder} was taken by another process with other options: start again" in capsys.readouterr().err
    (folder / "config_hash").write_text(before)
    assert "ptq_all_per_tensor" not in {line["row"] for line in lines_of(out)}


def test_what_is_not_done_is_not_measured_again(finished, monkeypatch, capsys):
    out, _ = finished
    before, folders = lines_of(out), sorted((out / "vit-digits").iterdir())
    monkeypatch.setattr(run, "train", None)
    words = [*TINY, "--budget", "0.003", "--only", "qat_all", "--measure-again", "--out", str(out)]
    assert start(monkeypatch, "vit", *words) == 0
    assert capsys.readouterr().err == "float, seed 3: not done with these options, so not measured\n"
    assert lines_of(out) == before and sorted((out / "vit-digits").iterdir()) == folders


def test_measuring_again_leaves_the_rows_that_are_not_named(finished, monkeypatch):
    out, _ = finished
    before = lines_of(out)
    monkeypatch.setattr("train_test_utils.run.commit", lambda: "now")
    assert start(monkeypatch, "vit", *TINY, "--only", "ptq_all", "--measure-again", "--out", str(out)) == 0
    (line,) = lines_of(out)[len(before) :]
    old = [line for line in before if line["row"] == "ptq_all"][-1]
    assert all(line[field] == old[field] for field in ("row", "train_seconds", "transform_seconds"))
    assert line["commit"] == "now" and line["trained_commit"] == old["commit"]
    assert line["trained_versions"] == old["versions"] and line["trained_device"] == old["device"]


def test_a_short_training_is_not_compiled(monkeypatch, tmp_path):
    """On a GPU it would be over before its compilation."""
    compiled = []
    monkeypatch.setattr("train_test_utils.cli.can_compile", lambda device: True)
    monkeypatch.setattr(
        "train_test_utils.run.train", lambda model, data, recipe, setup, **more: compiled.append(setup.compile)
    )
    for least in (1, 10**6):
        monkeypatch.setattr("train_test_utils.run.WORTH_COMPILING", least)
        assert start(monkeypatch, "vit", *TINY, "--only", "float", "--out", str(tmp_path / str(least))) == 0
    assert compiled == [True, False]


def test_latency_alone_is_measured_again_without_an_image_of_the_data(finished, monkeypatch):
    out, _ = finished
    before = lines_of(out)
    monkeypatch.setattr("train_test_utils.run.predict", None)
    monkeypatch.setattr("train_test_utils.run.commit", lambda: "now")
    monkeypatch.setattr("train_test_utils.run.latency_beside", lambda *models, seconds: {"throughput_batch": 5})
    assert start(monkeypatch, "vit", *TINY, "--only", "ptq_all", "--measure-again", "latency", "--out", str(out)) == 0
    (line,) = lines_of(out)[len(before) :]
    old = [line for line in before if line["row"] == "ptq_all"][-1]
    now = {"latency_commit": "now", "latency_versions": old["versions"]}
    assert line == old | {"throughput_batch": 5} | now
