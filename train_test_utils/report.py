"""Tables for the terminal, the report of a run, and the README's tables.

    python3 -m train_test_utils.report runs/resnet_18-cifar10              # write its report.html and pictures again
    python3 -m train_test_utils.report --readme README.md results          # put the tables of results/ into the README
    python3 -m train_test_utils.report --readme README.md --check results  # exit 1 if they are not up to date
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantization_utils.file_format import replacing

from .cli import sentence
from .logbook import read_curves, read_rows
from .output import prepare_output, say
from .readme_tables import with_tables
from .row_folder import place_of
from .table import Line, circumstances, columns_of, is_reduced, lines_of


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
    if any(is_reduced(line) for line in lines):
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
    from .plots import draw_all  # imported here: matplotlib takes a second, and the tables do not need it
    from .report_page import page

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


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0, 1 (`--check`: out of date) or 2 (a mistake)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of a table (with rows.jsonl), or with --readme of results")
    parser.add_argument("--readme", type=Path, help="put tables between the markers of this Markdown file")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the file is out of date")
    given = parser.parse_args(arguments)
    prepare_output()
    if given.check and given.readme is None:
        parser.error("--check is for the tables of a Markdown file: name it with --readme")
    try:
        if given.readme is None:
            rows = read_rows(given.folder / "rows.jsonl")
            if not rows:
                raise FileNotFoundError(f"{given.folder / 'rows.jsonl'} has no rows: name the folder of a table")
            report, *_ = write_report(rows, given.folder)
            print_table(rows)
            say(f"report: {report}")
            return 0
        before = given.readme.read_text(encoding="utf-8")
        after = with_tables(before, given.folder)
        if after != before and not given.check:
            with replacing(given.readme) as file:
                file.write(after.encode())
    except (ValueError, OSError) as error:
        print(f"report: {sentence(error)}", file=sys.stderr)
        return 2
    if given.check and after != before:
        print(f"{given.readme}: tables are out of date: python3 -m train_test_utils.report --readme {given.readme} "
              f"{given.folder}",
              file=sys.stderr)  # fmt: skip
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
