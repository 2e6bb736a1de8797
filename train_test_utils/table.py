"""From rows to the lines of a table: repetitions replaced by the latest, seeds averaged, values with their units."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

NOTHING = "–"
SCORES = ("random", "l1_global", "l1", "l2_filters")  # in names of rows, for those without a `pruned` text


@dataclass(frozen=True)
class Line:
    """One line of a table: the rows of all seeds that share model, data set, options, budget, precision and name."""

    rows: tuple[Mapping[str, Any], ...]
    conditions: str = ""  # budget, options and precision, where the lines beside it have others

    @property
    def name(self) -> str:
        return str(self.rows[-1].get("row", "?"))

    @property
    def label(self) -> str:
        """The name, told apart from the same row under other conditions."""
        return f"{self.name} ({self.conditions})" if self.conditions else self.name

    @property
    def seeds(self) -> tuple[Any, ...]:
        return tuple(row.get("seed") for row in self.rows)

    @property
    def budget(self) -> float:
        return float(self.rows[-1].get("budget") or 1)

    @property
    def is_reduced(self) -> bool:
        """Whether it was trained for less than its full recipe."""
        return self.budget < 1

    def text(self, field: str) -> str:
        """A field of the last seed's row as text; empty if it has none."""
        return str(self.rows[-1].get(field) or "")

    def values(self, field: str) -> list[float]:
        """The seeds' values of a field, or of a quotient of two fields ("float_file_bytes/file_bytes")."""
        above, _, below = field.partition("/")
        found = []
        for row in self.rows:
            a, b = row.get(above), row.get(below) if below else 1
            if _is_number(a) and _is_number(b) and b:
                found.append(a / b if below else a)
        return found

    def mean(self, field: str) -> float | None:
        """Mean over the seeds that have the field (or quotient, as in `values`); None if none has."""
        values = self.values(field)
        return statistics.fmean(values) if values else None

    def std(self, field: str) -> float | None:
        """Sample standard deviation over the seeds; None for fewer than two."""
        values = self.values(field)
        return statistics.stdev(values) if len(values) > 1 else None

    @property
    def pruning(self) -> tuple[str, str, float] | None:
        """(quantization, score, percent) of a line pruned once, as ("qat_all", "l1", 30.0); None for all others."""
        match = re.fullmatch(r"([\d.]+)% of [^;]* by (\w+)", self.text("pruned"))
        if match:
            percent, score = float(match[1]), match[2]
            return self.name.replace(f"_{score}_{percent:g}", ""), score, percent
        match = re.fullmatch(rf"(.+?)_({'|'.join(SCORES)})_(\d+)", self.name)
        return (match[1], match[2], float(match[3])) if match else None

    @property
    def is_pruned(self) -> bool:
        return bool(self.text("pruned")) or self.pruning is not None


def lines_of(rows: Sequence[Mapping[str, Any]]) -> list[Line]:
    """The lines of a table, in the order of first appearance.

    Of rows done twice with a seed, the later counts. Of a row whose recipe was edited (another `line_hash`), only the
    recipe that was done last is shown: a mean over seeds of two recipes would mean nothing.
    """
    latest: dict[tuple[str, ...], dict[Any, dict[Any, Mapping[str, Any]]]] = {}  # key -> recipe (latest last) -> seed
    for row in rows:
        recipes, recipe = latest.setdefault(_key(row), {}), row.get("line_hash")
        recipes[recipe] = recipes.pop(recipe, {}) | {row.get("seed"): row}
    lines = [Line(tuple(list(recipes.values())[-1].values())) for recipes in latest.values()]
    fields = ("budget", "options", "precision")
    several = [field for field in fields if len({_json(line.rows[-1].get(field)) for line in lines}) > 1]
    return [replace(line, conditions=_conditions(line.rows[-1], several)) for line in lines]


def _conditions(row: Mapping[str, Any], fields: Iterable[str]) -> str:
    texts = [f"budget {row.get('budget') or 1:g}" if f == "budget" else plain(row.get(f) or "") for f in fields]
    return ", ".join(text for text in texts if text)


def float_line(lines: Sequence[Line], like: Line) -> Line | None:
    """The unchanged float model of the same model, data set, options, budget and precision as `like`."""
    same = _key(like.rows[-1])[:-1]
    return next((line for line in lines if line.name == "float" and _key(line.rows[-1])[:-1] == same), None)


def _key(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(_json(row.get(k)) for k in ("model", "dataset", "options", "budget", "precision", "row"))


def _json(value: Any) -> str:
    """The same text for options in whatever order they were given."""
    return json.dumps(value, sort_keys=True)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# Values as text


@dataclass(frozen=True)
class Column:
    """A column: its title, what it means, the number it sorts by, and how that is written."""

    title: str
    meaning: str
    field: str
    write: Callable[[float], str]
    with_std: bool = False

    def cell(self, line: Line) -> str:
        mean, std = line.mean(self.field), line.std(self.field)
        if mean is None:
            return NOTHING
        return f"{self.write(mean)} ± {self.write(std)}" if self.with_std and std is not None else self.write(mean)


def significant(value: float) -> str:
    """Plain decimal notation with three significant digits, thousands separated: 0.123, 12.3, 1,230."""
    if value == 0:
        return "0"
    rounded = float(f"{value:.2e}")
    decimals = 2 - math.floor(math.log10(abs(rounded)))
    return f"{rounded:,.{max(decimals, 0)}f}"


def megabytes(size: float) -> str:
    """MB = 10^6 bytes; kB below a tenth of that."""
    return f"{significant(size / 1e6)} MB" if size >= 1e5 else f"{significant(size / 1e3)} kB"


COLUMNS = (
    Column("test accuracy", "share of all test images, measured on the model reloaded from its "
                            "file", "test_accuracy_pct",
           lambda v: f"{v:.2f}%", with_std=True),
    Column("file", "bytes on disk, 1 MB = 10⁶ bytes", "file_bytes", megabytes),
    Column("smaller", "float file / this file", "float_file_bytes/file_bytes", lambda v: f"{significant(v)}×"),
    Column("zeros", "share of the trained network's weights, those of filters that its file has no more "
                    "too", "zero_fraction", lambda v: f"{100 * v:.1f}%"),
    Column("latency", "one image, median", "latency_ms_p50_batch1", lambda v: f"{significant(v)} ms"),
    Column("faster", "float latency / this latency, measured in turns in one run",
           "float_latency_ms_p50_batch1/latency_ms_p50_batch1", lambda v: f"{significant(v)}×"),
    Column("images/s", "large batch", "throughput_images_per_s", significant),
    Column("same class", "test images on which the reloaded file and the trainable model agree", "reload_agreement_pct",
           lambda v: f"{v:.2f}%"),
)  # fmt: skip

HELD_OUT = replace(COLUMNS[0], title="held-out accuracy", meaning="share of images kept out of the training split")
IN_FLOAT64 = replace(
    COLUMNS[-1], title="same in float64", meaning="same class, if both decide in float64 where they differ",
    field="reload_agreement_float64_pct",
)  # fmt: skip


def columns_of(lines: Sequence[Line]) -> tuple[Column, ...]:
    """The columns of a table; lines that `--holdout` made say that they never saw the test split."""
    return (HELD_OUT if all("-heldout" in line.text("dataset") for line in lines) else COLUMNS[0], *COLUMNS[1:])


def circumstances(lines: Sequence[Line]) -> dict[str, str]:
    """What all figures of a table depend on: {"budget": "0.02", "seeds": "0, 1", …}; without what is unknown."""
    rows = [row for line in lines for row in line.rows]

    def distinct(*fields: str) -> list[str]:
        values = [row.get(field) for row in rows for field in fields]
        texts = {_json(value): plain(value) for value in values if value not in (None, "", {})}
        return list(dict.fromkeys(texts.values()))

    device, timed_on = distinct("device"), distinct("latency_device")
    found = {
        "budget": distinct("budget"), "seeds": distinct("seed"), "device": device,
        **{field: distinct(field) for field in ("threads", "backend", "precision")},
        "commit": distinct("commit", "latency_commit"), "options": distinct("options"),
        "latency on": [] if set(timed_on) <= set(device) else timed_on,
    }  # fmt: skip
    return {name: ", ".join(values) for name, values in found.items() if values}


def plain(value: Any) -> str:
    """A field's value as one writes it by hand; a mapping as on the command line, by name: depth=4 width=128."""
    if isinstance(value, Mapping):
        return " ".join(f"{k}={plain(v)}" for k, v in sorted(value.items()))
    return f"{value:g}" if isinstance(value, float) else str(value)
