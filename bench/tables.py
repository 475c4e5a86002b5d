"""Rows of the committed CSV files, and Markdown tables of them."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

Row = dict[str, str]


def read(path: Path) -> list[Row]:
    """The rows of a CSV file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are numbers, to the right."""
    rows = [list(head), ["---", *["---:"] * (len(head) - 1)], *map(list, lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def duration(us: str) -> str:
    """Microseconds with a unit and three digits."""
    value, unit = float(us), "us"
    if value >= 1000:
        value, unit = value / 1000, "ms"
    return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f} {unit}"


def conditions(row: Row) -> str:
    """One sentence on where and when."""
    return f"{row['machine']}; instruction set {row['isa']}; {row['versions']}; {row['date']}, commit {row['commit']}"
