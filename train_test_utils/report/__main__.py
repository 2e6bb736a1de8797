"""The command line: the report of a run, written again, and the tables of the READMEs.

    python3 -m train_test_utils.report runs/resnet_18-cifar10              # write its report.html and pictures again
    python3 -m train_test_utils.report --readme README.md results          # put the tables of results/ into the README
    python3 -m train_test_utils.report --readme README.md --check results  # exit 1 if they are not up to date
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from quantization_utils.file_format import replacing

from ..cli import sentence
from ..logbook import read_rows
from ..output import prepare_output, say
from . import print_table, write_report
from .readme_tables import with_tables


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
