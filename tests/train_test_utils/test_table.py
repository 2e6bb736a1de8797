"""Lines of a table: what is one line, what is averaged, how values read."""

import pytest

from train_test_utils.table import (
    COLUMNS,
    Line,
    circumstances,
    columns_of,
    float_line,
    lines_of,
    megabytes,
    significant,
)

CELL = {column.title: column for column in COLUMNS}


def row(name="qat_all", seed=0, **fields):
    return {"model": "resnet_18", "dataset": "digits", "row": name, "seed": seed, "budget": 1.0} | fields


def test_seeds_are_averaged_with_the_sample_standard_deviation():
    (line,) = lines_of([row(seed=s, test_accuracy_pct=a) for s, a in enumerate((90.0, 91.0, 92.0))])
    assert line.mean("test_accuracy_pct") == 91 and line.std("test_accuracy_pct") == 1
    assert CELL["test accuracy"].cell(line) == "91.00% ± 1.00%"


def test_a_row_done_again_replaces_the_earlier_one():
    (line,) = lines_of([row(test_accuracy_pct=50.0), row(seed=1, test_accuracy_pct=70.0), row(test_accuracy_pct=60.0)])
    assert sorted(line.values("test_accuracy_pct")) == [60, 70]


def test_seeds_of_a_recipe_that_was_edited_since_are_left_out():
    rows = [row(seed=s, line_hash=h, test_accuracy_pct=a)
            for s, h, a in ((0, "a", 50.0), (1, "a", 60.0), (0, "b", 70.0), (2, "b", 80.0))]  # fmt: skip
    (line,) = lines_of(rows)
    assert line.seeds == (0, 2) and line.mean("test_accuracy_pct") == 75
    (line,) = lines_of([*rows, rows[0]])  # and back
    assert line.seeds == (0, 1) and line.mean("test_accuracy_pct") == 55


@pytest.mark.parametrize(
    ("pruned", "pruning"),
    [("60% of filters of all layers by mine", ("x", "mine", 60.0)), ("", None),
     ("30% of filters of all layers by l2_filters; 60% of single weights of all layers by l1", None)],
)  # fmt: skip
def test_a_line_that_was_pruned_twice_has_no_place_on_a_curve(pruned, pruning):
    (line,) = lines_of([row("x", pruned=pruned)])
    assert line.pruning == pruning and line.is_pruned == bool(pruned)


def test_texts_are_those_of_the_last_row_and_a_budget_that_is_not_there_is_the_whole():
    (line,) = lines_of([{"row": "float", "seed": 0, "device": "A"}, {"row": "float", "seed": 1, "device": "B"}])
    assert line.text("device") == "B" and line.budget == 1


@pytest.mark.parametrize(
    "other",
    [
        {"budget": 0.02}, {"precision": "bfloat16"}, {"options": {"stem": "maxpool"}}, {"dataset": "cifar10"},
        {"model": "vit"},
    ],
)
def test_different_conditions_are_never_averaged(other):
    lines = lines_of([row("float", test_accuracy_pct=99.0), row(), row("float", **other), row(**other)])
    assert len(lines) == 4
    assert float_line(lines, lines[1]) is lines[0] and float_line(lines, lines[3]) is lines[2]


def test_what_is_missing_is_a_dash():
    (line,) = lines_of([row(file_bytes=None, zero_fraction=float("nan"), latency_ms_p50_batch1=2.0)])
    cells = {title: column.cell(line) for title, column in CELL.items()}
    assert cells.pop("latency") == "2.00 ms"
    assert set(cells.values()) == {"–"}


def test_quotients_are_taken_seed_by_seed():
    sizes = ((0, 1), (1, 10), (2, 0))  # seed, k; nothing is divided by 0
    (line,) = lines_of([row(seed=s, float_file_bytes=100 * k, file_bytes=k * k) for s, k in sizes])
    assert line.values("float_file_bytes/file_bytes") == [100, 10]
    assert CELL["smaller"].cell(line) == "55.0×"


@pytest.mark.parametrize("fields, expected", [
    ({"row": "qat_all_l1_30", "pruned": "30% of single weights of convolutions by l1"}, ("qat_all", "l1", 30)),
    ({"row": "qat_all_taylor_5", "pruned": "5% of filters of all layers by taylor"}, ("qat_all", "taylor", 5)),
    ({"row": "qat_all_l1_5_mine", "pruned": "5% of single weights of all layers by l1"}, ("qat_all_mine", "l1", 5)),
    ({"row": "ptq_linear_l1_global_90"}, ("ptq_linear", "l1_global", 90)),
    ({"row": "float_l2_filters_50"}, ("float", "l2_filters", 50)),
    ({"row": "qat_all_8bit_ends", "pruned": ""}, None),
])  # fmt: skip
def test_what_a_line_prunes(fields, expected):
    assert Line((fields,)).pruning == expected


@pytest.mark.parametrize("value, text", [
    (0, "0"), (0.12345, "0.123"), (0.99964, "1.00"), (1.0, "1.00"), (12.34, "12.3"), (99.96, "100"), (123.4, "123"),
    (1234.0, "1,230"), (-2.5, "-2.50"),
])  # fmt: skip
def test_significant_digits(value, text):
    assert significant(value) == text


def test_sizes():
    assert megabytes(44_812_345) == "44.8 MB" and megabytes(2_356_000) == "2.36 MB" and megabytes(8123) == "8.12 kB"


def test_circumstances_name_every_device_and_skip_the_unknown():
    other = row("float", seed=1, device="B", precision="bf16", options={"stem": "maxpool"})
    found = circumstances(lines_of([row(device="A", commit="", options={}), other]))
    assert found == {
        "budget": "1", "seeds": "0, 1", "device": "A, B", "precision": "bf16", "options": "stem=maxpool"
    }  # fmt: skip


def test_circumstances_name_the_commits_of_both_measurements():
    rows = [row("float", commit="one"), row(commit="two", latency_commit="three")]
    assert circumstances(lines_of(rows))["commit"] == "one, two, three"


def test_a_latency_of_another_device_says_so():
    one, two = row(device="GPU", latency_device="CPU"), row(device="CPU", latency_device="CPU")
    assert circumstances(lines_of([one]))["latency on"] == "CPU"
    assert "latency on" not in circumstances(lines_of([two]))
    assert "latency on" not in circumstances(lines_of([two, row("float", device="GPU")]))


def test_what_was_measured_on_held_out_images_is_not_called_test_accuracy():
    held_out, tested = lines_of([row(dataset="cifar10-heldout0.2"), row()])
    assert columns_of([held_out])[0].title == "held-out accuracy" and columns_of([tested]) == COLUMNS
    assert columns_of([held_out, tested]) == COLUMNS
    assert [c.title for c in columns_of([held_out])[1:]] == [c.title for c in COLUMNS[1:]]


def test_the_same_row_under_other_conditions_has_another_label():
    precisions = lines_of([row(precision="float32"), row(seed=1, precision="bfloat16")])
    assert [line.label for line in precisions] == ["qat_all (float32)", "qat_all (bfloat16)"]
    alone = lines_of([row(budget=0.1, options={"stem": "maxpool"})])
    assert [line.label for line in alone] == ["qat_all"]
    lines = lines_of([row(), row(budget=0.1), row(options={"stem": "maxpool"})])
    assert [line.label for line in lines] == [
        "qat_all (budget 1)", "qat_all (budget 0.1)", "qat_all (budget 1, stem=maxpool)"
    ]  # fmt: skip


def test_options_in_another_order_are_the_same():
    one, other = {"width": 128, "depth": 4}, {"depth": 4, "width": 128}
    lines = lines_of([row("float", options=one), row(options=one), row(seed=1, options=other)])
    assert [line.label for line in lines] == ["float", "qat_all"] and lines[1].seeds == (0, 1)
    assert len(circumstances(lines)["options"].split(", ")) == 1


def test_a_tenth_of_a_megabyte_and_less():
    assert megabytes(120_000) == "0.120 MB" and megabytes(99_000) == "99.0 kB"
