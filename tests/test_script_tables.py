"""The tables of the three scripts: what rows there are, and that they are what their names say. Nothing is trained."""

from __future__ import annotations

import re
import runpy

import pytest
from torch import nn

from models import build
from models.select import select_layers
from tests.scripts import ROOT, SCRIPTS, start
from train_test_utils.rows import CALIBRATION_IMAGES, Prune, Reinitialize
from train_test_utils.transforms import CalibratedTernary


@pytest.mark.parametrize("script", SCRIPTS)
def test_list_shows_every_row_and_runs_none(script, monkeypatch, capsys, tmp_path):
    assert start(monkeypatch, script, "--list", "--out", str(tmp_path / "out")) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines[2:-1]]
    assert lines[0] == f"{script}: {len(names)} rows" and len(set(names)) == len(names)
    assert {"float", "ptq_linear", "ptq_all", "ptq_all_per_tensor", "qat_linear", "qat_all"} <= set(names)
    for score in ("random", "l1", "l2_filters", "l1_global"):
        for percent in (30, 50, 70, 90):
            assert any(name.endswith(f"_{score}_{percent}") for name in names)
    assert not (tmp_path / "out").exists()


def rows_of(script: str, options: dict) -> dict:
    table = runpy.run_path(str(ROOT / f"{script}_experiments.py"))
    return {row.name: row for row in (table["rows"](options) if "rows" in table else table["ROWS"])}


@pytest.mark.parametrize(
    "script, options",
    [
        ("alexnet", {}),
        ("alexnet", {"batch_norm": False}),
        ("resnet_18", {}),
        ("vit", {"checkpoint": None, "depth": 1, "width": 64}),
    ],
)
def test_the_first_and_the_last_layer_are_called_so(script, options):
    rows, model = rows_of(script, options), build(script, 10, **options)
    layers = [name for name, _ in select_layers(model)]
    for row, names in (("first", layers[:1]), ("last", layers[-1:]), ("ends", [layers[0], layers[-1]])):
        eight_bit = rows[f"qat_all_8bit_{row}"].transforms[0]
        assert [name for name, _ in select_layers(model, eight_bit.only)] == names


@pytest.mark.parametrize("script", SCRIPTS)
def test_rows_do_what_their_names_say(script):
    for name, row in rows_of(script, {}).items():
        pruned = [(i, t) for i, t in enumerate(row.transforms) if isinstance(t, Prune)]
        if said := re.fullmatch(r"(\w+?)_(random|l1_global|l1|l2_filters)_(\d+)", name):
            ((place, prune),) = pruned
            assert (prune.score.__name__, prune.amount) == (said[2], int(said[3]) / 100), name
            assert place == (1 if name.startswith("ptq") else 0), name
        else:
            assert not pruned, name
        last = row.transforms[-1] if row.transforms else None
        if said := re.search(r"_(\d)bit_acts", name):
            assert last.act_bits == int(said[1]), name
        for quantizer in ("twn", "per_tensor", "absmean"):
            if name.endswith(f"_{quantizer}"):
                assert last.quantizer.__name__ == {"per_tensor": "absmean_per_tensor"}.get(quantizer, quantizer), name
        if said := re.search(r"_distilled_(\d+)_(\d+)", name):
            assert (row.recipe.distill, row.recipe.temperature) == (int(said[1]) / 100, int(said[2])), name


def parent_of(name: str) -> str | None:
    if name == "float":
        return None
    return "float_finetuned" if "_all_finetuned" in name or name == "float_finetuned_twice" else "float"


@pytest.mark.parametrize("script", SCRIPTS)
def test_rows_start_where_their_names_say(script):
    for name, row in rows_of(script, {}).items():
        assert row.parent == parent_of(name), name
        anew = any(isinstance(transform, Reinitialize) for transform in row.transforms)
        assert anew == name.endswith("_from_scratch"), name


@pytest.mark.parametrize("script", SCRIPTS)
def test_rows_quantize_what_their_names_say(script):
    for name, row in rows_of(script, {}).items():
        if name.startswith("float"):
            continue
        quantizing = [transform for transform in row.transforms if hasattr(transform, "act_bits")]
        last = quantizing[-1]
        assert last.only is (nn.Linear if name.startswith(("ptq_linear", "qat_linear")) else None), name
        if name.endswith("_weight_only"):
            act_bits = None
        elif said := re.search(r"_(\d)bit_acts", name):
            act_bits = int(said[1])
        else:
            act_bits = 8 if name.startswith("qat") or "_finetuned" in name else None
        assert last.act_bits == act_bits, name
        if isinstance(last, CalibratedTernary):
            assert last.settings.correct == (name not in ("ptq_all_error_feedback", "ptq_all_searched")), name
            assert bool(last.settings.search) == (name != "ptq_all_error_feedback"), name
            more = 16384 if script == "alexnet" and not name.endswith("_reconstructed") else 4096
            assert last.images == (more if "_finetuned" in name else CALIBRATION_IMAGES), name


@pytest.mark.parametrize(
    "script, after_training, during_training",
    [("alexnet", nn.Conv2d, None), ("resnet_18", nn.Conv2d, nn.Conv2d), ("vit", nn.Linear, nn.Linear)],
)
def test_layers_that_are_pruned(script, after_training, during_training):
    for name, row in rows_of(script, {}).items():
        for prune in row.transforms:
            if isinstance(prune, Prune):
                assert prune.only is (after_training if name.startswith("ptq") else during_training), name


@pytest.mark.parametrize(
    "script, options, float_recipe, finetuning",
    [
        ("alexnet", {}, (100, 0.05, "sgd", 5e-4), (30, 0.01, "sgd", 1e-4)),
        ("resnet_18", {}, (200, 0.1, "sgd", 5e-4), (60, 0.05, "sgd", 1e-4)),
        ("vit", {"checkpoint": None}, (200, 1e-3, "adamw", 0.05), (60, 5e-4, "adamw", 0.05)),
        ("vit", {"checkpoint": "x"}, (7, 5e-5, "adamw", 0.01), (7, 2.5e-5, "adamw", 0.01)),
    ],
)
def test_recipes_of_the_tables(script, options, float_recipe, finetuning):
    rows = rows_of(script, options)
    for name, expected in (("float", float_recipe), ("float_finetuned", finetuning), ("qat_all", finetuning)):
        recipe = rows[name].recipe
        assert (recipe.epochs, recipe.lr, recipe.optimizer.__name__, recipe.weight_decay) == expected, name
    short = next(row.recipe for name, row in rows.items() if name.startswith("qat") and name.endswith("_l1_50"))
    assert short.epochs == finetuning[0] / 2 and short.lr == finetuning[1]
    for name in ("qat_all_finetuned", "float_finetuned_twice"):
        again = rows[name].recipe
        assert again.epochs == finetuning[0] / 4 and again.lr == pytest.approx(0.4 * finetuning[1]), name


@pytest.mark.parametrize(
    "script, float_recipe, finetuning",
    [
        ("alexnet", (8, 0.1, 5.0, 0), (8, 0.1, 5.0, 0)),
        ("resnet_18", (16, 0.1, None, 0), (16, 0.1, None, 8192)),
        ("vit", (0, 0.1, 1.0, 0), (0, 0.1, 1.0, 0)),
    ],
)
def test_what_else_the_recipes_say(script, float_recipe, finetuning):
    rows = rows_of(script, {})
    for name, expected in (("float", float_recipe), ("float_finetuned", finetuning), ("qat_all", finetuning)):
        recipe = rows[name].recipe
        told = (recipe.cutout, recipe.label_smoothing, recipe.clip_norm, recipe.statistics_images)
        assert told == expected, name
    for name, row in rows.items():
        assert bool(row.recipe and row.recipe.ramp) == name.endswith("_ramped"), name


@pytest.mark.parametrize("script, rows", [("alexnet", 6), ("resnet_18", 5), ("vit", 6)])
def test_list_of_quick(script, rows, monkeypatch, capsys):
    assert start(monkeypatch, script, "--list", "--quick") == 0
    assert capsys.readouterr().out.startswith(f"{script}: {rows} rows")
