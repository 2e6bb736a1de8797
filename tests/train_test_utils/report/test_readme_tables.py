"""README tables: generated between their markers, checked, and refused with one sentence where they cannot be."""

import json
import os

import pytest

from train_test_utils.report.__main__ import main
from train_test_utils.report.readme_tables import markdown, with_tables

EXPERIMENTS = [
    {"model": "vit", "dataset": "cifar10", "row": name, "seed": 0, "budget": 0.02, "test_accuracy_pct": accuracy,
     "file_bytes": size,
     "float_file_bytes": 1_000_000, "options": {"depth": 2}, "device": "some CPU",
     "command": "python3 vit_experiments.py --budget 0.02"}
    for name, accuracy, size in (("float", 80.123, 1_000_000), ("qat_all", 79.0, 50_000))
]  # fmt: skip
LATENCY = [
    {
        "model": "alexnet",
        "batch": 1,
        "engine": "ours",
        "p50_ms": 0.5,
        "ratio": 2.0,
        "device": "some CPU",
        "detail": {"p90": 0.7, "range": [1, 2000]},
        "finished_at": "2026-01-01T00:00:00+00:00",
    },
    {
        "model": "alexnet",
        "batch": 1,
        "engine": "a|b",
        "p50_ms": 1.0,
        "ratio": None,
        "device": "some CPU",
        "detail": {"p90": 1.5},
    },
    {
        "model": "alexnet",
        "batch": 1,
        "engine": "ours",
        "p50_ms": 0.4,
        "ratio": 2.5,
        "device": "some CPU",
        "detail": {"p90": 0.6, "range": [3, 4]},
    },
]


@pytest.fixture
def results(tmp_path):
    for name, rows in (("cifar10/vit", EXPERIMENTS), ("latency/networks", LATENCY)):
        path = tmp_path / "results" / f"{name}.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "results"


def marked(name_and_options, body="stale\n"):
    return f"before\n<!-- table:{name_and_options} -->\n{body}<!-- /table -->\nafter\n"


def test_rows_of_experiments(results):
    text = with_tables(marked("cifar10/vit"), results)
    lines = text.splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and "stale" not in text
    assert lines[2].startswith("| row | test accuracy | file | smaller |") and lines[3].startswith("| --- | ---: |")
    assert lines[4].startswith("| `float` | 80.12% | 1.00 MB | 1.00× |")
    assert lines[5].startswith("| `qat_all` | 79.00% | 50.0 kB | 20.0× |")
    assert "budget 0.02" in text and "seeds 0" in text and "device some CPU" in text and "**reduced budget**" in text
    assert text.count("python3 vit_experiments.py --budget 0.02") == 1


def test_rows_of_two_budgets_that_were_measured_on_held_out_images(tmp_path):
    rows = [row | {"dataset": "cifar10-heldout0.2", "budget": budget} for budget in (0.02, 1.0) for row in EXPERIMENTS]
    (tmp_path / "vit.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = with_tables(marked("vit only=float"), tmp_path)
    assert "| row | held-out accuracy |" in text
    assert "| `float` (budget 0.02) | 80.12% |" in text and "| `float` (budget 1) | 80.12% |" in text


def test_lines_of_which_some_have_an_accuracy_and_yes_and_no(tmp_path):
    (tmp_path / "some.jsonl").write_text(
        '{"row": "a", "test_accuracy_pct": 1.5, "same": true, "peak_multiply_adds_per_s": 99e9}\n'
        '{"row": "b", "same": false, "peak_multiply_adds_per_s": 471e9}\n'
    )
    assert with_tables(marked("some"), tmp_path).splitlines()[2:-2] == [
        "| row | test accuracy pct | same |", "| --- | ---: | ---: |", "| a | 1.5 | yes |", "| b | – | no |",
        "", "99–471 G multiply-adds/s at most",
    ]  # fmt: skip


def test_only_some_rows(results):
    text = with_tables(marked("cifar10/vit only=qat_*,ptq_*"), results)
    assert "`qat_all`" in text and "`float`" not in text


def test_rows_come_in_the_order_of_the_patterns(results):
    text = with_tables(marked("cifar10/vit only=qat_*,f*,*"), results)
    assert text.index("`qat_all`") < text.index("`float`") and text.count("`float`") == 1


def test_any_other_lines_with_chosen_columns_and_only_the_last_of_repetitions(results):
    columns = "columns=engine,p50_ms,ratio,detail.p90"
    text = with_tables(marked(f"latency/networks {columns} last=model,batch,engine"), results)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert table == ["| engine | p50 ms | ratio | p90 |", "| --- | ---: | ---: | ---: |",
                     "| ours | 0.400 | 2.50 | 0.600 |", r"| a\|b | 1.00 | – | 1.50 |"]  # fmt: skip
    assert "device some CPU" in text
    table = [line for line in with_tables(marked("latency/networks"), results).splitlines() if line.startswith("|")]
    assert table[0] == "| model | batch | engine | p50 ms | ratio |" and len(table) == 5


def test_titles_and_members_of_lists(results):
    text = with_tables(marked("latency/networks columns=engine:the_engine,detail.range.1:at_most"), results)
    assert [line for line in text.splitlines() if line.startswith("|")] == [
        "| the engine | at most |", "| --- | ---: |", "| ours | 2,000 |", r"| a\|b | – |", "| ours | 4 |",
    ]  # fmt: skip


def test_a_line_for_each_member_of_a_list(tmp_path):
    (tmp_path / "layers.jsonl").write_text(
        '{"model": "a", "us": 9, "nodes": [{"shape": [64, 3], "us": 1.5}, {"shape": null, "us": null}]}\n'
        '{"model": "b"}\n'
    )
    text = with_tables(marked("layers each=nodes columns=model,shape,us"), tmp_path)
    assert [line for line in text.splitlines() if line.startswith("| a")] == ["| a | 64×3 | 1.50 |", "| a | – | – |"]
    assert "| b |" not in text


def test_a_line_for_each_member_of_a_mapping_with_intervals_percentages_versions_and_limits(tmp_path):
    rows = [
        {"case": "fc", "engines": {"ours": {"ratio": [1.0, 1.0, 1.0]}, "torch": {"ratio": [2.04, 1.5, 3.25]}},
         "of_limit_pct": 129.5, "peak_multiply_adds_per_s": 471.4e9, "versions": {"torch": "2.11", "numpy": "2"},
         "commit": "abc"},
        {"case": "vit", "engines": {}, "peak_multiply_adds_per_s": 473.0e9, "versions": {"torch": "2.12"},
         "commit": "def", "read_13MiB_bytes_per_s": 12.4e9},
    ]  # fmt: skip
    (tmp_path / "peers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = with_tables(marked("peers each=engines columns=case,name:engine,ratio,of_limit_pct"), tmp_path)
    assert [line for line in text.splitlines() if line.startswith("| fc")] == [
        "| fc | ours | 1.00 (1.00–1.00) | 129.5 |", "| fc | torch | 2.04 (1.50–3.25) | 129.5 |",
    ]  # fmt: skip
    assert "471 G multiply-adds/s at most · torch 2.11, numpy 2 · commit abc\n" in text
    text = with_tables(marked("peers columns=case"), tmp_path)
    limits = "471–473 G multiply-adds/s at most · 12 GB/s read at most"
    assert f"{limits} · torch 2.11 and 2.12, numpy 2 · commit abc, def\n" in text


def test_a_second_time_changes_nothing(results):
    once = with_tables(marked("cifar10/vit") + marked("latency/networks"), results)
    assert with_tables(once, results) == once


@pytest.mark.parametrize("text, message", [
    (marked("cifar10/gone"), "gone.jsonl, which is not there"),
    (marked("cifar10/vit rows=float"), "not 'rows=float'"),
    (marked("cifar10/vit only=nothing"), "would be empty"),
    (marked("cifar10/vit only="), "not 'only='"),
    (marked("latency/networks columns=speed"), "no line has the field 'speed'"),
    (marked("cifar10/vit across=float,qat_alll"), "no line is of the row 'qat_alll'"),
    (marked("cifar10/vit,cifar10/gone across=float"), "gone.jsonl, which is not there"),
    ("<!-- table:cifar10/vit -->\n", "needs a line <!-- /table -->"),
    ("<!-- table:cifar10/vit -->\n" + marked("cifar10/vit"), "before the next one"),
])  # fmt: skip
def test_what_cannot_be(results, text, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message.replace("-", r"\-")):
        with_tables(text, results)


def test_the_command(results, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(marked("cifar10/vit"))
    command = ["--readme", str(readme), str(results)]
    assert main([*command, "--check"]) == 1
    assert "out of date" in capsys.readouterr().err and "stale" in readme.read_text()
    assert main(command) == 0
    assert main([*command, "--check"]) == 0
    os.utime(readme, (0, 0))
    assert main(command) == 0 and readme.stat().st_mtime == 0, "it is as it should be, and not written again"
    readme.write_text(readme.read_text().replace("79.00%", "79.50%"))
    assert main([*command, "--check"]) == 1
    readme.write_text(marked("gone"))
    assert main(command) == 2
    assert main(["--readme", str(tmp_path / "none.md"), str(results)]) == 2


def test_chosen_columns_of_experiments_over_seeds(results):
    with (results / "cifar10/vit.jsonl").open("a") as file:
        file.write(json.dumps(EXPERIMENTS[0] | {"seed": 1, "test_accuracy_pct": 81.123}) + "\n")
    text = with_tables(marked("cifar10/vit only=float columns=test_accuracy,file"), results)
    assert "| row | test accuracy | file |\n| --- | ---: | ---: |\n| `float` | 80.62% ± 0.71% | 1.00 MB |\n" in text


def test_agreement_in_float64_is_shown_where_it_is_asked_for(tmp_path):
    row = EXPERIMENTS[0] | {"reload_agreement_pct": 99.64, "reload_agreement_float64_pct": 99.998}
    (tmp_path / "vit.jsonl").write_text(json.dumps(row) + "\n")
    text = markdown("vit", "columns=same_class,same_in_float64", tmp_path)
    assert text.startswith("| row | same class | same in float64 |\n") and "| `float` | 99.64% | 100.00% |" in text
    assert "float64" not in markdown("vit", "", tmp_path)


def test_accuracies_of_several_files_a_line_for_each_network(results):
    other = EXPERIMENTS[0] | {"dataset": "cifar100", "budget": 1, "options": {}, "test_accuracy_pct": 50.0}
    seeds = [EXPERIMENTS[0] | {"seed": 1, "test_accuracy_pct": 81.123}, other]
    (results / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in seeds))
    assert markdown("cifar10/vit,more", "across=qat_all,float", results) == (
        "| model | data set | budget | `qat_all` | `float` |\n"
        "| --- | --- | ---: | ---: | ---: |\n"
        "| `vit` depth=2 | cifar10 | 0.02 | 79.00% | 80.62% ± 0.71% |\n"
        "| `vit` | cifar100 | 1 | – | 50.00% |\n"
    )


def test_options_given_in_another_order_are_the_same_network(results):
    two = [EXPERIMENTS[0] | {"row": name, "options": o} for name, o in
           (("float", {"depth": 4, "width": 9}), ("qat_all", {"width": 9, "depth": 4}))]  # fmt: skip
    (results / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in two))
    text = markdown("two", "across=float,qat_all", results)
    assert len(text.splitlines()) == 3 and "| `vit` depth=4 width=9 |" in text


def test_any_columns_of_experiments_still_say_under_which_conditions(results):
    text = markdown("cifar10/vit", "columns=row,test_accuracy_pct", results)
    assert "reduced budget" in text and "budget 0.02 · seeds 0 · options depth=2 · device" in text


@pytest.mark.parametrize("options", ["last=modle", "columns=held-out_accuracy,file"])
def test_fields_and_columns_that_are_not_there(options, results):
    with pytest.raises(ValueError, match="no line has the field 'modle'|no column 'held-out_accuracy'"):
        markdown("cifar10/vit", options, results)
