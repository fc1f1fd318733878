"""A page of several runs side by side, written from their events alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import get_args

import numpy as np
from markupsafe import Markup

from steer_heal.errors import UserError, plural
from steer_heal.events import Measured, Run, RunStart
from steer_heal.inputs import evenly
from steer_heal.intervals import by_prompt, has_value, of_difference, statistic
from steer_heal.records import HELD, Metric, StateName, derive_seed
from steer_heal.report import plot
from steer_heal.report.page import progress, settings_of
from steer_heal.report.texts import Shown, answered, first_answers
from steer_heal.report.view import MISSING, Table, model_words, number, template, true_minus, visible, with_interval
from steer_heal.runs.log import read_events, schema_errors
from steer_heal.runs.storage import atomic_write
from steer_heal.settings import leaves
from steer_heal.verdict import best_round, shift, signed, title, verdict

COMPARED_PROMPTS = 8
N_BOOTSTRAP = 2000
Runs = Mapping[str, Run]
"""By letter."""


def compare(folders: Sequence[Path], file: Path) -> Path:
    """Writes the page of the runs, the first of which is A. UserError if they cannot be compared."""
    if not 2 <= len(folders) <= len(ascii_uppercase):
        raise UserError(f"--compare got {plural(len(folders), 'run folder')}: it takes 2 to {len(ascii_uppercase)}")
    counts = Counter(folder.resolve() for folder in folders)
    if twice := [folder for folder in folders if counts[folder.resolve()] > 1]:
        raise UserError(f"--compare got {twice[0]} {counts[twice[0].resolve()]} times; give each run once")
    if file.is_dir():
        raise UserError(f"--compare {file} is a folder: name the file to write, such as compare.html")
    runs: dict[str, Run] = {}
    names: dict[str, str] = {}
    for letter, folder in zip(ascii_uppercase, folders, strict=False):
        run = Run(read_events(folder))
        if not run.each(RunStart) or run.measured("base") is None:
            raise UserError(f"{folder}: its base is not measured yet, so there is nothing to compare; leave it out")
        with schema_errors(folder):
            verdict(run)
        runs[letter] = run
        names[letter] = folder.resolve().name
    with atomic_write(file) as part:
        part.write_text(page(runs, names), encoding="utf-8", newline="\n")
    return file


def page(runs: Runs, names: Mapping[str, str]) -> str:
    """The whole page of the runs."""
    verdicts = {}
    for letter, run in runs.items():
        grade, _, detail = true_minus(verdict(run)).partition(":")
        verdicts[letter] = (grade, detail.strip().split("; "))
    return template("compare.html.j2", visible).render(
        runs=runs,
        names=names,
        models={letter: model_words(run) for letter, run in runs.items()},
        verdicts=verdicts,
        progress={letter: progress(run) for letter, run in runs.items()},
        pictures=[(name, Markup(plot.data_uri(plot.comparison(group)))) for name, group in by_target(runs).items()],
        chosen={letter: state.label if (state := _chosen(run)) else "" for letter, run in runs.items()},
        differences=differences(runs),
        metrics=metric_tables(runs),
        settings=settings(runs),
        prompts=prompts(runs),
    )


def by_target(runs: Runs) -> dict[str, dict[str, Run]]:
    """The runs that have one target, by the title of its metric."""
    groups: dict[str, dict[str, Run]] = {}
    for letter, run in runs.items():
        groups.setdefault(run.trait_metric.name, {})[letter] = run
    return {title(next(iter(group.values())).trait_metric): group for group in groups.values()}


def shown_metrics(runs: Runs) -> dict[str, Metric]:
    """By name: the target of each run, then each metric that a table of states shows."""
    known = [run.trait_metric for run in runs.values()]
    known += [metric for run in runs.values() for metric in run.metrics.values() if metric.shown]
    found: dict[str, Metric] = {}
    for metric in known:
        found.setdefault(metric.name, metric)
    return found


def differences(runs: Runs) -> Table:
    """The shift of the chosen student of the first run from its base minus that of each other run."""
    (letter, first), *others = runs.items()
    rows = []
    for metric in shown_metrics(runs).values():
        cells = [_difference(first, run, metric) for _, run in others]
        if set(cells) != {MISSING}:
            rows.append(("", [f"{title(metric)}{metric.unit and ', '}{metric.unit}", *cells]))
    return ["metric", *(f"{letter} \u2212 {other}" for other, _ in others)], rows


def _difference(a: Run, b: Run, metric: Metric) -> str:
    """The difference of two shifts above its 95 percent interval."""
    states = [_chosen(a), a.measured("base"), _chosen(b), b.measured("base")]
    known = [m for m in states if m is not None]
    if len(known) < len(states) or metric.name not in a.metrics or metric.name not in b.metrics:
        return MISSING
    moved = [shift(known[i], known[i + 1], metric) for i in (0, 2)]
    if moved[0] is None or moved[1] is None:
        return MISSING
    form = signed(metric)
    asked = _asked(a, metric)
    found = _paired(known, metric) if asked and asked == _asked(b, metric) else None
    if found is None:
        return number(moved[0] - moved[1], form)
    return Markup("{}<small>{} to {}</small>").format(*(number(each, form) for each in found))


def _paired(states: Sequence[Measured], metric: Metric) -> tuple[float, float, float] | None:
    """(the difference, the ends of its 95 percent interval) over the items that have a value in all four states. None:
    the items differ in number, or the bases differ and the metric is no mean, so that its shift is not made of items.
    """
    items = [m.items.get(metric.item, ()) for m in states]
    if len(set(map(len, items))) > 1:
        return None
    x = np.array(items, dtype=float)
    both = has_value(metric.how, x).all(axis=0)
    sides = list(x[:, both])
    if metric.of == "text" and len(states[1].texts) == x.shape[1]:  # an eval of a plugin may have other items
        sides = by_prompt(metric.how, np.array([row.prompt for row in states[1].texts])[both].tolist(), *sides)
    here, base, there, other = sides
    if not np.allclose(base, other):
        if metric.how != "mean":
            return None
        here, there = here - base, there - other
    rng = np.random.default_rng(derive_seed(0, "compare", len(here)) % 2**32)
    ends = of_difference(metric.how, here, there, N_BOOTSTRAP, rng)
    return None if ends is None else (float(statistic(metric.how, here) - statistic(metric.how, there)), *ends)


def _asked(run: Run, metric: Metric) -> object:
    """What the items of a metric ask. Nothing: the events do not tell."""
    base = run.measured("base")
    if metric.of == "text" and base is not None:
        return [row.prompt for row in base.texts]
    if metric.of == "trait":
        return sorted(item for item in run.start.inputs.items() if item[0].startswith("panel."))
    asked = run.start.wording.get(metric.of)
    return [*asked, run.start.inputs.get("eval.attacks")] if asked and metric.item == HELD else asked


def metric_tables(runs: Runs) -> list[tuple[str, Table]]:
    """(heading, table) of each trait's metric and each shown metric, with a row for each state and a column for each
    run."""
    order = get_args(StateName)
    measured = {(m.round, m.state): m for run in runs.values() for m in run.each(Measured)}
    states = sorted(measured, key=lambda key: (-1 if key[0] is None else key[0], order.index(key[1])))
    tables = []
    for name, metric in shown_metrics(runs).items():
        rows = [
            (state, [measured[r, state].label, *(_cell(run, state, r, name) for run in runs.values())])
            for r, state in states
        ]
        unit = f", {metric.unit}" if metric.unit else ""
        tables.append((f"{title(metric)} ({name}{unit})", (["state", *runs], rows)))
    return tables


def _cell(run: Run, state: str, r: int | None, name: str) -> str:
    """The value of a metric in one state of a run."""
    m = run.measured(state, r)
    return MISSING if m is None or name not in run.metrics else with_interval(m.metrics, run.metrics[name])


def settings(runs: Runs) -> Table:
    """The settings in which the runs differ."""
    values = {letter: {**leaves(settings_of(run)), "trait": run.start.trait.name} for letter, run in runs.items()}
    names = dict.fromkeys(name for each in values.values() for name in each)
    rows = [[name, *(str(values[letter].get(name, MISSING)) for letter in runs)] for name in names]
    return ["setting", *runs], [("", row) for row in rows if len(set(row[1:])) > 1]


def prompts(runs: Runs) -> list[tuple[str, list[tuple[str, Shown]]]]:
    """(prompt, named answers) of a few evaluation prompts that all runs share, evenly spaced. The answers are those of
    the base, once if they are equal, and of each run's chosen student."""
    bases = {letter: first_answers(answered(run, "base", None)) for letter, run in runs.items()}
    chosen = {letter: _chosen(run) for letter, run in runs.items()}
    first, *others = bases.values()
    found = []
    for prompt in evenly([p for p in first if all(p in base for base in others)], COMPARED_PROMPTS):
        letters: dict[str, list[str]] = {}
        for letter, base in bases.items():
            letters.setdefault(base[prompt].text, []).append(letter)
        cards = [(f"base of {', '.join(same)}", bases[same[0]][prompt]) for same in letters.values()]
        for letter, state in chosen.items():
            given = {} if state is None else first_answers(answered(runs[letter], state.state, state.round))
            if state is not None and prompt in given:
                cards.append((f"{letter} {state.label}", given[prompt]))
        found.append((prompt, cards))
    return found


def _chosen(run: Run) -> Measured | None:
    """The student of the best round or, if no round is intact, of the last. None: no student is healed yet."""
    best = best_round(run)
    healed = [m for m in run.each(Measured) if m.state == "healed"]
    return best.state if best is not None else next(reversed(healed), None)
