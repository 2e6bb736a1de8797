"""The table for the terminal, the page and its pictures, from whole tables and from almost nothing."""

import json
import re

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from train_test_utils.report import format_table, plots, print_table, write_report
from train_test_utils.report.__main__ import main
from train_test_utils.report.page import headline_line, page
from train_test_utils.report.plots import (
    _size_axis,
    draw_all,
    draw_curves,
    draw_latency,
    draw_pruning,
    draw_size,
    spread,
)
from train_test_utils.row_folder import claim
from train_test_utils.table import lines_of


def rows(seeds=(0, 1), budget=0.02):
    figures = {
        "float": (90.0, 44_800_000, 32),
        "ptq_all": (60.0, 2_350_000, 1.585),
        "qat_all": (89.0, 2_360_000, 1.585),
    }
    figures |= {
        f"qat_all_{s}_{p}": (89 - p / 10, 2_000_000 - 9000 * p, 1.585) for s in ("l1", "random") for p in (30, 90)
    }
    return [
        {
            "model": "resnet_18", "dataset": "digits", "row": name, "seed": seed, "budget": budget, "weight_bits": bits,
            "test_accuracy_pct": accuracy + seed, "file_bytes": size, "float_file_bytes": 44_800_000,
            "zero_fraction": 0.33,
            "latency_ms_p50_batch1": 2.0, "latency_ms_p90_batch1": 2.5, "float_latency_ms_p50_batch1": 5.0,
            "device": "a <fast> CPU", "threads": 2, "command": "python3 resnet_18_experiments.py --out '<fast>'",
        }
        for seed in seeds
        for name, (accuracy, size, bits) in figures.items()
    ]  # fmt: skip


def test_the_terminal_table(capsys):
    print_table(rows())
    text = capsys.readouterr().out
    (line,) = [line for line in text.splitlines() if line.startswith("qat_all ")]
    assert re.split(r"\s{2,}", line) == [
        "qat_all",
        "89.50% ± 0.71%",
        "2.36 MB",
        "19.0×",
        "33.0%",
        "2.00 ms",
        "2.50×",
        "–",
    ]
    assert "resnet_18 on digits" in text and "budget 0.02" in text and "seeds 0, 1" in text
    assert "less than the full recipes" in text


def test_a_full_budget_is_not_called_reduced_and_budgets_are_told_apart():
    assert "less than" not in format_table(rows(budget=1.0))
    both = format_table(rows(budget=1.0) + rows())
    assert "qat_all (budget 1)" in both and "qat_all (budget 0.02)" in both


def test_the_report_of_a_whole_table(tmp_path):
    (tmp_path / "qat_all-seed0").mkdir()
    curves = [{"epoch": e, "train_loss": 1 / e, "train_accuracy_pct": 50 + e} for e in (1, 2, 3)]
    (tmp_path / "qat_all-seed0" / "curves.jsonl").write_text("".join(json.dumps(c) + "\n" for c in curves))
    paths = write_report(rows(), tmp_path)
    names = ["report.html", "accuracy_vs_size.png", "accuracy_vs_pruned.png", "latency.png", "training_curves.png"]
    assert [p.name for p in paths] == names
    for path in paths[1:]:
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
    page = paths[0].read_text()
    assert page.count("data:image/png;base64,") == 4
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)  # self-contained
    assert "a &lt;fast&gt; CPU" in page and "<fast>" not in page
    assert "89.50%" in page and "float 90.50% (−1.00 points)" in page and "19.0× smaller" in page
    assert "Every weight at 1.58 bits: <b>qat_all</b>" in page
    assert re.findall(r'class="badge warn">([^<]*)', page) == ["budget 0.02 of the full recipe’s steps"]
    assert "Each mark is a saved file" in page and "<b>file</b>: bytes on disk" in page
    (size,) = re.findall(r'<td data-v="([^"]*)">2\.35 MB</td>', page)
    assert float(size) == 2_350_000, "columns are sorted by numbers"
    assert page.count("<tr>") == 1 + 7


@pytest.mark.parametrize(
    "few", [[], [{"row": "x"}], [{"row": "qat_all", "test_accuracy_pct": 0.0, "file_bytes": 100, "model": "vit"}]]
)
def test_almost_nothing_is_enough(tmp_path, few):
    paths = write_report(few, tmp_path / "new")
    assert paths[0].read_text().startswith("<!doctype html>")
    format_table(few)


def test_curves_are_those_of_the_first_seed(tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr(plots, "draw_all", lambda lines, curves, folder: taken.extend(curves) or [])
    (tmp_path / "qat_all-seed3").mkdir()
    (tmp_path / "qat_all-seed3" / "curves.jsonl").write_text('{"epoch": 1, "train_loss": 1.0}\n')
    write_report([{"row": "qat_all", "seed": seed} for seed in (3, 4)], tmp_path)
    assert taken == [[{"epoch": 1, "train_loss": 1.0}]]


def test_each_budget_has_its_own_curve(tmp_path, figures, monkeypatch):
    """The results of the earlier one were moved aside by the later one."""
    both = [row | {"config_hash": str(row["budget"])} for b in (0.02, 1.0) for row in rows((0,), b)[:1]]
    for row in both:
        folder = tmp_path / "float-seed0"
        claim(folder, row["config_hash"])
        (folder / "curves.jsonl").write_text(json.dumps({"epoch": 1, "train_loss": row["budget"]}) + "\n")
    monkeypatch.setattr("train_test_utils.report.page.page", lambda lines, pictures: "")
    write_report(both, tmp_path)
    (axes,) = figures["training_curves"].axes
    assert points(axes) == [((1,), (0.02,)), ((1,), (1.0,))]
    assert {text.get_text() for text in axes.texts} == {"float (budget 0.02)", "float (budget 1)"}


def test_notes_below_the_terminal_table_are_as_wide_as_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = format_table([row | {"device": "D" * 60, "commit": "C" * 60} for row in rows()])
    assert text.split("─\n")[-1].split("\n") == [
        f"budget 0.02 · seeds 0, 1 · device {'D' * 60}", f"threads 2 · commit {'C' * 60}",
        "trained for less than the full recipes (budget below 1)",
    ]  # fmt: skip


def test_the_page_says_what_was_done_and_when_and_what_is_unknown():
    done = {"epochs": 30, "transforms": ["T"], "pruned": "", "throughput_images_per_s": None}
    some = [row | done | {"finished_at": f"2026-01-0{3 - row['seed']}T10:00:00Z"} for row in rows(budget=0.5)]
    html = page(lines_of(some), [])
    assert html.count('<td class="what">T; trained for 15 epochs</td>') == 7
    assert "(2026-01-02 to 2026-01-03)" in html and "(2026-01-03)" in page(lines_of(some[:7]), [])
    assert html.count('<td data-v="">–</td>') == 2 * 7  # images/s, same class
    assert "<b>2.00 ms</b><span>one image, 2.50× the speed of float beside it" in html


def test_the_page_explains_deviations_where_a_row_has_one():
    explained = "± is the standard deviation over seeds"
    assert explained in page(lines_of(rows()[:8]), [])  # of the float row there are two seeds
    assert explained not in page(lines_of(rows(seeds=(0,))), [])


def test_a_pruned_row_is_not_the_headline():
    *_, pruned = lines = lines_of(rows(seeds=(0,)))
    assert headline_line([pruned, lines[1]]) is lines[1] and headline_line([pruned]) is None


def test_without_a_row_of_the_plain_names_the_headline_is_the_first_that_is_all_ternary():
    bits = {"unknown": None, "float": 32, "qat_all_8bit_ends": 1.6, "qat_all_calibrated": 1.585, "ptq_all_twn": 1.585}
    found = headline_line(lines_of([{"row": name, "weight_bits": bits[name]} for name in bits]))
    assert found is not None and found.name == "qat_all_calibrated"


def test_rows_have_the_colour_that_the_page_explains():
    html = page(lines_of([*rows(), {"row": "float_finetuned"}]), [])
    marks = re.findall(r'class="mark" style="background:(.*?)"></span>([\w ]+)', html)
    colours = {text.strip(): colour for colour, text in marks}
    told = ("float", "ternary after training", "ternary during training", "other")
    made = ("float", "ptq_all", "qat_all", "float_finetuned")
    assert [colours[name] for name in made] == [colours[name] for name in told] and len(set(colours.values())) == 4


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, by the names of their files."""
    found = {}
    monkeypatch.setattr(Figure, "savefig", lambda self, path: found.update({path.stem: self}))
    return found


def points(axes):
    return [tuple(map(tuple, line.get_data())) for line in axes.lines]


def test_pruning_curves_start_from_the_row_that_is_not_pruned(figures, tmp_path):
    draw_pruning(lines_of(rows()[::-1]), tmp_path)
    (axes,) = figures["accuracy_vs_pruned"].axes
    assert points(axes)[:2] == [((0, 30, 90), (89.5, 86.5, 80.5))] * 2  # l1, random
    deviations = [(high - low) / 2 for (_, low), (_, high) in axes.containers[0].lines[2][0].get_segments()]
    assert deviations == pytest.approx([0, 0.5**0.5, 0.5**0.5])
    assert {(text.get_text(), text.xy) for text in axes.texts} == {("l1", (90, 80.5)), ("random", (90, 80.5))}


def test_a_pruned_row_of_another_name_is_no_start_and_each_score_has_its_colour(figures, tmp_path):
    pruned = [{"row": f"mine {s}", "pruned": f"50% of filters of all layers by {s}", "test_accuracy_pct": 80.0 + i}
              for i, s in enumerate(("l1_global", "taylor", "fisher"))]  # fmt: skip
    draw_pruning(lines_of(pruned), tmp_path)
    drawn = [axes.lines for axes in figures["accuracy_vs_pruned"].axes]
    assert len({axes.get_ylim() for axes in figures["accuracy_vs_pruned"].axes}) == 1, "panels can be compared"
    assert [[tuple(line.get_xdata()) for line in lines] for lines in drawn] == [[(50,)]] * 3
    assert len({(line.get_color(), line.get_marker()) for (line,) in drawn}) == 3


def test_latencies_are_drawn_beside_the_float_models(figures, tmp_path):
    draw_latency(lines_of(rows()[1:2]), tmp_path)
    (axes,) = figures["latency"].axes
    assert points(axes) == [((2, 5), (0, 0)), ((5,), (0,)), ((2, 2.5), (0, 0)), ((2,), (0,))]
    assert [text.get_text() for text in axes.texts] == ["2.00 ms   2.50×"]
    assert axes.get_xlim()[0] == 0 and axes.yaxis_inverted(), "times have a common zero, and the first row is on top"


def test_a_speed_of_several_seeds_is_the_tables(figures, tmp_path):
    times = [{"float_latency_ms_p50_batch1": 10.0, "latency_ms_p50_batch1": own} for own in (1.0, 10.0)]
    lines = lines_of([rows()[1] | {"seed": seed} | time for seed, time in enumerate(times)])
    draw_latency(lines, tmp_path)
    assert [text.get_text() for text in figures["latency"].axes[0].texts] == ["5.50 ms   5.50×"]
    assert "5.50×" in format_table([row for line in lines for row in line.rows])


@pytest.mark.parametrize("plain, pruned, caption", [
    (1, 23, " it. a slow CPU, 2 threads."), (1, 24, " 24 pruned rows are left out."),
    (0, 26, " 2 pruned rows are left out."),
])  # fmt: skip
def test_the_latency_picture_says_where_and_how_many_rows_it_leaves_out(plain, pruned, caption, figures, tmp_path):
    one = rows()[0] | {"latency_device": "a slow CPU"}
    lines = lines_of([one] * plain + [one | {"row": f"float_l1_{percent}"} for percent in range(pruned)])
    assert draw_latency(lines, tmp_path).caption.endswith(caption)


def test_training_curves_have_a_panel_each_for_loss_and_accuracy(figures, tmp_path):
    curves = [[{"epoch": e, "train_loss": 1 / e, "train_accuracy_pct": 50 + e} for e in (1, 2, 4)]]
    draw_curves(lines_of([{"row": "qat_all"}, {"row": "qat_all_l1_30"}]), curves * 2, tmp_path)
    loss, accuracy = figures["training_curves"].axes
    assert points(loss) == [((1, 2, 4), (1, 0.5, 0.25))] * 2 and points(accuracy) == [((1, 2, 4), (51, 52, 54))] * 2
    assert [text.get_text() for text in loss.texts] == ["qat_all"], "of pruned rows there are too many"


def test_low_accuracies_and_all_sizes_are_inside_the_picture(figures, tmp_path):
    draw_size(lines_of([row | {"test_accuracy_pct": row["test_accuracy_pct"] - 60} for row in rows()]), tmp_path)
    (axes,) = figures["accuracy_vs_size"].axes
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    assert left < 1_190_000 < 44_800_000 < right and -2 <= bottom < 0.5 < 30.5 < top


def test_a_mark_is_at_size_and_accuracy_and_without_a_name_and_hollow_if_pruned(figures, tmp_path):
    lines = lines_of(rows())[::-1]
    assert "Dashed: the float model." in draw_size(lines, tmp_path).caption
    (axes,) = figures["accuracy_vs_size"].axes
    marks = [container.lines[0] for container in axes.containers]
    places = [(mark.get_xdata()[0], mark.get_ydata()[0]) for mark in marks]
    assert places == [(line.mean("file_bytes"), line.mean("test_accuracy_pct")) for line in lines]
    assert [mark.get_markerfacecolor() == "white" for mark in marks] == [line.is_pruned for line in lines]
    assert all(container.has_yerr for container in axes.containers), "of two seeds there is a deviation"
    assert {text.get_text() for text in axes.texts} == {"float", "ptq_all", "qat_all"}
    assert [y for x, y in points(axes) if x == (0, 1)] == [(90.5, 90.5)], "the float model, from side to side"
    assert axes.get_xscale() == "log"
    two = draw_size(lines_of(rows() + rows(budget=1.0)), tmp_path)
    assert "Dashed" not in two.caption, "there are two float models"


def test_accuracies_that_are_next_to_equal_are_drawn_so(figures, tmp_path):
    near = [rows()[0] | {"row": name, "test_accuracy_pct": y} for name, y in (("float", 90.0), ("qat_all", 90.01))]
    draw_size(lines_of(near), tmp_path)
    low, high = figures["accuracy_vs_size"].axes[0].get_ylim()
    assert high - low > 1


@pytest.mark.parametrize("budget, said", [(0.02, " · budget 0.02"), (1.0, "")])
def test_a_picture_is_headed_by_what_it_is_about(budget, said, figures, tmp_path):
    draw_latency(lines_of(rows(budget=budget)[:1]), tmp_path)
    assert figures["latency"].get_suptitle() == f"Latency, one image · resnet_18 on digits{said}"


def test_the_page_can_be_written_again_from_the_command_line(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows()))
    assert main([str(tmp_path)]) == 0
    assert (tmp_path / "report.html").exists() and "qat_all" in capsys.readouterr().out
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "has no rows" in capsys.readouterr().err


@pytest.mark.parametrize("wanted, low, high, expected", [
    ([1.0, 5.0, 9.0], 0, 10, [1, 5, 9]), ([5.0, 5.0, 5.0], 0, 10, [4, 5, 6]), ([9.9, 9.9, 9.9], 0, 10, [8, 9, 10]),
    ([0.0, 0.0, 7.0], 0, 10, [0, 1, 7]), ([0.0] * 3, 0, 1, [0, 1, 2]), ([], 0, 1, []),
])  # fmt: skip
def test_labels_are_moved_apart_and_no_further(wanted, low, high, expected):
    assert spread(wanted, 1.0, low, high) == pytest.approx(expected)


def test_what_is_shown_first_is_of_the_largest_budget(tmp_path):
    full = [row | {"test_accuracy_pct": row["test_accuracy_pct"] + 2} for row in rows(budget=1.0)]
    lines = lines_of([*rows(budget=0.02), *full])
    assert headline_line(lines).label == "qat_all (budget 1)"
    text = page(lines, [])
    assert "float 92.50% (−1.00 points)" in text
    assert "<b>qat_all (budget 1)</b>" in text and 'qat_all <span class="badge">budget 0.02</span>' in text


def test_pruned_rows_of_two_budgets_are_two_curves(figures, tmp_path):
    full = [row | {"test_accuracy_pct": row["test_accuracy_pct"] + 2} for row in rows(budget=1.0)]
    draw_pruning(lines_of([*rows(budget=0.02), *full]), tmp_path)
    panels = figures["accuracy_vs_pruned"].axes
    assert [axes.get_title("left") for axes in panels] == ["qat_all\nbudget 0.02", "qat_all\nbudget 1"]
    assert [points(axes)[0] for axes in panels] == [((0, 30, 90), (y, y - 3, y - 9)) for y in (89.5, 91.5)]


def test_names_that_are_no_text(tmp_path):
    strange = [row | {"dataset": "b\udce4r", "command": "python3 x.py --out b\udce4r"} for row in rows()]
    report, *pictures = write_report(strange, tmp_path)
    assert "b?r" in report.read_text() and pictures


def test_names_with_a_dollar_are_no_formula(tmp_path):
    row = {"row": "float", "model": "vit", "dataset": r"x$\foo$", "test_accuracy_pct": 9.5, "file_bytes": 10**6}
    assert len(write_report([row], tmp_path)) > 1


def test_held_out_figures_are_not_called_test_accuracy(tmp_path, monkeypatch):
    held_out = lines_of([row | {"dataset": "digits-heldout0.1"} for row in rows()])
    assert "held-out accuracy; float" in page(held_out, []) and "test accuracy" not in page(held_out, [])
    titles = []
    monkeypatch.setattr(Axes, "set_ylabel", lambda axes, label, *_, **__: titles.append(label))
    draw_all(held_out, [[]] * len(held_out), tmp_path)
    assert titles and not [title for title in titles if "test" in title]


@pytest.mark.parametrize("size, ticks", [
    (9e4, ["50 kB", "0.1 MB"]), (2.1e6, ["2 MB"]), (31e6, ["20 MB", "50 MB"]), (44_760_208, ["50 MB"]),
])  # fmt: skip
def test_an_axis_of_one_size_has_a_tick(size, ticks):
    axes = Figure().subplots()
    axes.set_xscale("log")
    _size_axis(axes, [size])
    assert axes.xaxis.get_major_formatter().format_ticks(axes.get_xticks()) == ticks


def test_check_is_for_a_markdown_file(tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(["--check", str(tmp_path)])
    assert stop.value.code == 2 and list(tmp_path.iterdir()) == []


def test_texts_of_both_sides_do_not_meet(figures, tmp_path):
    """A mark on the left, with its name on the right, and one on the right, with its name on the left, equally high."""
    files = {"ptq_all_corrected_8bit_acts": 2_000_000, "qat_" + 40 * "x": 3_000_000}
    pair = [{"row": name, "test_accuracy_pct": 90.0, "file_bytes": size} for name, size in files.items()]
    draw_size(lines_of(pair), tmp_path)
    (axes,) = figures["accuracy_vs_size"].axes
    axes.figure.draw_without_rendering()
    one, other = (text.get_window_extent() for text in axes.texts)
    assert not one.overlaps(other)


def test_epochs_are_whole_numbers_also_where_there_is_one(figures, tmp_path):
    curve = [{"epoch": 1, "train_loss": 1.0, "train_accuracy_pct": 50.0}]
    draw_curves(lines_of([{"row": "float"}]), [curve], tmp_path)
    (axes, _) = figures["training_curves"].axes
    assert axes.lines[0].get_marker() == "D", "else a line of one point is not seen"
    low, high = axes.get_xlim()
    assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [1.0]
