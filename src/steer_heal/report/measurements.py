"""What the events say: measured states, ratios, tables and the verdict. Pure functions of events; no metric by name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from steer_heal.records import Metric
from steer_heal.settings import TINY_RANDOM

Event = Mapping[str, Any]
SHOWN_OF_HEAL = ("target", "text", "teacher", "divergence", "aggregate", "lam", "tau", "reference")
MEASURED = ("base", "prompted", "control", "steered", "healed")
WHOLE = ("GOOD", "MIXED", "NOT MOVED", "WRONG WAY")
"""Grades of a healed round whose model is whole, the best first. The others are BROKEN and UNREADABLE."""
UNTRAINED = "UNTRAINED: the pipeline works, and the numbers mean nothing"
"""Verdict on a model that nobody trained. No round of it is graded, and none is best."""


@dataclass(frozen=True)
class Measurement:
    """Metrics of one state in one round. Base, prompted and control have round -1."""

    stage: str
    round: int
    metrics: Mapping[str, float | None]

    def __getitem__(self, name: str) -> float | None:
        return self.metrics.get(name)

    @property
    def state(self) -> str:
        """base, healed r1."""
        return self.stage if self.round < 0 else f"{self.stage} r{self.round}"


def measurements(events: Sequence[Event]) -> list[Measurement]:
    """Every measured state in the order of the run."""
    return [Measurement(e["stage"], e["round"], e["metrics"]) for e in events if e["stage"] in MEASURED]


def run_start(events: Sequence[Event]) -> Event:
    return next(e for e in events if e["stage"] == "run_start")


def is_untrained(events: Sequence[Event]) -> bool:
    """Whether the run is one of the model that only tries the commands."""
    return run_start(events)["config"]["model"] == TINY_RANDOM


def metrics_of(events: Sequence[Event]) -> dict[str, Metric]:
    """The metrics of the run by name, in the order of its evals."""
    return {metric["name"]: Metric(**metric) for metric in run_start(events)["metrics"]}


def target_of(events: Sequence[Event]) -> tuple[Metric, int]:
    """(metric that judges the run's trait, sign). ValueError where the run has no such metric, or it has no `moved`."""
    trait, metrics = run_start(events)["trait"], metrics_of(events)
    target = metrics.get(trait["target"])
    if target is None:
        raise ValueError(f"the trait's target is {trait['target']!r:.80}, none of {', '.join(metrics)}")
    if target.moved is None:
        raise ValueError(f"the trait's target is {target.name}, which has no smallest shift that counts (Metric.moved)")
    return target, trait["sign"]


def is_high(metric: Metric) -> bool:
    """Whether a health metric should be high."""
    return (metric.good or 0.0) > (metric.broken or 0.0)


def health_of(metrics: Iterable[Metric]) -> list[Metric]:
    """The metrics that say whether the model is whole: those with both limits."""
    return [metric for metric in metrics if metric.good is not None and metric.broken is not None]


def within(metric: Metric, value: float, limit: float | None) -> bool:
    """Whether a health metric is at one of its limits or better."""
    return limit is None or (value >= limit if is_high(metric) else value <= limit)


def shift(state: Measurement, base: Measurement, metric: Metric) -> float | None:
    """Change from base in units of the metric; None where either has no value."""
    here, there = state[metric.name], base[metric.name]
    return None if here is None or there is None else here - there


def _guard(target: Metric) -> float:
    """Smallest shift that a ratio is computed for. Below it, a model that did nothing would look perfect."""
    return (target.moved or 0.0) / 6


def retain(healed: Measurement, steered: Measurement, base: Measurement, target: Metric) -> float | None:
    """Share of the steered shift that the healed student kept: 1 all, 0 none, negative the wrong way."""
    kept, whole = shift(healed, base, target), shift(steered, base, target)
    return None if kept is None or whole is None or abs(whole) < _guard(target) else kept / whole


def slope(state: Measurement, base: Measurement, target: Metric, metrics: Iterable[Metric]) -> float | None:
    """Change in percent (100 times the difference of logs) of the first health metric that should be high, for a shift
    of 1 unit of the target. Negative is a loss. None where there is no such metric or the target hardly moved."""
    quality = next((metric for metric in health_of(metrics) if is_high(metric)), None)
    moved = shift(state, base, target)
    here, there = (m[quality.name] if quality else None for m in (state, base))
    if moved is None or not here or not there or abs(moved) < _guard(target):
        return None
    return 100 * math.log(here / there) / abs(moved)


def table(events: Sequence[Event]) -> list[dict[str, Any]]:
    """One row a state: the target, its shift from base with the 95 percent interval, retain, slope, shown metrics."""
    states, metrics, (target, _) = measurements(events), metrics_of(events), target_of(events)
    base = next((m for m in states if m.stage == "base"), None)
    steered = {m.round: m for m in states if m.stage == "steered"}
    rows = []
    for m in states:
        against = None if base is None or m is base else base
        whole = steered.get(m.round) if m.stage == "healed" else None
        rows.append(
            {
                "state": m.state,
                target.name: m[target.name],
                "shift": against and shift(m, against, target),
                "lo": m[f"{target.name}_lo"],
                "hi": m[f"{target.name}_hi"],
                "retain": against and whole and retain(m, whole, against, target),
                "slope": against and slope(m, against, target, metrics.values()),
                **{name: m[name] for name, metric in metrics.items() if metric.shown and name != target.name},
            }
        )
    return rows


def table_columns(events: Sequence[Event]) -> dict[str, tuple[str, str]]:
    """(heading, format) of each column of `table` as people read it: `interval` stands for lo and hi."""
    metrics, (target, _) = metrics_of(events), target_of(events)
    unit = f" in {target.unit}" if target.unit else ""
    shown = {name: (title(metric), metric.form) for name, metric in metrics.items() if metric.shown}
    return {
        "state": ("state", ""),
        target.name: (title(target), target.form),
        "shift": (f"shift{unit}", signed(target)),
        "interval": ("95 % interval", ""),
        "retain": ("retained", ".0%"),
        "slope": ("slope in %", "+.3g"),
        **shown,
    }


def table_cells(events: Sequence[Event], missing: str) -> list[dict[str, str]]:
    """The rows of `table` as text, with `missing` for what has no value."""
    columns, form = table_columns(events), signed(target_of(events)[0])
    rows = []
    for row in table(events):
        low, high = row["lo"], row["hi"]
        row["interval"] = None if low is None or high is None else f"{number(low, form)} to {number(high, form)}"
        rows.append({key: number(row[key], columns[key][1], missing) for key in columns})
    return rows


def signed(metric: Metric) -> str:
    """Format of a shift of the metric."""
    return "+" + metric.form.lstrip("+")


def shift_words(value: float | None, metric: Metric) -> str:
    """A shift of the metric with its unit: -0.820 nats."""
    return f"{number(value, signed(metric))} {metric.unit}".rstrip()


def number(value: float | str | None, form: str, missing: str = "?") -> str:
    """The value in the format; `missing` for one that was not finite or not measured."""
    return missing if value is None else format(value, form)


@dataclass(frozen=True)
class Judged:
    """A healed state, its grade, and in words what the grade rests on."""

    state: Measurement
    grade: str
    shift: float | None
    """Of the target from base, in its unit."""
    told: str
    healthy: bool = False
    """Whether every health metric is at its `good` limit or better."""


def judge(state: Measurement, events: Sequence[Event]) -> Judged:
    """The grade of a healed state. In order: is the model whole, did the trait move, and alone?"""
    base = next(m for m in measurements(events) if m.stage == "base")
    metrics, (target, sign) = metrics_of(events), target_of(events)
    health = {metric: state[metric.name] for metric in health_of(metrics.values())}
    moved, least = shift(state, base, target), target.moved or 0.0
    unread = [target.name] * (moved is None) + [metric.name for metric, value in health.items() if value is None]
    if moved is None or unread:
        return Judged(state, "UNREADABLE", moved, f"no item has a value of {', '.join(unread)}")
    went = f"after round {state.round} {target.name} is {shift_words(moved, target)} from base"
    if gone := [metric for metric, value in health.items() if not within(metric, value or 0.0, metric.broken)]:
        limits = ", ".join(_against(metric, state, metric.broken) for metric in gone)
        return Judged(state, "BROKEN", moved, f"{went}, which counts for nothing: {limits}")
    condition = health_words(state, health, "good") or "no eval measures whether the model is whole"
    low, high = state[f"{target.name}_lo"], state[f"{target.name}_hi"]
    certain = None if low is None or high is None else not low <= 0 <= high
    if moved * sign < 0 and abs(moved) >= _guard(target) and certain is not False:
        return Judged(state, "WRONG WAY", moved, f"{went} and should go {direction(sign)}; {condition}")
    if abs(moved) < least or not certain:
        interval = f"95 % interval {number(low, signed(target))} to {number(high, signed(target))}"
        needed = f"a shift counts from {f'{least:g} {target.unit}'.rstrip()} on, with an interval that leaves out 0"
        return Judged(state, "NOT MOVED", moved, f"{went} ({interval}); {needed}; {condition}")
    parts = [f"{went}, {direction(sign)} as wanted", *_control_words(events, target), condition]
    others = [metric for name, metric in metrics.items() if name in run_start(events)["trait"]["off_targets"]]
    shifts = {metric: abs(shift(state, base, metric) or 0.0) for metric in others}
    if widest := max(shifts, key=lambda metric: shifts[metric], default=None):
        by = shift_words(shift(state, base, widest), widest)
        far = "further than the target" if shifts[widest] >= abs(moved) else "most"
        parts.append(f"of what should stay, {title(widest)} moved {far}: {by}")
    whole = bool(health) and all(within(metric, value or 0.0, metric.good) for metric, value in health.items())
    alone = all(far < abs(moved) for far in shifts.values())
    return Judged(state, "GOOD" if whole and alone else "MIXED", moved, "; ".join(parts), whole)


def best_round(events: Sequence[Event]) -> Judged | None:
    """The whole healed round of the best grade; of equals one whose health is good, then the one whose target moved
    furthest the wanted way. None where no round is whole, or the model is untrained."""
    if is_untrained(events):
        return None
    _, sign = target_of(events)
    found = [judge(m, events) for m in measurements(events) if m.stage == "healed"]
    whole = [each for each in found if each.grade in WHOLE]
    rank = lambda each: (WHOLE.index(each.grade), not each.healthy, -sign * (each.shift or 0.0))
    return min(whole, key=rank, default=None)


def verdict(events: Sequence[Event]) -> str:
    """One line: the grade of the last healed round and why, the best round where it is another, and why the run ended
    early, if it did."""
    ended = ended_early(events)
    healed = [m for m in measurements(events) if m.stage == "healed"]
    if not healed and not ended:
        return "no healed round yet"
    if is_untrained(events):
        return "; ".join(filter(None, (UNTRAINED, ended)))
    if not healed:
        return f"BROKEN: no round is whole; {ended}"
    last, best = judge(healed[-1], events), best_round(events)
    parts = [f"{last.grade}: {last.told}"]
    if best is not None and best.state.round != last.state.round:
        parts.append(_best_words(best, events))
    return "; ".join([*parts, *([ended] if ended else [])])


def _best_words(best: Judged, events: Sequence[Event]) -> str:
    """best round: 1 (MIXED, -0.82 nats, broken texts 10%): ckpt/r1."""
    target, r = target_of(events)[0], best.state.round
    health = health_words(best.state, health_of(metrics_of(events).values()))
    why = ", ".join(filter(None, (best.grade, shift_words(best.shift, target), health)))
    saved = next((e["checkpoint"] for e in events if e["round"] == r and e.get("checkpoint")), None)
    return f"best round: {r} ({why})" + (f": {saved}" if saved else "")


def health_words(state: Measurement, health: Iterable[Metric], limit: Literal["good", "broken"] | None = None) -> str:
    """The value of each health metric. With `limit`, one past it also says where the limit is."""
    return ", ".join(_against(metric, state, limit and getattr(metric, limit)) for metric in health)


def _against(metric: Metric, state: Measurement, limit: float | None) -> str:
    """broken texts 31% (limit 10%), or the value alone where the limit holds."""
    value = state[metric.name]
    told = f"{title(metric)} {number(value, metric.form)}"
    return told if value is None or within(metric, value, limit) else f"{told} (limit {limit_of(metric, limit)})"


def limit_of(metric: Metric, limit: float | None) -> str:
    """A limit as people read it: 10%, 0.95."""
    return number(limit, metric.form if metric.form.endswith("%") else "g")


def _control_words(events: Sequence[Event], target: Metric) -> list[str]:
    """How far the control moved the target."""
    states = {m.stage: m for m in measurements(events)}
    moved = shift(states["control"], states["base"], target) if "control" in states else None
    return [] if moved is None else [f"the control, healed once on unsteered text, is {moved:{signed(target)}}"]


def ended_early(events: Sequence[Event]) -> str:
    """Why the run ended with an earlier round than it was asked for; empty where it did not."""
    dropped, rounds = ([e for e in events if e["stage"] == stage] for stage in ("backtrack", "round"))
    if not dropped or dropped[-1]["round"] in {e["round"] for e in rounds}:
        return ""
    r = dropped[-1]["round"]
    if sum(e["round"] == r for e in dropped) <= run_start(events)["config"]["backtrack"]["retries"]:
        return ""
    kept = f"the last whole round is {r - 1}" if r > 0 else "nothing was baked"
    return f"{kept}: round {r} was dropped ({'; '.join(dropped[-1]['past'])})"


def title(metric: Metric) -> str:
    return metric.title or metric.name


def direction(sign: int) -> str:
    return "down" if sign < 0 else "up"


def result_row(events: Sequence[Event]) -> dict[str, Any]:
    """What results.tsv says of a finished run: its settings, its last healed state, its cosines and verdict."""
    start, end = run_start(events), events[-1]
    config, last = start["config"], {e["stage"]: e for e in events}
    rows = table(events)
    healed = [row for row in rows if row["state"].startswith("healed")] or [dict.fromkeys(rows[-1])]
    return {
        "preset": start["preset"],
        "model": config["model"],
        "trait": start["trait"]["name"],
        "seed": config["seed"],
        "n_rounds": config["n_rounds"],
        **{name: config["heal"][name] for name in SHOWN_OF_HEAL},
        **healed[-1],
        "cosine_to_first": last.get("vector", {}).get("cosine_to_first"),
        "cosine_student_first": last.get("round", {}).get("cosine_student_first"),
        "wall_s": end["wall_s"],
        "verdict": end["verdict"],
    }
