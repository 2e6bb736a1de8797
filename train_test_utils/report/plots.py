"""The pictures of a report. Colours: Okabe and Ito's, told apart by colour-blind readers; shapes say the same again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from ..table import Line, columns_of, float_line, significant

INK, FAINT = "#222222", "#8a8a8a"
FAMILIES = {"float": (INK, "D"), "ptq": ("#D55E00", "s"), "qat": ("#0072B2", "o")}  # by the beginning of a row's name
OTHER = ("#009E73", "^")
SCORE_STYLES = {
    "random": (FAINT, "o"),
    "l1": ("#E69F00", "s"),
    "l2_filters": ("#0072B2", "D"),
    "l1_global": ("#009E73", "^"),
}
MORE_STYLES = (("#CC79A7", "v"), ("#56B4E9", "P"), ("#D55E00", "X"))  # of scores that have been added
LABEL_HEIGHT = 0.042  # of a line of text beside a mark, in parts of the axes
FULL_LATENCY_LINES = 24  # more than these, and pruned rows are left out of the latency picture

Curve = Sequence[Mapping[str, Any]]  # the epochs of a training


@dataclass(frozen=True)
class Picture:
    """A picture in a file, with the sentence that goes with it."""

    path: Path
    title: str
    caption: str


def draw_all(lines: Sequence[Line], curves: Sequence[Curve], folder: Path) -> list[Picture]:
    """Draw what there are data for; `curves`: of each line, empty where it has none."""
    drawn = [
        draw_size(lines, folder),
        draw_pruning(lines, folder),
        draw_latency(lines, folder),
        draw_curves(lines, curves, folder),
    ]
    return [picture for picture in drawn if picture is not None]


def draw_size(lines: Sequence[Line], folder: Path) -> Picture | None:
    """Accuracy against file size."""
    points = [p for p in lines if p.mean("file_bytes") and p.mean("test_accuracy_pct") is not None]
    if not points:
        return None
    figure, (axes,) = _figure(8.4, 5.0)
    axes.set_xscale("log")
    labels = []
    for line in points:
        x, y = line.mean("file_bytes") or 0.0, line.mean("test_accuracy_pct") or 0.0
        colour, marker = family(line.name)
        pruned = line.is_pruned
        axes.errorbar(x, y, line.std("test_accuracy_pct"), color=colour, marker=marker, markersize=4.5 if pruned else 8,
                      markerfacecolor="white" if pruned else colour, alpha=0.75 if pruned else 1, linestyle="",
                      zorder=3)  # fmt: skip
        if not pruned:
            labels.append((x, y, line.label, colour))
    _size_axis(axes, [p.mean("file_bytes") or 0.0 for p in points])
    axes.margins(y=0.1)
    _accuracy_axis(axes, _accuracy_of(lines))
    reference = float_line(points, points[0]) if len({p.conditions for p in points}) == 1 else None
    if reference is not None:
        axes.axhline(
            reference.mean("test_accuracy_pct") or 0.0, color=FAINT, linewidth=0.8, linestyle=(0, (4, 4)), zorder=1
        )
    _label(axes, labels)
    dashed = " Dashed: the float model." if reference is not None else ""
    hollow = " Small hollow marks: pruned rows." if any(p.is_pruned for p in points) else ""
    return _save(figure, lines, folder / "accuracy_vs_size.png", "Accuracy against file size",
                 "Each mark is a saved file, reloaded and measured; better is up and "
                 f"left.{dashed}{hollow}")  # fmt: skip


def draw_pruning(lines: Sequence[Line], folder: Path) -> Picture | None:
    """Accuracy against the pruned share: a panel for each quantization, a curve for each score."""
    groups: dict[tuple[str, str], dict[str, list[Line]]] = {}  # quantization, conditions -> score -> lines
    for line in lines:
        if line.pruning is not None and line.mean("test_accuracy_pct") is not None:
            base, score, _ = line.pruning
            groups.setdefault((base, line.conditions), {}).setdefault(score, []).append(line)
    if not groups:
        return None
    scores = dict.fromkeys(score for by_score in groups.values() for score in by_score)
    styles = SCORE_STYLES | dict(zip([s for s in scores if s not in SCORE_STYLES], cycle(MORE_STYLES), strict=False))
    figure, panels = _figure(1.2 + 3.9 * len(groups), 4.2, len(groups))
    for axes, ((base, conditions), by_score) in zip(panels, groups.items(), strict=True):
        unpruned = (p for p in lines if not p.is_pruned)
        start = next((p for p in unpruned if (p.name, p.conditions) == (base, conditions)), None)
        start_y = start.mean("test_accuracy_pct") if start else None
        for score, members in by_score.items():
            colour, marker = styles[score]
            points = sorted((line.pruning[2], line.mean("test_accuracy_pct"), line.std("test_accuracy_pct") or 0.0)
                            for line in members if line.pruning)  # fmt: skip
            if start_y is not None:
                points.insert(0, (0.0, start_y, 0.0))
            xs, ys, errors = zip(*points, strict=True)
            axes.errorbar(
                xs, ys, errors if any(errors) else None, color=colour, marker=marker, markersize=5, linewidth=1.6
            )
        if start_y is not None:
            axes.plot(0, start_y, marker=family(base)[1], color=family(base)[0], markersize=8, zorder=4)
        title = f"{base}\n{conditions}" if conditions else base
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=family(base)[0])
        axes.set_xlabel("pruned (%)")
        axes.set_xlim(-4, 100)
        _accuracy_axis(axes, "" if axes is not panels[0] else _accuracy_of(lines))
    _same_limits(panels)
    for axes, by_score in zip(panels, groups.values(), strict=True):
        _end_labels(axes, [_end(score, members, styles[score][0]) for score, members in by_score.items()])
    return _save(figure, lines, folder / "accuracy_vs_pruned.png", "Accuracy against what is pruned",
                 "Share of the chosen layers' weights, or of their filters where the score's name says so, that is "
                 "pruned; at 0% the same quantization without pruning, whose training may be longer.")  # fmt: skip


def draw_latency(lines: Sequence[Line], folder: Path) -> Picture | None:
    """Median latency of each row beside the float model's, measured in turns."""
    field = "latency_ms_p50_batch1"
    timed = [line for line in lines if line.mean(field)]
    if not timed:
        return None
    shown = timed
    if len(timed) > FULL_LATENCY_LINES:
        shown = [line for line in timed if not line.is_pruned] or timed[:FULL_LATENCY_LINES]
    figure, (axes,) = _figure(8.4, 1.3 + 0.34 * len(shown))
    for y, line in enumerate(shown):
        own, beside, p90 = line.mean(field) or 0.0, line.mean(f"float_{field}"), line.mean("latency_ms_p90_batch1")
        colour, marker = family(line.name)
        if beside:
            axes.plot([own, beside], [y, y], color="#d5d5d5", linewidth=2.5, zorder=1, solid_capstyle="butt")
            axes.plot(beside, y, marker="|", color=INK, markersize=13, markeredgewidth=2, zorder=2)
        if p90:
            axes.plot([own, p90], [y, y], color=colour, linewidth=1, zorder=2)
        axes.plot(own, y, marker=marker, color=colour, markersize=8, zorder=3)
        faster = line.mean(f"float_{field}/{field}")  # of several seeds the mean, as in the table
        text = f"{significant(own)} ms" + (f"   {significant(faster)}×" if faster else "")
        axes.annotate(text, (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=9, color=INK)
    axes.set_yticks(range(len(shown)), [line.label for line in shown])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("milliseconds for one image")
    left_out = f" {len(timed) - len(shown)} pruned rows are left out." if len(shown) < len(timed) else ""
    where = "; ".join(dict.fromkeys(_timed_on(line) for line in shown))
    return _save(figure, lines, folder / "latency.png", "Latency, one image",
                 "Mark: median, thin line to the 90th percentile. Black bar: the float model, measured in turns with "
                 f"it. {where}.{left_out}")  # fmt: skip


def _timed_on(line: Line) -> str:
    threads, device = line.text("threads"), line.text("latency_device") or line.text("device")
    return ", ".join(part for part in (device, f"{threads} thread{'s' * (threads != '1')}" if threads else "") if part)


def draw_curves(lines: Sequence[Line], curves: Sequence[Curve], folder: Path) -> Picture | None:
    """Training loss and accuracy by epoch."""
    fields = [f for f in ("train_loss", "train_accuracy_pct") if any(f in r for records in curves for r in records)]
    if not fields:
        return None
    figure, panels = _figure(5.2 * len(fields), 4.2, len(fields))
    for axes, field in zip(panels, fields, strict=True):
        ends = []
        for line, records in zip(lines, curves, strict=True):
            points = [(r["epoch"], r[field]) for r in records if "epoch" in r and field in r]
            if not points:
                continue
            xs, ys = zip(*points, strict=True)
            colour, marker = family(line.name)
            plain = not line.is_pruned
            axes.plot(xs, ys, color=colour, linewidth=1.8 if plain else 0.8, alpha=1 if plain else 0.45,
                      marker=marker if len(xs) == 1 else None)  # fmt: skip
            if plain:
                ends.append((xs[-1], ys[-1], line.label, colour))
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlim(min(0.5, axes.get_xlim()[0]), max(1.5, axes.get_xlim()[1]))  # around a single epoch, too
        if field == "train_loss":
            axes.set_ylabel("training loss")
        else:
            _accuracy_axis(axes, "accuracy on training batches (%)")
        _end_labels(axes, ends)
    return _save(figure, lines, folder / "training_curves.png", "Training",
                 "Of augmented images, during the epoch. Rows start from the model they descend from. Thin: pruned "
                 "rows.")  # fmt: skip


def family(name: str) -> tuple[str, str]:
    """Colour and marker of a row."""
    return FAMILIES.get(name.split("_")[0], OTHER) if not name.startswith("float_") else OTHER


def _end(score: str, members: Sequence[Line], colour: str) -> tuple[float, float, str, str]:
    x, y = max((line.pruning[2], line.mean("test_accuracy_pct") or 0.0) for line in members if line.pruning)
    return x, y, score, colour


def _figure(width: float, height: float, panels: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), dpi=160, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)  # no pyplot: no window, no state beside the figure
    grid = figure.subplots(1, panels, squeeze=False)
    for axes in grid[0]:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(FAINT)
        axes.tick_params(colors=FAINT, labelcolor=INK, labelsize=9.5)
        axes.grid(color="#ececec", linewidth=0.8)
        axes.set_axisbelow(True)
    return figure, list(grid[0])


def _accuracy_of(lines: Sequence[Line]) -> str:
    return f"{columns_of(lines)[0].title} (%)"


def _accuracy_axis(axes: Axes, label: str) -> None:
    axes.set_ylabel(label)
    low, high = axes.get_ylim()
    if high - low < 1:  # one row, or equal ones: no false precision
        low, high = low - 1, high + 1
    axes.set_ylim(max(low, -2), min(high, 101))


def _size_axis(axes: Axes, sizes: Sequence[float]) -> None:
    steps = [m * 10.0**e for e in range(2, 12) for m in (1, 2, 5)]
    low, high = min(sizes) / 2, max(sizes) * 2  # wide enough for one of the steps, which are at most 2.5 apart
    axes.set_xlim(low, high)
    axes.set_xticks([s for s in steps if low <= s <= high])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v / 1e6:g} MB" if v >= 1e5 else f"{v / 1e3:g} kB"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", which="minor", length=0)
    axes.set_xlabel("file size (logarithmic)")


def _same_limits(panels: Sequence[Axes]) -> None:
    low, high = min(a.get_ylim()[0] for a in panels), max(a.get_ylim()[1] for a in panels)
    for axes in panels:
        axes.set_ylim(low, high)


def _end_labels(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Names of curves to the right of the panel, beside their ends, moved apart where they would overlap."""
    ends = sorted(ends, key=lambda end: end[1])
    low, high = axes.get_ylim()
    places = spread([end[1] for end in ends], 0.058 * (high - low), low, high)
    for (x, y, text, colour), place in zip(ends, places, strict=True):
        _annotate(axes, text, (x, y), (1.03, place), ("axes fraction", "data"), "left", colour)


def _label(axes: Axes, labels: Sequence[tuple[float, float, str, str]]) -> None:
    """Names beside their marks: of marks about as far right, in a column beside them, moved apart vertically."""
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]
    to_fraction = axes.transData + axes.transAxes.inverted()
    columns: list[list[tuple[Any, ...]]] = []
    for x, y, text, colour in sorted(labels):
        across, up = to_fraction.transform((x, y))
        if not columns or across - columns[-1][-1][0] > 0.06:
            columns.append([])
        columns[-1].append((across, up, (x, y), text, colour))
    groups: list[tuple[float, list[tuple[Any, ...]]]] = []  # the right end of the texts, and labels where they stand
    for column in columns:
        left = max(mark[0] for mark in column) > 0.72  # there is no room on the right
        across = min(mark[0] for mark in column) - 0.04 if left else max(mark[0] for mark in column) + 0.04
        width = 0.009 * max(len(mark[3]) for mark in column)
        begin, end = (across - width, across) if left else (across, across + width)
        fits = bool(groups) and (len(groups[-1][1]) + len(column) - 1) * LABEL_HEIGHT <= 1
        if not fits or groups[-1][0] < begin:  # else texts of both would meet: they are moved apart together
            groups.append((end, []))
        placed = [(across, "right" if left else "left", *mark[1:]) for mark in column]
        groups[-1] = (max(end, groups[-1][0]), groups[-1][1] + placed)
    for _, group in groups:
        group.sort(key=lambda label: label[2])
        heights = spread([label[2] for label in group], LABEL_HEIGHT, 0.0, 1.0)
        for (across, side, _, mark, text, colour), height in zip(group, heights, strict=True):
            _annotate(axes, text, mark, (across, height), "axes fraction", side, colour)


def spread(wanted: Sequence[float], space: float, low: float, high: float) -> list[float]:
    """Positions nearest (least squares) to the ascending `wanted` `space` apart, if they fit in [low, high]."""
    blocks: list[tuple[float, int]] = []  # (mean, count) of wanted[i] - i · space, which has to ascend
    for i, y in enumerate(wanted):
        mean, count = y - i * space, 1
        while blocks and blocks[-1][0] > mean:
            before, many = blocks.pop()
            mean, count = (before * many + mean * count) / (many + count), many + count
        blocks.append((mean, count))
    flat = [mean for mean, count in blocks for _ in range(count)]
    top = high - (len(wanted) - 1) * space
    return [max(low, min(mean, top)) + i * space for i, mean in enumerate(flat)]


def _annotate(axes: Axes, text: str, mark: Any, place: Any, coordinates: Any, side: str, colour: str) -> None:
    line = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.6, "linestyle": (0, (1, 3)),
            "relpos": (1.0 if side == "right" else 0.0, 0.5),
            "shrinkA": 1, "shrinkB": 4}  # fmt: skip
    axes.annotate(text, mark, place, textcoords=coordinates, ha=side, va="center", fontsize=9, color=colour,
                  arrowprops=line,
                  annotation_clip=False, zorder=5, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5,
                                                         "alpha": 0.8})  # fmt: skip


def _save(figure: Figure, lines: Sequence[Line], path: Path, title: str, caption: str) -> Picture:
    """Write the picture, headed by what it is about, so that it can stand alone."""
    heads = dict.fromkeys(f"{line.text('model')} on {line.text('dataset')}" for line in lines if line.text("model"))
    budgets = dict.fromkeys(f"budget {line.budget:g}" for line in lines if line.is_reduced)
    heading = " · ".join([title, *heads, *budgets]).encode(errors="replace").decode()  # a folder's name may be no text
    figure.suptitle(heading, x=0.01, ha="left", fontsize=10, color=FAINT,
                    parse_math=False)  # fmt: skip  # a folder's name may have a $
    figure.savefig(path)
    return Picture(path, title, caption)
