"""report.html and diary.md of a run, written from its events alone."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from steer_heal.records import Metric
from steer_heal.report import plot
from steer_heal.report.advice import Check, checks
from steer_heal.report.measurements import (
    MEASURED,
    best_round,
    health_of,
    measurements,
    metrics_of,
    shift,
    signed,
    table_cells,
    table_columns,
    target_of,
    title,
    verdict,
)
from steer_heal.report.texts import answered, answers, filters, reasons, states, written
from steer_heal.report.view import (
    MISSING,
    Event,
    Run,
    Table,
    evenly,
    inline,
    number,
    plural,
    round_name,
    template,
    visible,
    with_interval,
)
from steer_heal.runs.events import current, heal_steps, of_stage, read_events
from steer_heal.runs.storage import atomic_write

STEERING = {
    "kappa": ("dose", "kappa"),
    "dose": ("steered", "dose"),
    "cosine to round 0": ("vector", "cosine_to_first"),
    "cosine of student and vector": ("round", "cosine_student_teacher"),
    "cosine of student and vector 0": ("round", "cosine_student_first"),
}
"""Column of the table of steering: (event, field)."""
KINDS = {"vignette": "Of vignettes", "text": "Of free answers", "pair": "Of contrast pairs"}
"""Heading of the metrics by what one of their items is (Metric.of)."""
BELOW = {
    "vignette": "Below each scene stands its answer.",
    "pair": "Below each prompt stand its positive and its negative reply.",
}
"""What stands below an item's wording, by what an item is."""
MEANS = {"mean": "mean", "log_mean": "log of the mean", "median": "median"}
DIARY_PROMPTS = 3


def report(folder: Path) -> Path | None:
    """Writes report.html and diary.md from the events alone; None where the run did not start yet."""
    events = current(read_events(folder))
    if not of_stage(events, "run_start"):
        return None
    run = Run(folder.name, events)
    for name, text in (("diary.md", diary(run)), ("report.html", page(run))):
        with atomic_write(folder / name) as part:
            part.write_text(text, encoding="utf-8", newline="\n")
    return folder / "report.html"


def page(run: Run) -> str:
    """The whole of report.html."""
    grade, _, detail = verdict(run.events).partition(":")
    texts = written(run)
    return template("report.html.j2", visible).render(
        run=run,
        start=run.start,
        grade=grade,
        detail=detail.strip(),
        progress=progress(run),
        figures=figures(run),
        pictures=pictures(run),
        table=round_table(run),
        metrics=metric_tables(run),
        readings=readings(run),
        steering=steering_table(run),
        conditions=conditions(run),
        answers=answers(run),
        filters=list(filters(run)),
        written=texts,
        why=reasons(texts),
        heals=heals(run),
        retries=of_stage(run.events, "heal_retry"),
        dropped=of_stage(run.events, "backtrack"),
        command=shlex.join(run.start.get("command") or ()),
    )


def diary(run: Run) -> str:
    """The whole of diary.md: the run told by its answers to a few evaluation prompts, evenly spaced."""
    given = {state: answered(run, *state) for state in states(run)}
    prompts = evenly(list(dict.fromkeys(row["prompt"] for row in given["base", -1])), DIARY_PROMPTS)
    first = {state: {row["prompt"]: row for row in reversed(rows)} for state, rows in given.items()}
    told = {
        state: [(i, rows[prompt]) for i, prompt in enumerate(prompts, 1) if prompt in rows]
        for state, rows in first.items()
    }
    return template("diary.md.j2", inline).render(
        run=run,
        start=run.start,
        verdict=verdict(run.events),
        progress=progress(run),
        prompts=prompts,
        told=told,
        measured=measured_words(run),
        retries=of_stage(run.events, "heal_retry"),
        dropped=of_stage(run.events, "backtrack"),
    )


def measured_words(run: Run) -> dict[str, str]:
    """By state, every value of its row of the table that is there."""
    headings = {key: heading for key, (heading, _) in table_columns(run.events).items() if key != "state"}
    rows = table_cells(run.events, "")
    return {row["state"]: ", ".join(f"{headings[key]} {row[key]}" for key in headings if row[key]) for row in rows}


def progress(run: Run) -> tuple[str, str]:
    """(finished, stopped or running, a sentence about it)."""
    last, n_rounds = run.events[-1], len(of_stage(run.events, "round"))
    done = f"{n_rounds} of {plural(run.start['config']['n_rounds'], 'round')}, {last['wall_s'] / 60:.1f} minutes"
    if last["stage"] != "run_end":
        where = "" if last["round"] is None or last["round"] < 0 else f" of round {last['round']}"
        at = last["t"][:19].replace("T", " ")
        return "running", f"{done}; no end is written yet, the last event is {last['stage']}{where} at {at} UTC"
    return ("stopped", f"{done}; {last['error']}") if last.get("error") else ("finished", done)


def figures(run: Run) -> list[tuple[str, str, str]]:
    """(what, value, what it stands against) of the last healed student: the target, and every health metric."""
    states, (target, _) = measurements(run.events), target_of(run.events)
    healed = next((m for m in reversed(states) if m.stage == "healed"), None)
    base = next((m for m in states if m.stage == "base"), None)
    if healed is None or base is None:
        return []
    others = [m for m in states if m.round in (-1, healed.round) and m is not healed]
    low, high = (number(healed[f"{target.name}_{end}"], signed(target)) for end in ("lo", "hi"))
    shifts = ", ".join(f"{m.stage} {number(shift(m, base, target), signed(target))}" for m in others if m is not base)
    shown = [
        (
            f"{title(target)} against base",
            number(shift(healed, base, target), signed(target)),
            f"{target.unit}, 95 % {low} to {high}; {shifts}",
        )
    ]
    for metric in health_of(metrics_of(run.events).values()):
        against = ", ".join(f"{m.stage} {number(m[metric.name], metric.form)}" for m in others)
        shown.append((title(metric), number(healed[metric.name], metric.form), against))
    return shown


def pictures(run: Run) -> list[tuple[str, Markup]]:
    """(description, data URI) of the pictures that need a measured base."""
    if not plot.is_measured(run.events):
        return []
    seen = [{**e, "items": None, "texts": None} for e in run.events if e["stage"] in ("run_start", *MEASURED)]
    drawn = _drawn(_state_figures, json.dumps(seen))
    told = "The target and the health of the model, round by round; the table below holds the numbers"
    return list(zip((told, "The shift of the target against that of a second metric"), drawn.values(), strict=True))


def _state_figures(events: Sequence[Event]) -> dict[int, Figure]:
    return dict(enumerate((plot.rounds(events), plot.map_(events, headline=False))))


def heals(run: Run) -> list[tuple[str, int, Event, Markup]]:
    """(name, steps so far, event of its end, data URI of its curves) of each heal, the control's first."""
    seen = [e for e in run.events if e["stage"] in ("run_start", "heal_step", "heal", "heal_retry")]
    drawn = _drawn(plot.heal_curves, json.dumps(seen))
    n_steps = Counter(step["round"] for step in heal_steps(seen))
    return [(round_name(r), n_steps[r], run.at("heal", r), uri) for r, uri in drawn.items()]


@lru_cache(maxsize=2)
def _drawn(draw: Callable[[Sequence[Event]], Mapping[int, Figure]], events: str) -> dict[int, Markup]:
    """Data URIs of the figures of some events, kept until those change: a run writes its page more often."""
    return {key: Markup(plot.data_uri(figure)) for key, figure in draw(json.loads(events)).items()}


def round_table(run: Run) -> Table:
    """The measured states, without columns in which none has a value."""
    rows = [{key: text.replace("-", "\u2212") for key, text in row.items()} for row in table_cells(run.events, MISSING)]
    columns = {key: name for key, (name, _) in table_columns(run.events).items() if {r[key] for r in rows} - {MISSING}}
    cells = [
        (stage, [named, *(row[key] for key in columns if key != "state")])
        for (stage, named), row in zip(state_names(run), rows, strict=True)
    ]
    return list(columns.values()), cells


def state_names(run: Run) -> list[tuple[str, str]]:
    """(stage, name) of each measured state; the best round is named as such."""
    seen = measurements(run.events)
    best = best_round(run.events) if any(m.stage == "healed" for m in seen) else None
    is_best = lambda m: best is not None and (m.stage, m.round) == ("healed", best.state.round)
    return [(m.stage, f"{m.state} (best)" if is_best(m) else m.state) for m in seen]


def metric_tables(run: Run) -> list[tuple[str, Table]]:
    """(heading, table) of the metrics by what their items are: a row a metric, a column a state, and in each cell the
    value above the 95 percent interval of its difference to base."""
    seen, trait = measurements(run.events), run.start["trait"]
    groups: dict[str, list[Metric]] = {}
    for metric in metrics_of(run.events).values():
        groups.setdefault(KINDS.get(metric.of, "Others"), []).append(metric)

    def row(metric: Metric) -> tuple[str, list[str]]:
        part = "target" if metric.name == trait["target"] else "should stay" * (metric.name in trait["off_targets"])
        about = ", ".join(filter(None, (metric.name, metric.unit, part)))
        breakable = Markup("_<wbr>").join(visible(about).split("_"))
        name = Markup("{}<small>{}</small>").format(visible(title(metric)), breakable)
        return part.split()[0] if part else "", [name, *(with_interval(m.metrics, metric) for m in seen)]

    headings = ["metric", *(name for _, name in state_names(run))]
    return [(kind, (headings, [row(metric) for metric in metrics])) for kind, metrics in groups.items()]


def readings(run: Run) -> dict[str, Any] | None:
    """The target's items, base against the last healed student, the change in the wanted direction first. Each is shown
    by its wording, and by its number where the events hold none. None where they hold no items."""
    (target, sign), healed = target_of(run.events), of_stage(run.events, "healed")
    items = [(event.get("items") or {}).get(target.item) for event in (run.at("base"), *healed[-1:])]
    before, after = items if healed else (None, None)
    if not before or not after or len(before) != len(after):
        return None
    wording = run.start.get("wording", {}).get(target.of, [])
    if target.of == "text":
        wording = [[row["prompt"]] for row in run.texts("base", -1)]
    name = lambda i: wording[i] if i < len(wording) else [f"{target.of or 'item'} {i + 1}"]
    pairs = zip(before, after, strict=True)
    rows = [(name(i), a, b, b - a) for i, (a, b) in enumerate(pairs) if a is not None and b is not None]
    widest = max((abs(change) for *_, change in rows), default=0.0) or 1.0
    return {
        "metric": target,
        "how": MEANS[target.how],
        "below": BELOW.get(target.of, "") if wording else "",
        "sign": sign,
        "state": f"healed r{healed[-1]['round']}",
        "rows": [(*row, 100 * abs(row[-1]) / widest) for row in sorted(rows, key=lambda row: -sign * row[-1])],
        "n_wanted": sum(change * sign > 0 for *_, change in rows),
        "n_unread": len(before) - len(rows),
    }


def steering_table(run: Run) -> Table:
    """Dose and direction of each round."""
    rows = [(f"round {r}", [run.at(stage, r).get(field) for stage, field in STEERING.values()]) for r in run.rounds]
    return ["", *STEERING], [("", [name, *map(number, values)]) for name, values in rows]


def conditions(run: Run) -> tuple[Table, list[tuple[str, str]]]:
    """(what should hold of each round, yes or no; (round, advice) for each that does not)."""
    found: dict[str, dict[int, Check]] = {}
    for event in run.events:
        for check in checks(event, run.events):
            found.setdefault(check.should, {})[event["round"]] = check
    say = lambda check: MISSING if check is None else "yes" if check.holds else "no"
    rows = [("", [should, *(say(asked.get(r)) for r in run.rounds)]) for should, asked in found.items()]
    failed = [(r, check.advice) for asked in found.values() for r, check in asked.items() if not check.holds]
    return (["", *map(round_name, run.rounds)], rows), [(round_name(r), advice) for r, advice in sorted(failed)]
