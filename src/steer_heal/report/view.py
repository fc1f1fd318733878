"""How the pages show a run: its events by stage and round, and text and numbers made safe to print."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from steer_heal.errors import printable
from steer_heal.records import Metric
from steer_heal.report.measurements import direction, run_start, signed
from steer_heal.report.measurements import number as formatted

Event = Mapping[str, Any]
Table = tuple[list[str], list[tuple[str, list[str]]]]
"""(headings, (class, cells) of each row)."""
SHOWN_CHARACTERS = 1500
"""Of any one text."""
MISSING = "\u2013"


@dataclass(frozen=True)
class Run:
    """The events of a run, looked up by stage and round."""

    name: str
    events: Sequence[Event]

    def at(self, stage: str, round_: int | None = -1) -> Event:
        """The event, empty where it was not written yet."""
        return next((e for e in reversed(self.events) if e["stage"] == stage and e["round"] == round_), {})

    @property
    def start(self) -> Event:
        return run_start(self.events)

    @property
    def rounds(self) -> list[int]:
        shown = [e for e in self.events if e["stage"] != "backtrack"]
        return sorted({e["round"] for e in shown if e["round"] is not None and e["round"] >= 0})

    def texts(self, stage: str, round_: int) -> Sequence[Event]:
        return self.at("adapter_gen" if stage == "healed" else stage, round_).get("texts") or ()

    def gates(self) -> dict[str, Event]:
        """The gates that say whether a text is broken."""
        return {name: gate for name, gate in self.start["gates"].items() if gate["broken"]}


def visible(text: str) -> str:
    """Text that is safe to show: U+FFFD for what does not print; a long one is cut, and the cut is named."""
    text, limit = printable(text), SHOWN_CHARACTERS
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text) - limit:,} characters more)"


def number(value: float | None, form: str = ".3g") -> str:
    return formatted(value, form, MISSING).replace("-", "\u2212")


def evenly(rows: Sequence[Any], n: int) -> list[Any]:
    """At most n of the rows, evenly spaced, the first among them."""
    return [rows[i * len(rows) // n] for i in range(n)] if len(rows) > n else list(rows)


def with_interval(metrics: Mapping[str, float | None], metric: Metric) -> Markup:
    """The value of a metric, above the 95 percent interval of its difference to base."""
    low, high = (metrics.get(f"{metric.name}_{end}") for end in ("lo", "hi"))
    value = number(metrics.get(metric.name), metric.form)
    if low is None or high is None:
        return escape(value)
    return Markup("{}<small>{} to {}</small>").format(value, *(number(end, signed(metric)) for end in (low, high)))


def round_name(r: int) -> str:
    return "control" if r < 0 else f"round {r}"


def plural(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def inline(text: str) -> Markup:
    """Text that stays inside a line of Markdown: no mark-up, no HTML, no line break."""
    return Markup(re.sub(r"([\\`*_\[\]<>&#|~$])", r"\\\1", " ".join(visible(text).split())))


def fenced(text: str) -> Markup:
    """A block of Markdown that the text cannot end: its fence is longer than any run of backticks in it."""
    text = visible(text)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    lines = [part for line in text.split("\n") for part in textwrap.wrap(line, 100) or [""]]
    return Markup("\n".join([f"{fence}text", *lines, fence]))


@cache
def template(name: str, show: Callable[[str], str], folder: Path = Path(__file__).parent) -> Template:
    """A template of a folder. Every string that it prints passes `show`, and is escaped unless it then is Markup."""
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: show(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )
    environment.filters |= {"number": number, "fenced": fenced, "direction": direction, "round_name": round_name}
    environment.globals |= {"plural": plural}
    return environment.get_template(name)
