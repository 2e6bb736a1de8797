"""The commands that make the rows of a table, from those that did."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

NOT_PART_OF_IT = ("--only ", "--seeds ", "--wandb ", "--measure-again")  # of what a command is told apart by


def commands_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Those that were given, joined where they differ in rows, seeds or logging alone."""
    patterns_of: dict[tuple[str, ...], dict[str, dict[str, None]]] = {}  # program and options -> seed -> of --only
    for row in rows:
        if row.get("command"):
            program, patterns = _chosen(row)
            of_seed = patterns_of.setdefault(program, {}).setdefault(str(row.get("seed", 0)), {})
            of_seed.update(dict.fromkeys(patterns))
    return [
        " ".join([*words, *_choice(seeds, patterns)])
        for (_, *words), by_seed in patterns_of.items()
        for patterns, seeds in _seeds_alike(by_seed)
    ]


def _chosen(row: Mapping[str, Any]) -> tuple[tuple[str, ...], list[str]]:
    """The program with the options that decide what a row is, and the patterns by which it was named."""
    program, *options = _options(row["command"])
    given = next((shlex.split(o)[1:] for o in options if o.startswith("--only ")), ["*"])
    name = str(row.get("row"))
    patterns = [p for p in given if "row" not in row or fnmatchcase(name, p)] or [name]  # a parent is not named
    if "row" in row and any(o.startswith("--measure-again") for o in options):
        patterns = [name]  # only what had been done was measured, whatever was named
    kept = sorted(o for o in options if not o.startswith(NOT_PART_OF_IT))
    quick_rows = "--quick" in kept and given == ["*"]  # fewer than --only '*' would name
    return (str(quick_rows), program, *kept), patterns


def _seeds_alike(by_seed: Mapping[str, Iterable[str]]) -> list[tuple[list[str], list[str]]]:
    """The seeds that have the same patterns, together."""
    found: dict[frozenset[str], tuple[list[str], list[str]]] = {}
    for seed, patterns in by_seed.items():
        widest = [p for p in patterns if not any(p != other and fnmatchcase(p, other) for other in patterns)]
        found.setdefault(frozenset(widest), (widest, []))[1].append(seed)
    return list(found.values())


def _choice(seeds: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The options for them, but for what is so without any."""
    choice = [] if list(seeds) == ["0"] else ["--seeds", *sorted(seeds, key=int)]
    return choice + ([] if list(patterns) == ["*"] else ["--only", *map(shlex.quote, patterns)])


def _options(command: str) -> list[str]:
    """The program, then each option with its values: ["python3 x.py", "--seeds 0 1", "--out 'a folder'"]."""
    words = shlex.split(command)
    script = next((i for i, word in enumerate(words) if word.endswith(".py")), 0)  # options before it are a launcher's
    options = [words[: script + 1]]
    for word in words[script + 1 :]:
        if word.startswith("--"):
            options.append(word.split("=", 1))
        else:
            options[-1].append(word)
    return [shlex.join(words) for words in options]
