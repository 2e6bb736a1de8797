"""Markdown tables between markers, generated from `results/`: no figure in the README is typed by hand.

    <!-- table:cifar10/resnet_18 -->            rows of experiments, from results/cifar10/resnet_18.jsonl
    <!-- /table -->

    <!-- table:latency/networks columns=model,batch,engine,p50_ms last=model,batch,engine -->      any other lines
    <!-- /table -->

Options after the name: `only=float,qat_*` (row names, as a shell matches names, in this order), `columns=` (fields,
`a.b` and `a.0` for nested ones, `field:title` with underscores for spaces; without it, all that are plain values; for
rows of experiments also titles of `table.COLUMNS` and `IN_FLOAT64`, for the mean and deviation over seeds), `last=`
(of lines that agree in these fields the last counts), `each=nodes` (a line for each member of that list or mapping,
which has its line's fields too; a mapping's key is the field `name`). Three floats are a value and its confidence
interval.

    <!-- table:cifar10/vit,cifar100/vit across=float,qat_all -->   a line for each network, a column for each row's name
    <!-- /table -->

has the accuracies of several files. Their commands, commits and devices stand below the tables of these.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..logbook import read_rows
from ..table import (
    COLUMNS,
    HELD_OUT,
    IN_FLOAT64,
    NOTHING,
    Column,
    Line,
    circumstances,
    columns_of,
    lines_of,
    plain,
    significant,
)
from .commands import commands_of

MARKED = re.compile(r"(<!-- table:(\S+)([^>]*?) -->\n).*?(<!-- /table -->)", re.DOTALL)
OPENING = "<!-- table:"
LIMITS = {"peak_multiply_adds_per_s": "G multiply-adds/s at most", "read_13MiB_bytes_per_s": "GB/s read at most"}
BESIDE = ("commit", "command", "versions", "device", "finished_at", "threads", *LIMITS)  # goes below a table


def with_tables(text: str, results: Path) -> str:
    """`text` with a fresh table between each pair of markers.

    Raises:
        FileNotFoundError: a marker names a file that is not in `results`.
        ValueError: a marker without its end, an unknown option, or nothing to show.
    """
    if [m[0].count(OPENING) for m in MARKED.finditer(text)] != [1] * text.count(OPENING):
        raise ValueError("every <!-- table:NAME --> needs a line <!-- /table --> after it, before the next one")
    return MARKED.sub(lambda m: m[1] + markdown(m[2], m[3], results) + m[4], text)


def markdown(name: str, options: str, results: Path) -> str:
    """The table `name` with its circumstances, as Markdown that ends in a newline."""
    given = _options(name, options)
    if "across" in given:
        return _networks([row for part in name.split(",") for row in _read(part, results)], given["across"])
    rows = _read(name, results)
    if "only" in given:
        groups = [[row for row in rows if _first(str(row.get("row")), given["only"]) == p] for p in given["only"]]
        rows = [row for group in groups for row in group]
    if "last" in given:
        _check_fields(rows, given["last"])
        rows = list({tuple(str(_get(row, f)) for f in given["last"]): row for row in rows}.values())
    for field in given.get("each", ()):
        rows = [{**row, **member} for row in rows for member in _members(row.get(field, ()))]
    if not rows:
        raise ValueError(f"table:{name} would be empty")
    columns = given.get("columns")
    if all("test_accuracy_pct" in row for row in rows) and TITLES.issuperset(columns or ()):
        return _experiments(rows, columns)
    return _anything(rows, columns)


def _read(name: str, results: Path) -> Sequence[Mapping[str, Any]]:
    path = results / f"{name}.jsonl"
    if not path.exists():
        raise FileNotFoundError(f"table:{name} needs {path}, which is not there")
    return read_rows(path)


def _networks(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    networks: dict[tuple[str, str, str], dict[str, Line]] = {}
    for line in lines_of(rows):
        options = plain(line.rows[-1].get("options") or {})
        network = (f"`{line.text('model')}` {options}".rstrip(), line.text("dataset"), f"{line.budget:g}")
        networks.setdefault(network, {})[line.name] = line
    if unknown := sorted(set(names).difference(*networks.values())):
        raise ValueError(f"no line is of the row {unknown[0]!r}")
    accuracy = COLUMNS[0]
    body = [
        [*network, *(accuracy.cell(lines[name]) if name in lines else NOTHING for name in names)]
        for network, lines in networks.items()
    ]
    return _table(["model", "data set", "budget", *(f"`{name}`" for name in names)], body, left=2)


def _members(field: Any) -> list[dict[str, Any]]:
    return [{"name": key} | member for key, member in field.items()] if isinstance(field, Mapping) else list(field)


def _first(name: str, patterns: Sequence[str]) -> str | None:
    """The first of the patterns that a name matches."""
    return next((pattern for pattern in patterns if fnmatchcase(name, pattern)), None)


def _experiments(rows: Sequence[Mapping[str, Any]], titles: Sequence[str] | None) -> str:
    lines = lines_of(rows)
    usual = columns_of(lines)
    known = {_name(column): column for column in (*usual, IN_FLOAT64)}
    if unknown := sorted(set(titles or ()) - set(known)):
        raise ValueError(f"these rows have no column {unknown[0]!r}: choose from {', '.join(known)}")
    columns = [known[title] for title in titles] if titles else usual
    head = ["row", *(column.title for column in columns)]
    body = [[_label(line), *(column.cell(line) for column in columns)] for line in lines]
    notes = _reduced(lines) + [f"{k} {v}" for k, v in circumstances(lines).items()]
    return _table(head, body, left=1) + _notes(notes, rows)


def _label(line: Line) -> str:
    return f"`{line.name}`" + (f" ({line.conditions})" if line.conditions else "")


def _reduced(lines: Sequence[Line]) -> list[str]:
    reduced = any(line.is_reduced for line in lines)
    return ["**reduced budget**: trained for that fraction of the full recipe's steps"] if reduced else []


def _name(column: Column) -> str:
    return column.title.replace(" ", "_")


TITLES = {_name(column) for column in (*COLUMNS, HELD_OUT, IN_FLOAT64)}


def _anything(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None) -> str:
    if columns is None:
        columns = [k for k in dict.fromkeys(k for r in rows for k in r) if k not in BESIDE and not _nested(rows, k)]
    titles = [c.partition(":")[2] or c.rpartition(".")[2] for c in columns]
    columns = [c.partition(":")[0] for c in columns]
    _check_fields(rows, columns)
    body = [[_text(_get(row, c), c) for c in columns] for row in rows]
    numbers = [all(isinstance(_get(row, c), (int, float, type(None))) for row in rows) for c in columns]
    left = next((i for i, number in enumerate(numbers) if number), len(numbers))
    notes = _circumstances(rows)
    if all("test_accuracy_pct" in row for row in rows):
        lines = lines_of(rows)
        conditions = circumstances(lines)
        named = [f"{k} {conditions[k]}" for k in ("budget", "seeds", "options") if k in conditions]
        notes = _reduced(lines) + named + notes
    return _table([title.replace("_", " ") for title in titles], body, left) + _notes(notes, rows)


def _check_fields(rows: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> None:
    missing = [field for field in fields if all(_get(row, field) is None for row in rows)]
    if missing:
        raise ValueError(f"no line has the field {missing[0]!r}")


def _circumstances(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Device, what it was measured to do at most, versions and commits."""
    beside = {field: dict.fromkeys(str(row[field]) for row in rows if row.get(field)) for field in ("device", "commit")}
    notes = {field: f"{field} {', '.join(values)}" for field, values in beside.items() if values}
    for field, unit in LIMITS.items():
        rates = sorted({f"{row[field] / 1e9:.0f}" for row in rows if row.get(field)}, key=int)
        if rates:
            notes[field] = f"{'–'.join(dict.fromkeys((rates[0], rates[-1])))} {unit}"
    versions: dict[str, dict[str, None]] = {}
    for row in rows:
        for package, version in (row.get("versions") or {}).items():
            versions.setdefault(package, {})[version] = None
    if versions:
        notes["versions"] = ", ".join(f"{package} {' and '.join(found)}" for package, found in versions.items())
    return [notes[field] for field in ("device", *LIMITS, "versions", "commit") if field in notes]


def _table(head: Sequence[str], body: Sequence[Sequence[str]], left: int) -> str:
    marks = ["---" if i < left else "---:" for i in range(len(head))]
    return "".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n" for cells in [head, marks, *body]
    )


def _notes(notes: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    command = "\n".join(commands_of(rows))
    text = "\n" + " · ".join(notes) + "\n" if notes else ""
    return text + (f"\n```\n{command}\n```\n" if command else "")


def _options(name: str, text: str) -> dict[str, list[str]]:
    given = {}
    for word in shlex.split(text):
        key, _, value = word.partition("=")
        if key not in ("columns", "only", "last", "each", "across") or not value:
            raise ValueError(f"table:{name} has the options columns=, only=, last=, each= and across=, not {word!r}")
        given[key] = value.split(",")
    return given


def _nested(rows: Sequence[Mapping[str, Any]], field: str) -> bool:
    return any(isinstance(row.get(field), (dict, list)) for row in rows)


def _get(row: Mapping[str, Any], field: str) -> Any:
    value: Any = row
    for part in field.split("."):
        if isinstance(value, list):
            value = value[int(part)] if part.isdigit() and int(part) < len(value) else None
        else:
            value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _text(value: Any, field: str = "") -> str:
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list) and len(value) == 3 and all(isinstance(v, float) for v in value):
        return "{} ({}–{})".format(*map(significant, value))
    if isinstance(value, list):  # a shape
        return "×".join(map(str, value))
    if isinstance(value, float):
        return f"{value:.1f}" if field.endswith("_pct") else significant(value)
    return str(value)
