"""The one table printer: rows for people at a terminal, and the same rows as Markdown for the docs."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from steer_heal.errors import printable

LONG = 24
"""Width above which a column is wrapped."""
PADDING = 3
"""Characters between two columns."""
Rows = Sequence[Mapping[str, object]]
Column = Sequence[str]
"""The heading, then the cells."""


def show(rows: Rows, title: str = "", headings: Mapping[str, str] | None = None) -> None:
    """Prints rows on stdout, in as many tables as fit the terminal, each with the first column on the left.

    Args:
        rows: By column. A column exists if any row has it. A value that is missing or None leaves its cell empty.
        headings: What stands above a column, if that is not its name.
    """
    console = Console(markup=False, emoji=False, highlight=False)
    first, *rest = _columns(rows, headings or {}) or [[]]
    parts = [[first]] if first else []
    for column in rest:
        if len(parts[-1]) > 1 and _total_width([*parts[-1], column]) > console.width:
            parts.append([first])
        parts[-1].append(column)
    if title:
        console.print(printable(title))
    for part in parts:
        console.print(_table(part))
        console.print()


def markdown(rows: Rows) -> str:
    """The rows as a Markdown table. A value that is missing or None leaves its cell empty."""
    columns = _columns(rows, {})
    widths = [max(map(len, column)) for column in columns]
    lines = [" | ".join(map(str.ljust, line, widths)) for line in zip(*columns, strict=True)]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)


def _columns(rows: Rows, headings: Mapping[str, str]) -> list[list[str]]:
    """The columns of the rows."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [[printable(headings.get(name, name)), *(_cell(row.get(name)) for row in rows)] for name in names]


def _cell(value: object) -> str:
    """A number with three decimals; None as nothing."""
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else printable(str(value))


def _table(columns: Sequence[Column]) -> Table:
    """Headings wrap to the width of their column; cells wrap if they are long, and numbers never do."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for i, column in enumerate(columns):
        if _width(column) > LONG:
            table.add_column(Text(column[0]), overflow="fold")
        else:
            heading = "\n".join(textwrap.wrap(column[0], _width(column)))
            table.add_column(Text(heading), justify="left" if i == 0 else "right", no_wrap=True)
    for row in zip(*(column[1:] for column in columns), strict=True):
        table.add_row(*map(Text, row))
    return table


def _width(column: Column) -> int:
    """Characters of the longest cell, or of the longest word of the heading."""
    heading, *cells = column
    return max(map(len, (*heading.split(), *cells)), default=1)


def _total_width(columns: Sequence[Column]) -> int:
    """Characters of a table in which long columns are wrapped."""
    return sum(min(_width(column), LONG) + PADDING for column in columns)
