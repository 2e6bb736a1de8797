"""The report of a table as one HTML page that needs nothing beside it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

from ..table import Line, circumstances, columns_of, float_line, megabytes, significant
from .commands import commands_of
from .plots import FAMILIES, OTHER, Picture, family

STYLE = """
:root { color-scheme: light; --ink: #1d1d1f; --soft: #6b6b70; --rule: #e4e4e8; --tint: #f6f6f8; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; color: var(--ink); margin: 0 auto;
  max-width: 1400px; padding: 40px 24px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 8px; } h2 { font-size: 20px; margin: 48px 0 4px; }
p { margin: 6px 0; max-width: 72ch; } .soft { color: var(--soft); font-size: 14px; }
.badges { display: flex; flex-wrap: wrap; gap: 6px; margin: 12px 0; }
.badge { background: var(--tint); border: 1px solid var(--rule); border-radius: 99px; padding: 1px 10px; font-size: 13px; }
.badge.warn { background: #fff4e0; border-color: #e69f00; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 12px; margin: 24px 0; }
.card { border: 1px solid var(--rule); border-radius: 10px; padding: 14px 16px; }
.card b { display: block; font-size: 26px; line-height: 1.2; } .card span { color: var(--soft); font-size: 13px; }
.scroll { overflow-x: auto; margin-top: 12px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th { text-align: right; font-weight: 600; color: var(--soft); border-bottom: 2px solid var(--rule); padding: 6px 8px; white-space: nowrap;
  cursor: pointer; user-select: none; vertical-align: bottom; }
th:last-child, th:first-child, td:first-child { text-align: left; } th:first-child, td:first-child { padding-left: 0; } th:hover { color: var(--ink); }
th[aria-sort=ascending]::after { content: " ↑"; } th[aria-sort=descending]::after { content: " ↓"; }
td { text-align: right; border-bottom: 1px solid var(--rule); padding: 5px 8px; white-space: nowrap; }
td.what { color: var(--soft); text-align: left; white-space: normal; min-width: 220px; font-size: 13px; }
tr:hover td { background: var(--tint); } .mark { display: inline-block; width: 10px; height: 10px; margin-right: 8px; border-radius: 2px; }
img { max-width: 100%; height: auto; margin-top: 8px; } figure { margin: 0; }
pre { background: var(--tint); border-radius: 8px; padding: 12px 14px; white-space: pre-wrap; font-size: 13px; }
@media print { th { cursor: auto; } figure, tr { break-inside: avoid; } }
"""

SORT = """
document.querySelectorAll("th").forEach((head, column) => {
  const sort = () => {
    const body = head.closest("table").tBodies[0], up = head.getAttribute("aria-sort") !== "ascending";
    const key = row => row.cells[column].dataset.v ?? row.cells[column].innerText;
    const number = row => key(row) === "" ? NaN : Number(key(row));
    const rows = [...body.rows].sort((a, b) => {
      const x = number(a), y = number(b);
      if (key(a) === "" || key(b) === "") return (key(a) === "") - (key(b) === "");
      return (isNaN(x) || isNaN(y) ? key(a).localeCompare(key(b), undefined, {numeric: true}) : x - y) * (up ? 1 : -1);
    });
    head.parentNode.querySelectorAll("th").forEach(h => h.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    body.append(...rows);
  };
  head.onclick = sort;
  head.onkeydown = event => { if (event.key === "Enter") sort(); };
});
"""


def page(lines: Sequence[Line], pictures: Sequence[Picture]) -> str:
    """The page: what it is, one line in figures, the table, the pictures, how it was made."""
    title = (
        ", ".join(dict.fromkeys(f"{line.text('model') or '?'} on {line.text('dataset') or '?'}" for line in lines))
        or "no rows yet"
    )
    parts = [f"<h1>{escape(title)}</h1>", _badges(lines), _headline(lines), "<h2>Every row</h2>", _table(lines)]
    parts += [_figure(picture) for picture in pictures]
    parts.append(_made_by(lines))
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style></head>\n<body>\n{body}\n<script>{SORT}</script>\n</body>\n</html>\n"
    )


def headline_line(lines: Sequence[Line]) -> Line | None:
    """The line to begin with: qat_all, else ptq_all, else the first whose weights are all ternary and not pruned.

    Of several budgets that of the largest. Not the most accurate line: that would be a choice made on the test split.
    """
    ternary = [line for line in lines if (line.mean("weight_bits") or 32) < 1.586 and line.pruning is None]
    ternary.sort(key=lambda line: -line.budget)
    return next(
        (line for name in ("qat_all", "ptq_all") for line in ternary if line.name == name),
        ternary[0] if ternary else None,
    )


def _headline(lines: Sequence[Line]) -> str:
    shown = headline_line(lines)
    base = float_line(lines, shown) if shown is not None else None
    if shown is None or base is None:
        return ""
    accuracy, float_accuracy = shown.mean("test_accuracy_pct"), base.mean("test_accuracy_pct")
    size, smaller = shown.mean("file_bytes"), shown.mean("float_file_bytes/file_bytes")
    latency, faster = (
        shown.mean("latency_ms_p50_batch1"),
        shown.mean("float_latency_ms_p50_batch1/latency_ms_p50_batch1"),
    )
    cards = []
    if accuracy is not None and float_accuracy is not None:
        points = f"{accuracy - float_accuracy:+.2f} points".replace("-", "−")
        cards.append((f"{accuracy:.2f}%", f"{columns_of(lines)[0].title}; float {float_accuracy:.2f}% ({points})"))
    if size and smaller:
        cards.append((megabytes(size), f"file on disk, {significant(smaller)}× smaller than float"))
    if latency and faster:
        cards.append((f"{significant(latency)} ms", f"one image, {faster:.2f}× the speed of float beside it"))
    boxes = "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(text)}</span></div>' for value, text in cards
    )
    return f'<p>Every weight at 1.58 bits: <b>{escape(shown.label)}</b>.</p><div class="cards">{boxes}</div>'


def _badges(lines: Sequence[Line]) -> str:
    badges = []
    for key, text in circumstances(lines).items():
        reduced = key == "budget" and any(line.is_reduced for line in lines)
        note = " of the full recipe’s steps" if reduced else ""
        badges.append(f'<span class="badge{" warn" if reduced else ""}">{escape(f"{key} {text}")}{note}</span>')
    return f'<div class="badges">{"".join(badges)}</div>'


def _table(lines: Sequence[Line]) -> str:
    columns = columns_of(lines)
    heads = [
        ("row", "click a heading to sort"),
        *((c.title, c.meaning) for c in columns),
        ("what was done", "transformations, training"),
    ]
    head = "".join(f'<th tabindex="0" title="{escape(meaning)}">{escape(title)}</th>' for title, meaning in heads)
    rows = []
    for line in lines:
        name = escape(line.name) + (f' <span class="badge">{escape(line.conditions)}</span>' if line.conditions else "")
        cells = [
            f'<td data-v="{escape(line.label)}"><span class="mark" style="background:{family(line.name)[0]}"></span>{name}</td>'
        ]
        for column in columns:
            mean = line.mean(column.field)
            cells.append(f'<td data-v="{"" if mean is None else mean}">{escape(column.cell(line))}</td>')
        cells.append(f'<td class="what">{escape(_what(line))}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    known = [("float", "float"), ("ternary after training", "ptq"), ("ternary during training", "qat")]
    key = " ".join(f'<span class="mark" style="background:{FAMILIES[f][0]}"></span>{t} &nbsp;' for t, f in known)
    key += f'<span class="mark" style="background:{OTHER[0]}"></span>other'
    spread = " ± is the standard deviation over seeds." if any(len(line.rows) > 1 for line in lines) else ""
    meanings = "; ".join(f"<b>{escape(c.title)}</b>: {escape(c.meaning)}" for c in columns)
    return (
        f'<p class="soft">{key}</p><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f'<tbody>{"".join(rows)}</tbody></table></div><p class="soft">{meanings}.{spread}</p>'
    )


def _what(line: Line) -> str:
    row = line.rows[-1]
    parts = [str(t) for t in row.get("transforms") or []]
    epochs = row.get("epochs")
    if epochs:
        parts.append(f"trained for {float(epochs) * line.budget:g} epochs")
    return "; ".join(parts)


def _figure(picture: Picture) -> str:
    png = picture.path.read_bytes()
    width = int.from_bytes(png[16:20], "big") * 3 // 4  # the same scale for all, so that letters have one size
    data, title, caption = base64.b64encode(png).decode(), escape(picture.title), escape(picture.caption)
    image = f'<img alt="{title}" width="{width}" src="data:image/png;base64,{data}">'
    return f'<figure><h2>{title}</h2><p class="soft">{caption}</p>{image}</figure>'


def _made_by(lines: Sequence[Line]) -> str:
    commands = commands_of([row for line in lines for row in line.rows])
    dates = sorted(str(row["finished_at"])[:10] for line in lines for row in line.rows if row.get("finished_at"))
    when = (
        f' <span class="soft">({dates[0]}{"" if dates[0] == dates[-1] else " to " + dates[-1]})</span>' if dates else ""
    )
    return f"<h2>Made by</h2>{when}<pre>{escape(chr(10).join(commands))}</pre>" if commands else ""
