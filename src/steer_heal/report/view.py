"""How a run is shown to people: rounds and events in words, tables, and text and numbers that are safe to print."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from steer_heal.errors import plural, printable
from steer_heal.events import AnyEvent, Dropped, Measured, Run
from steer_heal.records import GateFacts, Metric, round_label, round_name
from steer_heal.verdict import direction, interval_words, signed, table, title
from steer_heal.verdict import number as formatted

Table = tuple[list[str], list[tuple[str, list[str]]]]
"""(headings, (class, cells) of each row)."""
SHOWN_CHARACTERS = 1500
"""Length at which one text is cut."""
MISSING = "\u2013"
EVENT_WORDS = {
    "run_start": "the start",
    "preflight": "the pre-flight",
    "measured": "the measurement of {event.label}",
    "extracted": "the vector of {where}",
    "calibrated": "the calibration of {where}",
    "gathered": "the text of {where}",
    "contrasted": "the contrast of {where}",
    "heal_step": "step {event.step.step} of the heal of {where}",
    "heal_retried": "the first attempt to heal {where}",
    "trained": "the heal of {where}",
    "dropped": "the drop of {where}",
    "round_done": "the end of {where}",
    "run_end": "the end",
    "extended": "the beginning of more rounds",
}


# --- what a run holds ---------------------------------------------------------------------------------------------
def rounds_begun(run: Run) -> list[int]:
    """The rounds that were kept, and the one that has begun."""
    rounds = {event.round for event in run.events if event.round is not None and not isinstance(event, Dropped)}
    return sorted(rounds)


def last_event(run: Run) -> AnyEvent:
    """The newest event, steps of heals among them."""
    return max([run.events[-1], *run.steps[-1:]], key=lambda event: event.wall_s)


def degenerate_gates(run: Run) -> dict[str, GateFacts]:
    """The gates that say whether a text is degenerate."""
    return {name: gate for name, gate in run.start.gates.items() if gate.degenerate}


# --- words --------------------------------------------------------------------------------------------------------
def model_words(run: Run) -> str:
    """The model, and how its weights differ from those of that name."""
    note = run.start.weights.note if run.start.weights is not None else ""
    return ", ".join(filter(None, (run.start.config.model, note)))


def event_words(event: AnyEvent) -> str:
    """What an event records: `the heal of round 1`."""
    where = "the control" if event.round is None else round_name(event.round)
    return EVENT_WORDS[event.event].format(event=event, where=where)


def number(value: float | None, form: str = ".3g") -> str:
    """The value with a true minus sign; a dash for a number that is not finite or was not measured."""
    return formatted(value, form, MISSING).replace("-", "\u2212")


def true_minus(text: str) -> str:
    """The text with a true minus sign before each number, as pages and pictures have it."""
    return re.sub(r"(?<![\w-])-(?=\d)", "\u2212", text)


def visible(text: str) -> str:
    """Text that is safe to show: U+FFFD for what cannot be printed. A long text is cut, and the cut is named."""
    text = printable(text)
    n_more = len(text) - SHOWN_CHARACTERS
    return f"{text[:SHOWN_CHARACTERS]}... ({plural(n_more, 'character')} more)" if n_more > 0 else text


# --- tables of states ---------------------------------------------------------------------------------------------
def with_interval(
    metrics: Mapping[str, float | None], metric: Metric, words: str = "{}<small>{} to {}</small>"
) -> Markup:
    """The value of a metric, above the 95 percent interval of its difference to base."""
    low = metrics.get(f"{metric.name}_lo")
    high = metrics.get(f"{metric.name}_hi")
    value = number(metrics.get(metric.name), metric.form)
    if low is None or high is None:
        return escape(value)
    form = signed(metric)
    return Markup(words).format(value, number(low, form), number(high, form))


def table_columns(run: Run) -> dict[str, tuple[str, str]]:
    """(heading, format) of each column of the table of states. `interval` stands for lo and hi."""
    trait_metric = run.trait_metric
    unit = f" in {trait_metric.unit}" if trait_metric.unit else ""
    shown = {name: (title(metric), metric.form) for name, metric in run.metrics.items() if metric.shown}
    return {
        "state": ("state", ""),
        trait_metric.name: (title(trait_metric), trait_metric.form),
        "shift": (f"shift{unit}", signed(trait_metric)),
        "interval": ("95 % interval", ""),
        "retain": ("retained", ".0%"),
        "slope": ("slope in %", "+.3g"),
        **shown,
    }


def table_cells(run: Run, missing: str) -> list[dict[str, str]]:
    """A row of text for each measured state, with `missing` for what has no value."""
    columns = table_columns(run)
    rows = []
    for row, state in zip(table(run), run.each(Measured), strict=True):
        name = run.trait_metric.name
        row["interval"] = interval_words(state[f"{name}_lo"], state[f"{name}_hi"], run.trait_metric) or None
        rows.append({key: formatted(row[key], form, missing) for key, (_, form) in columns.items()})
    return rows


# --- Markdown and templates ---------------------------------------------------------------------------------------
def inline(text: str) -> Markup:
    """Text that stays inside a line of Markdown: its mark-up is escaped, its line breaks are spaces."""
    return Markup(re.sub(r"([\\`*_\[\]<>&#|~$])", r"\\\1", " ".join(visible(text).split())))


def fenced(text: str) -> Markup:
    """A block of Markdown that the text cannot end: its fence is longer than any run of backticks in it."""
    text = visible(text)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    lines = [part for line in text.split("\n") for part in textwrap.wrap(line, 100) or [""]]
    return Markup("\n".join([f"{fence}text", *lines, fence]))


@cache
def template(name: str, show: Callable[[str], str], folder: Path = Path(__file__).parent) -> Template:
    """A template of a folder. Each string that it prints goes through `show`, and is escaped unless it is Markup."""

    def finalize(value: object) -> object:
        return show(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=finalize,
    )
    filters = (number, fenced, direction, round_name, round_label)
    environment.filters |= {each.__name__: each for each in filters}
    environment.globals["plural"] = plural
    return environment.get_template(name)
