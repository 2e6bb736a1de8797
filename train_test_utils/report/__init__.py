"""Tables for the terminal, and the report of a run: one page and its pictures. `__main__.py` is the command line."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantization_utils.file_format import replacing

from ..logbook import read_curves
from ..output import say
from ..row_folder import place_of
from ..table import Line, circumstances, columns_of, lines_of


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table as text: a line for each row, seeds averaged, what the figures depend on below."""
    lines = lines_of(rows)
    columns = [column for column in columns_of(lines) if column.title != "images/s"]  # so that a line fits a terminal
    head = ["row", *(column.title for column in columns)]
    body = [[line.label, *(column.cell(line) for column in columns)] for line in lines]
    widths = [max(len(cells[i]) for cells in [head, *body]) for i in range(len(head))]

    def aligned(cells: Sequence[str]) -> str:
        return cells[0].ljust(widths[0]) + "".join(f"  {c:>{w}}" for c, w in zip(cells[1:], widths[1:], strict=True))

    titles = dict.fromkeys(f"{line.text('model')} on {line.text('dataset')}" for line in lines)
    rule = "─" * len(aligned(head))
    notes = [f"{k} {v}" for k, v in circumstances(lines).items() if k != "options"]
    if any(line.is_reduced for line in lines):
        notes.append("trained for less than the full recipes (budget below 1)")
    width = max(shutil.get_terminal_size((120, 24)).columns, len(rule))
    return "\n".join([", ".join(titles), rule, aligned(head), rule, *map(aligned, body), rule, *_wrapped(notes, width)])


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the table for the terminal."""
    say("\n" + format_table(rows))


def write_report(rows: Sequence[Mapping[str, Any]], out_dir: str | Path) -> list[Path]:
    """Write `report.html` (one page, everything embedded) and its pictures into `out_dir`; return their paths.

    Training curves, of a line's first seed, are read from the row's `curves.jsonl` where that exists.
    """
    from .page import page
    from .plots import draw_all  # imported here: matplotlib takes a second, and the tables do not need it

    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    lines = lines_of(rows)
    pictures = draw_all(lines, [_curve(line, out_dir) for line in lines], out_dir)
    path = out_dir / "report.html"
    with replacing(path) as file:
        file.write(page(lines, pictures).encode(errors="replace"))  # the name of a folder may be no text
    return [path, *(picture.path for picture in pictures)]


def _curve(line: Line, folder: Path) -> list[dict[str, Any]]:
    """The epochs of a line's first seed."""
    first = line.rows[0]
    return read_curves(place_of(folder / f"{line.name}-seed{first.get('seed')}", first.get("config_hash")))


def _wrapped(notes: Sequence[str], width: int) -> list[str]:
    """Notes joined by " · ", broken between them."""
    texts = [""]
    for note in notes:
        joined = f"{texts[-1]} · {note}" if texts[-1] else note
        if len(joined) > width and texts[-1]:
            texts.append(note)
        else:
            texts[-1] = joined
    return texts
