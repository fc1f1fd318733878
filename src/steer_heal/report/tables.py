"""The one table printer: rows for people at a terminal, and the same rows as Markdown for the docs."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from steer_heal.errors import printable, wrapped

LONG = 24
"""Width above which a column is wrapped."""
PADDING = 3
"""Characters between two columns."""
Rows = Sequence[Mapping[str, object]]
Column = Sequence[str]
"""The heading, then the cells."""
GRADE_STYLES = {"GOOD": "bold green", "MIXED": "bold yellow", "SMALL": "bold cyan", "UNTRAINED": "bold"}
"""Of the first word of a verdict on a terminal. The others are bad news."""


class Terminal(Console):
    """A console that leaves a closed pipe to the command, which then ends with the status of one."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def show_verdict(verdict: str) -> None:
    """Prints a verdict on stdout, on a terminal with its grade in colour."""
    text = Text(wrapped(printable(verdict)))
    grade = verdict.split(":")[0]
    text.stylize(GRADE_STYLES.get(grade.split()[0], "bold red"), 0, len(grade))
    Terminal(markup=False, emoji=False, highlight=False, soft_wrap=True).print(text)


def show(rows: Rows, title: str = "", headings: Mapping[str, str] | None = None) -> None:
    """Prints rows on stdout, in as many tables as fit the terminal, each with the first column on the left.

    Args:
        rows: By column. A column exists if any row has it. A value that is missing or None leaves its cell empty.
        headings: What stands above a column, if that is not its name.
    """
    console = Terminal(markup=False, emoji=False, highlight=False)
    first, *rest = _columns(rows, headings or {}) or [[]]
    parts = [[first]] if first else []
    for column in rest:
        needed = sum(_narrowest(each, console.width) + PADDING for each in (*parts[-1], column))
        if len(parts[-1]) > 1 and needed > console.width:
            parts.append([first])
        parts[-1].append(column)
    if title:
        console.print(printable(title))
    for part in parts:
        console.print(_table(part, console.width))
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


def _table(columns: Sequence[Column], room: int) -> Table:
    """Headings and long cells are wrapped between words. Long columns share the room that the others leave."""
    widths = [_narrowest(column, room) for column in columns]
    left = room - sum(widths) - PADDING * len(columns)
    for i in sorted(
        range(len(columns)), key=lambda i: _longest_word(columns[i]) - widths[i]
    ):  # most room to spare first
        cut = max(0, min(-left, widths[i] - _longest_word(columns[i])))
        widths[i] -= cut
        left += cut
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    cells = []
    for i, (column, width) in enumerate(zip(columns, widths, strict=True)):
        is_long = _width(column) > LONG
        if is_long and left > 0:
            grown = min(_width(column), width + left)
            left -= grown - width
            width = grown
        heading, *rest = column
        right = i > 0 and not is_long
        table.add_column(Text(_fold(heading, width)), justify="right" if right else "left", no_wrap=True)
        cells.append([_fold(cell, width) for cell in rest])
    for row in zip(*cells, strict=True):
        table.add_row(*map(Text, row))
    return table


def _fold(cell: str, width: int) -> str:
    return "\n".join(textwrap.fill(line, width, break_on_hyphens=False) for line in cell.split("\n"))


def _width(column: Column) -> int:
    """Characters of the longest cell, or of the longest word of the heading."""
    heading, *cells = column
    return max(map(len, (*heading.split(), *cells)), default=1)


def _longest_word(column: Column) -> int:
    return max((len(word) for cell in column for word in cell.split()), default=1)


def _narrowest(column: Column, room: int) -> int:
    """Characters of a column whose long cells are wrapped. A word is broken only if it leaves no room for others."""
    return max(min(_width(column), LONG), min(_longest_word(column), room - LONG))
