"""A page of several runs side by side, written from their events alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from markupsafe import Markup

from steer_heal.errors import UserError
from steer_heal.report import plot
from steer_heal.report.measurements import (
    MEASURED,
    Measurement,
    best_round,
    measurements,
    metrics_of,
    target_of,
    title,
    verdict,
)
from steer_heal.report.texts import answered
from steer_heal.report.view import MISSING, Run, Table, evenly, template, visible, with_interval
from steer_heal.runs.events import current, read_events, schema_errors
from steer_heal.runs.storage import atomic_write

COMPARED_PROMPTS = 8


def compare(folders: Sequence[Path], file: Path) -> Path:
    """Writes the page of the runs, the first of which is A. UserError where they cannot be compared."""
    if not 2 <= len(folders) <= len(ascii_uppercase):
        raise UserError(f"--compare got {len(folders)} run folders: it takes 2 to {len(ascii_uppercase)}")
    if file.is_dir():
        raise UserError(f"--compare {file} is a folder: name the file to write, such as compare.html")
    runs = {}
    for letter, folder in zip(ascii_uppercase, folders, strict=False):
        events = current(read_events(folder))
        if not plot.is_measured(events):
            raise UserError(f"{folder}: its base is not measured yet, so there is nothing to compare; leave it out")
        with schema_errors(folder):
            verdict(events)
        runs[letter] = Run(folder.resolve().name, events)
    with atomic_write(file) as part:
        part.write_text(page(runs), encoding="utf-8", newline="\n")
    return file


def page(runs: Mapping[str, Run]) -> str:
    """The whole page of the runs by letter."""
    told = {letter: verdict(run.events).partition(":") for letter, run in runs.items()}
    return template("compare.html.j2", visible).render(
        runs=runs,
        verdicts={letter: (grade, detail.strip().split("; ")) for letter, (grade, _, detail) in told.items()},
        picture=Markup(plot.data_uri(plot.comparison({letter: run.events for letter, run in runs.items()}))),
        metrics=metric_tables(runs),
        settings=settings(runs),
        prompts=prompts(runs),
    )


def metric_tables(runs: Mapping[str, Run]) -> list[tuple[str, Table]]:
    """(heading, table) of each target and each shown metric: a row a state, a column a run."""
    known = {letter: metrics_of(run.events) for letter, run in runs.items()}
    targets = [target_of(run.events)[0].name for run in runs.values()]
    shown = [name for metrics in known.values() for name, metric in metrics.items() if metric.shown]
    seen = {letter: {m.state: m for m in measurements(run.events)} for letter, run in runs.items()}
    measured = {state: m for states in seen.values() for state, m in states.items()}
    order = sorted(measured, key=lambda state: (measured[state].round, MEASURED.index(measured[state].stage)))
    tables = []
    for name in dict.fromkeys([*targets, *shown]):
        metric = next(metrics[name] for metrics in known.values() if name in metrics)

        def cell(letter: str, state: str, name: str = name) -> str:
            m = seen[letter].get(state)
            return MISSING if m is None or name not in known[letter] else with_interval(m.metrics, known[letter][name])

        rows = [(measured[state].stage, [state, *(cell(letter, state) for letter in runs)]) for state in order]
        unit = f", {metric.unit}" if metric.unit else ""
        tables.append((f"{title(metric)} ({name}{unit})", (["state", *runs], rows)))
    return tables


def settings(runs: Mapping[str, Run]) -> Table:
    """The settings in which the runs differ."""
    flat = {letter: _flat(run.start["config"] | {"trait": run.start["trait"]["name"]}) for letter, run in runs.items()}
    names = dict.fromkeys(name for values in flat.values() for name in values)
    rows = [[name, *(flat[letter].get(name, MISSING) for letter in runs)] for name in names]
    return ["setting", *runs], [("", row) for row in rows if len(set(row[1:])) > 1]


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Values as text, by dotted name."""
    out = {}
    for name, value in config.items():
        out |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: str(value)}
    return out


def prompts(runs: Mapping[str, Run]) -> list[dict[str, Any]]:
    """A few evaluation prompts that all runs share, evenly spaced, with the base's answers (once where they are equal)
    and each run's, healed in its best round or, where none is whole, in its last."""
    bases = {letter: _first(answered(run, "base", -1)) for letter, run in runs.items()}
    healed = {letter: _chosen(run) for letter, run in runs.items()}
    given = {
        letter: _first(answered(run, "healed", m.round)) if (m := healed[letter]) else {}
        for letter, run in runs.items()
    }
    first, *others = bases.values()
    found = []
    for prompt in evenly([p for p in first if all(p in base for base in others)], COMPARED_PROMPTS):
        texts = dict.fromkeys(bases[letter][prompt]["text"] for letter in runs)
        whose = {text: [letter for letter in runs if bases[letter][prompt]["text"] == text] for text in texts}
        cards = [(f"base of {', '.join(whose[text])}", bases[whose[text][0]][prompt]) for text in texts]
        cards += [(f"{k} {m.state}", given[k][prompt]) for k in runs if (m := healed[k]) and prompt in given[k]]
        found.append({"prompt": prompt, "cards": cards})
    return found


def _first(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The first answer to each prompt."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        found.setdefault(row["prompt"], row)
    return found


def _chosen(run: Run) -> Measurement | None:
    """The best round or, where none is whole, the last; None where nothing is healed yet."""
    healed = [m for m in measurements(run.events) if m.stage == "healed"]
    best = best_round(run.events) if healed else None
    return best.state if best else next(reversed(healed), None)
