from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest
import torch
from torch import nn

from models import build
from models.select import select_layers
from pruning_utils import l1, l2_filters, random, zero_fraction
from quantization_utils import absmean, int8_absmax, mse_optimal
from quantization_utils.bit_layers import Quantized
from tests.networks import images, make
from train_test_utils.recipe import Recipe, adamw, sgd
from train_test_utils.rows import (
    Prune,
    Reinitialize,
    Row,
    Ternary,
    _hash_of_folder,
    calibration_images,
    choose,
    config_hash,
    describe,
    folder_hashes,
    format_rows,
    in_small_batches,
    pruned_text,
    transformed,
)
from train_test_utils.transforms import CalibratedTernary

RECIPE = Recipe(epochs=3, lr=0.1)
QAT = Ternary(absmean, act_bits=8)
ROWS = [
    Row("float", None, [], RECIPE),
    Row("ptq_linear", "float", [Ternary(mse_optimal, only=nn.Linear)], None),
    Row("qat_all", "float", [QAT], RECIPE),
    Row("qat_all_again", "qat_all", [], RECIPE),
    Row("qat_all_l1_50", "float", [Prune(l1, 0.5, only=nn.Conv2d), QAT], RECIPE),
]


@pytest.mark.parametrize(
    "patterns, names",
    [
        (None, [r.name for r in ROWS]),
        (["float"], ["float"]),
        (["ptq*"], ["float", "ptq_linear"]),
        (["qat_all_again"], ["float", "qat_all", "qat_all_again"]),
        (["*_50", "ptq_linear"], ["float", "ptq_linear", "qat_all_l1_50"]),
    ],
)
def test_rows_are_chosen_with_their_parents_in_order(patterns, names):
    assert [row.name for row in choose(ROWS, patterns)] == names


def test_a_pattern_that_matches_no_row():
    with pytest.raises(ValueError, match="no row matches 'qta': --list shows the rows"):
        choose(ROWS, ["float", "qta"])


def test_layers_that_are_8_bit_already_stay_so():
    model, (first, *_, last) = make("alexnet_like"), [name for name, _ in select_layers(make("alexnet_like"))]
    for transform in (Ternary(int8_absmax, act_bits=8, only=(first, last)), Ternary(absmean, act_bits=8)):
        model = transform(model, images(8), 0)
    assert [m.weight_bits for _, m in select_layers(model)] == [8, "ternary", "ternary", 8]
    assert any(isinstance(m, Quantized) for m in model.modules()), "calibrated"


def test_prune_prunes():
    model = Prune(l1, 0.4, only=nn.Conv2d)(make("alexnet_like"), images(1), 0)
    assert zero_fraction(model, nn.Conv2d) == pytest.approx(0.4, abs=0.01) and zero_fraction(model, nn.Linear) == 0


def test_each_seed_prunes_other_weights():
    prune = Prune(random, 0.5)
    masks = [prune(nn.Sequential(nn.Linear(8, 8)), images(1), seed)[0].weight != 0 for seed in (0, 0, 1)]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


def test_weights_drawn_anew_depend_on_the_seed_alone():
    model = build("vit", 10, width=64, depth=1, patch_size=16)
    one, again, two = (Reinitialize()(model, images(1), seed).network.classifier.weight for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, two)


def test_a_network_whose_weights_are_drawn_anew_has_the_same_options():
    model = build("vit", 7, width=64, depth=1, patch_size=16)
    fresh = Reinitialize()(model, images(1), 0)
    fresh.load_state_dict(model.state_dict())
    assert not fresh.training


def test_a_transformation_gets_as_many_images_as_it_asks_for():
    counts = []

    class Looks:
        images = 5

        def __call__(self, model, images, seed):
            counts.append(len(images))
            return model

    transformed(Row("x", "float", [Looks()], None), nn.Identity(), torch.zeros(9, 3, 4, 4, dtype=torch.uint8), 0)
    assert counts == [5]


def test_work_is_left_undone_where_weights_will_be_loaded():
    class Works:
        def __call__(self, model, images, seed):
            raise AssertionError("it worked")

        def structure(self, model, images, seed):
            return nn.Sequential(model)

    row, pixels = Row("x", "float", [Works()], None), torch.zeros(9, 3, 4, 4, dtype=torch.uint8)
    assert isinstance(transformed(row, nn.Identity(), pixels, 0, structure_only=True), nn.Sequential)


def test_small_batches_take_steps_as_much_shorter():
    def small(*, batch_size: int, optimizer=sgd) -> Recipe:
        recipe = Recipe(epochs=1, lr=0.1, batch_size=batch_size, optimizer=optimizer)
        return in_small_batches(Row("float", None, [], recipe)).recipe

    assert small(batch_size=128) == Recipe(epochs=1, lr=0.05, batch_size=64)
    assert small(batch_size=256, optimizer=adamw) == Recipe(epochs=1, lr=0.05, batch_size=64, optimizer=adamw)
    assert small(batch_size=32) == Recipe(epochs=1, lr=0.1, batch_size=32)
    assert in_small_batches(Row("ptq", "float", [], None)).recipe is None


def test_what_a_row_prunes_in_words():
    assert pruned_text(ROWS[-1]) == "50% of single weights of convolutions by l1"
    row = Row("x", "float", [Prune(l2_filters, 0.3)], None)
    assert pruned_text(row) == "30% of filters of all layers by l2_filters"
    assert pruned_text(ROWS[2]) == ""


def test_the_table_of_rows():
    lines = format_rows("alexnet", ROWS).splitlines()
    assert lines[0] == "alexnet: 5 rows" and len(lines) == 8
    assert "qat_all_l1_50" in lines[-2] and "3 epochs" in lines[-2] and "50% of single weights" in lines[-2]
    assert lines[-1] == "12 epochs in all, for a data set and a seed"
    tenth = format_rows("alexnet", ROWS, 0.1).splitlines()[-1]
    assert tenth == "1.2 epochs in all of budget 0.1, for a data set and a seed"


def test_the_table_of_rows_tells_recipes_apart():
    recipe = Recipe(epochs=3, lr=0.1, ramp=0.3, distill=0.5, temperature=4)
    line = format_rows("alexnet", [Row("x", None, [], recipe)]).splitlines()[2]
    assert "3 epochs, 30% ramp, 50% distilled at T=4" in line


def test_a_description_is_json_and_every_field_is_in_it():
    told = describe(ROWS[-1])
    assert json.loads(json.dumps(told)) == told
    assert told["transforms"][0]["score"] == "l1" and told["transforms"][0]["only"] == "Conv2d"
    assert told["recipe"].keys() == {f.name for f in fields(Recipe)} | {"kind"}


def test_the_hash_changes_with_everything_in_a_row():
    row = ROWS[-1]
    others = [
        row, replace(row, name="x"), replace(row, parent="qat_all"), replace(row, recipe=None),
        replace(row, recipe=replace(RECIPE, lr=0.2)), replace(row, recipe=replace(RECIPE, ema=0.9)),
        replace(row, transforms=[QAT]), replace(row, transforms=[Prune(l1, 0.6, only=nn.Conv2d), QAT]),
        replace(row, transforms=[Prune(l1, 0.5), QAT]), replace(row, transforms=[QAT, row.transforms[0]]),
        replace(row, transforms=[row.transforms[0], replace(QAT, act_bits=6)]),
    ]  # fmt: skip
    hashes = [config_hash({"row": describe(r)}) for r in others]
    assert len(set(hashes)) == len(others) and hashes[0] == config_hash({"row": describe(replace(row))})
    assert config_hash({"a": 1, "b": 2}) == config_hash({"b": 2, "a": 1})


def test_the_hash_of_a_folder_changes_with_its_files(tmp_path):
    def found():
        _hash_of_folder.cache_clear()
        return folder_hashes({"checkpoint": str(tmp_path), "stem": str(tmp_path), "depth": 3, "none": None})

    (tmp_path / "a").write_text("1")
    hashes = [found(), found()]
    for change in (lambda: (tmp_path / "a").write_text("2"), lambda: (tmp_path / "a").rename(tmp_path / "b")):
        change()
        hashes.append(found())
    assert hashes[0] == hashes[1] and len({h["checkpoint"] for h in hashes}) == 3 and all(len(h) == 1 for h in hashes)


def test_calibration_images_depend_on_the_seed_alone():
    pixels = torch.randint(0, 256, (50, 3, 4, 4), dtype=torch.uint8)
    one = calibration_images(pixels, 1, 20)
    torch.manual_seed(9)
    assert torch.equal(one, calibration_images(pixels, 1, 20))
    assert not torch.equal(one, calibration_images(pixels, 2, 20))
    assert one.shape == (20, 3, 4, 4) and torch.equal((one * 255).round() / 255, one)
    assert len(calibration_images(pixels, 1)) == 50, "all there are"


@pytest.mark.parametrize("rows", [[Row("a", "flaot", [], RECIPE)], [Row("a", "b", [], None), Row("b", None, [], None)]])
def test_a_row_that_starts_from_none_before_it(rows):
    with pytest.raises(ValueError, match="a starts from '(flaot|b)', which is no row before it"):
        choose(rows, None)


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [([Row("a", None, [], RECIPE), Row("a", None, [], RECIPE)], "two rows are called a: give each"),
     ([Row("a", None, [QAT], RECIPE)], "a has transformations and starts from no row: name the float row")],
)  # fmt: skip
def test_rows_that_make_no_table(rows, sentence):
    with pytest.raises(ValueError, match=sentence):
        choose(rows, None)


def test_functions_without_a_name_of_their_own_cannot_describe_a_row():
    def made(threshold):
        def score(weight):
            return weight > threshold

        return score

    for score in (lambda weight: weight, made(0.5)):
        with pytest.raises(ValueError, match="has no name of its own to tell it by"):
            describe(Row("a", "float", [Prune(score, 0.5)], None))


def test_texts_say_which_layers_and_exactly_how_much():
    assert str(Prune(l1, 0.125)).startswith("12.5% of single weights of all layers")
    assert "convolutions without 0" in str(Ternary(only=nn.Conv2d, keep=("0",)))
    assert "linear layers" in str(CalibratedTernary(only=nn.Linear)) and "layers" not in str(CalibratedTernary())


def test_texts_say_how_many_bits_and_images():
    assert str(Ternary(int8_absmax)).startswith("8-bit int8_absmax")
    assert str(Ternary(absmean)).startswith("ternary absmean")
    assert "from 4,096 images" in str(CalibratedTernary(images=4096)) and "images" not in str(CalibratedTernary())


def test_a_transformed_model_is_in_evaluation():
    images_of_2 = torch.zeros(2, 3, 2, 2, dtype=torch.uint8)
    assert not transformed(Row("float", None, [], None), nn.Sequential(nn.Dropout()), images_of_2, 0).training
