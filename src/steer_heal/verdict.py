"""What the measurements of a run mean: shifts, ratios, grades, the verdict, and the limits that a round must keep.

Pure functions of events. No metric is known by name. The rules are in spec.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

import numpy as np

from steer_heal.errors import UserError
from steer_heal.events import Dropped, Measured, Run, TableRow, Trained
from steer_heal.intervals import has_value, mean_change, of_difference, statistic, wilson
from steer_heal.records import (
    OPPOSES,
    PAIR_MOVED,
    EvalResult,
    How,
    Metric,
    Values,
    attack_reference,
    derive_seed,
    round_name,
    under_attack,
)
from steer_heal.settings import BacktrackCfg, RoundName

Reading = Measured | EvalResult
"""What was measured of a state."""
GRADES = ("GOOD", "MIXED", "SMALL SHIFT", "WRONG WAY")
"""Grades of a healed round whose model is intact, the best first. The others are BROKEN and UNREADABLE."""
STATUSES = {"GOOD": 0, "UNTRAINED": 0, "MIXED": 3, "SMALL SHIFT": 4, "WRONG WAY": 5}
"""Exit status of `run --exit-status` by grade."""
UNTRAINED = "UNTRAINED: the pipeline works, and the numbers mean nothing"
"""Verdict on a model that nobody trained. None of its rounds has a grade, and none is best."""
SMALLEST_SHARE = 1 / 6
"""Of the smallest shift that counts: below it no ratio is computed, and no shift goes the wrong way."""


# --- shifts and ratios -------------------------------------------------------------------------------------------
def shift(here: Reading, base: Reading, metric: Metric) -> float | None:
    """Change of a metric from base, in the metric's unit, over the items with a value in both. None: no item has."""
    now = here.metrics.get(metric.name)
    then = base.metrics.get(metric.name)
    if now is None or then is None:
        return None
    items = [np.asarray(state.items.get(metric.item, ()), dtype=np.float64) for state in (here, base)]
    if len(items[0]) == len(items[1]):
        both = has_value(metric.how, items[0]) & has_value(metric.how, items[1])
        if any((both == np.isnan(each)).any() for each in items):  # a side has a value that the other lacks
            if not both.any():
                return None
            now, then = (float(statistic(metric.how, each[both])) for each in items)
    return now - then


def least_shift(trait_metric: Metric) -> float:
    """The smallest shift that a ratio is computed for. Below it a model that did nothing would look perfect."""
    return (trait_metric.moved or 0.0) * SMALLEST_SHARE


def retain(healed: Reading, steered: Reading, base: Reading, trait_metric: Metric) -> float | None:
    """Share of the steered shift that the healed student kept: 1 all, 0 none, negative the wrong way."""
    kept = shift(healed, base, trait_metric)
    whole = shift(steered, base, trait_metric)
    if kept is None or whole is None or abs(whole) < least_shift(trait_metric):
        return None
    return kept / whole


def slope(state: Reading, base: Reading, trait_metric: Metric, metrics: Iterable[Metric]) -> float | None:
    """Change of the first health metric that should be high, in percent (100 times the difference of logarithms), for a
    shift of 1 unit of the trait's metric. Negative is a loss. None where no such metric is measured, or the trait's
    metric hardly moved."""
    quality = next((metric for metric in metrics if metric.is_health and metric.high_is_good), None)
    moved = shift(state, base, trait_metric)
    if quality is None or moved is None or abs(moved) < least_shift(trait_metric):
        return None
    now = state.metrics.get(quality.name)
    then = base.metrics.get(quality.name)
    if not now or not then or not 0 < now / then < math.inf:
        return None
    return 100 * math.log(now / then) / abs(moved)


@dataclass(frozen=True, kw_only=True)
class Kept:
    """How much of the shift of its contrast pairs a state keeps under attack: 1 all, 0 none, negative the opposite."""

    shares: Mapping[str, float]
    """By attack."""

    @property
    def mean(self) -> float:
        return fmean(self.shares.values())

    @property
    def worst(self) -> str:
        """The attack under which the least is kept."""
        return min(self.shares, key=self.shares.__getitem__)


def kept(state: Measured, run: Run) -> Kept | None:
    """For each attack, the mean shift of the pairs under it, divided by their mean shift without an attack.

    A shift under attack is that from the base's items `attack_reference`. None: no attack was measured, or the shift
    without one is too small for a ratio.
    """
    base = run.measured("base")
    return None if base is None else kept_of(state.items, base.items, run.start.wording.get("attack", ()))


def blind(run: Run) -> list[str]:
    """In words, each metric that must tell the persona prompt from the base and does not."""
    prompted = run.measured("prompted")
    if prompted is None:
        return []
    told = []
    for metric in run.metrics.values():
        value, low, high = (prompted[f"{metric.name}{end}"] for end in ("", "_lo", "_hi"))
        if metric.reads_persona and value is not None and not (low or 0.0) > 0:
            words = interval_words(low, high, metric) or "unknown"
            told.append(f"{title(metric)} does not tell the persona prompt from the base (95 % interval {words})")
    return told


def kept_of(
    here: Mapping[str, Sequence[float]], base: Mapping[str, Sequence[float]], attacks: Iterable[Sequence[str]]
) -> Kept | None:
    """As `kept`, of the items of a state and of the base. `attacks`: the name and kind of each."""
    whole = mean_change(here.get(under_attack(), ()), base.get(under_attack(), ()))
    if whole is None or abs(whole) < SMALLEST_SHARE * PAIR_MOVED:
        return None
    shares = {}
    for name, kind in attacks:
        reference = base.get(attack_reference(name, kind == OPPOSES), ())
        change = mean_change(here.get(under_attack(name), ()), reference)
        if change is not None:
            shares[name] = change / whole
    return Kept(shares=shares) if shares else None


def table(run: Run) -> list[TableRow]:
    """One row a state: the trait's metric, its shift from base with the 95 percent interval, retain, slope, and the
    shown metrics."""
    target = run.trait_metric
    base = run.measured("base")
    rows: list[TableRow] = []
    for m in run.each(Measured):
        row: TableRow = {"state": m.label, target.name: m[target.name], "shift": None}
        row |= {"lo": m[f"{target.name}_lo"], "hi": m[f"{target.name}_hi"], "retain": None, "slope": None}
        if base is not None and m is not base:
            row["shift"] = shift(m, base, target)
            row["slope"] = slope(m, base, target, run.metrics.values())
            steered = run.measured("steered", m.round)
            if m.state == "healed" and steered is not None:
                row["retain"] = retain(m, steered, base, target)
        row |= {name: m[name] for name, metric in run.metrics.items() if metric.shown and name != target.name}
        rows.append(row)
    return rows


# --- numbers in words --------------------------------------------------------------------------------------------
def number(value: float | str | None, form: str, missing: str = "?") -> str:
    """The value in the format; `missing` for a number that is not finite or was not measured."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return missing
    return format(value, form)


def signed(metric: Metric) -> str:
    """Format of a shift of the metric."""
    return "+" + metric.form.lstrip("+")


def shift_words(value: float | None, metric: Metric) -> str:
    """A shift of the metric with its unit: -0.820 nats."""
    return f"{number(value, signed(metric))} {metric.unit}".rstrip()


def interval_words(low: float | None, high: float | None, metric: Metric) -> str:
    """An interval of a shift: -0.4 to +0.1. Empty where an end is missing."""
    return "" if low is None or high is None else f"{number(low, signed(metric))} to {number(high, signed(metric))}"


def title(metric: Metric) -> str:
    return metric.title or metric.name


def attack_title(name: str) -> str:
    """An attack as people read it: `opposite persona`."""
    return name.replace("_", " ")


def direction(sign: int) -> str:
    return "down" if sign < 0 else "up"


def health_words(state: Measured, health: Iterable[Metric], limit: Literal["good", "broken"] | None = None) -> str:
    """The value of each health metric. With `limit`, a value past it also names the limit: broken texts 31% (limit
    10%)."""
    told = []
    for metric in health:
        value = state[metric.name]
        words = f"{title(metric)} {number(value, metric.form)}"
        at = getattr(metric, limit) if limit else None
        if value is not None and not metric.within(value, at):
            words += f" (limit {number(at, metric.form if metric.form.endswith('%') else 'g')})"
        told.append(words)
    return ", ".join(told)


# --- grades ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Graded:
    """A healed state, its grade, and why."""

    state: Measured
    grade: str
    shift: float | None
    """Shift of the trait's metric from base, in its unit."""
    reason: str
    healthy: bool = False
    """Whether every health metric is at its `good` limit or better."""


def health_of(metrics: Iterable[Metric]) -> list[Metric]:
    """The metrics that say whether a model is intact."""
    return [metric for metric in metrics if metric.is_health]


def grade(state: Measured, run: Run) -> Graded:
    """The grade of a healed state. In this order: is the model intact, did the trait move, and did it move alone?"""
    base = run.measured("base")
    assert base is not None, "base is measured first"
    target = run.trait_metric
    health = health_of(run.metrics.values())
    moved = shift(state, base, target)
    unread = [metric.name for metric in (target, *health) if state[metric.name] is None]
    if moved is None or unread:
        reason = f"no item has a value of {', '.join(unread or [target.name])}"
        return Graded(state=state, grade="UNREADABLE", shift=moved, reason=reason)
    went = f"after {round_name(state.round)} {target.name} is {shift_words(moved, target)} from base"
    if past := _past_limits(state, run):
        reason = f"{went}, but the model is broken: {health_words(state, past, 'broken')}"
        if not all(metric.within(base[metric.name] or 0.0, metric.broken) for metric in past):
            reason += f"; the untouched model already is past a limit: {health_words(base, past, 'broken')}"
        return Graded(state=state, grade="BROKEN", shift=moved, reason=reason)
    condition = health_words(state, health, "good") or "no eval measures whether the model is intact"
    healthy = bool(health) and all(metric.within(state[metric.name] or 0.0, metric.good) for metric in health)
    if (small := _not_moved(state, target, moved, run.start.trait.sign)) is not None:
        found, why = small
        return Graded(state=state, grade=found, shift=moved, reason=f"{went}{why}; {condition}", healthy=healthy)
    alone, others = _others(state, base, moved, run)
    wanted = f"{went}, {direction(run.start.trait.sign)} as wanted{_prompt_words(moved, base, run)}"
    parts = [wanted, *_control_words(base, run), *_kept_words(state, run), condition, *others]
    found = "GOOD" if healthy and alone else "MIXED"
    return Graded(state=state, grade=found, shift=moved, reason="; ".join(parts), healthy=healthy)


def _past_limits(state: Measured, run: Run) -> list[Metric]:
    """The health metrics whose value says that the model is broken. A metric without a value is none of them."""
    health = health_of(run.metrics.values())
    values = {metric: state[metric.name] for metric in health}
    return [metric for metric, value in values.items() if value is not None and not metric.within(value, metric.broken)]


def _not_moved(state: Measured, target: Metric, moved: float, sign: int) -> tuple[str, str] | None:
    """(grade, why) of a trait that went the wrong way or hardly moved; None: it moved."""
    low = state[f"{target.name}_lo"]
    high = state[f"{target.name}_hi"]
    known = low is not None and high is not None
    holds_0 = low is not None and high is not None and low <= 0 <= high
    if moved * sign < 0 and abs(moved) >= least_shift(target) and not holds_0:
        return "WRONG WAY", f" and should go {direction(sign)}"
    least = target.moved or 0.0
    if abs(moved) >= least and known and not holds_0:
        return None
    told = interval_words(low, high, target) or "unknown"
    unit = f"{least:g} {target.unit}".rstrip()
    return "SMALL SHIFT", f" (95 % interval {told}); a shift counts from {unit}, with an interval that excludes 0"


def _others(state: Measured, base: Measured, moved: float, run: Run) -> tuple[bool, list[str]]:
    """(whether every off-target has a value and moved less than the trait; in words the one that moved most, and those
    without a value)."""
    metrics = [metric for name, metric in run.metrics.items() if name in run.start.trait.off_targets]
    found = {metric: shift(state, base, metric) for metric in metrics}
    shifts = {metric: value for metric, value in found.items() if value is not None}
    unread = [f"the off-target metric {title(metric)} has no value" for metric in metrics if metric not in shifts]
    if not shifts:
        return not unread, unread
    widest = max(shifts, key=lambda metric: abs(shifts[metric]))
    near = abs(shifts[widest]) < abs(moved)
    far = ("most" if len(metrics) > 1 else "less than the target") if near else "further than the target"
    told = f"of the off-target metrics, {title(widest)} moved {far}: {shift_words(shifts[widest], widest)}"
    return near and not unread, [told, *unread]


def _prompt_words(moved: float, base: Measured, run: Run) -> str:
    """The shift as a share of the persona prompt's, if that moves the trait's metric the wanted way."""
    prompted = run.measured("prompted")
    by_prompt = None if prompted is None else shift(prompted, base, run.trait_metric)
    if by_prompt is None or by_prompt * run.start.trait.sign < least_shift(run.trait_metric):
        return ""
    return f", {number(100 * moved / by_prompt, '.0f')} percent of what the persona prompt does"


def _control_words(base: Measured, run: Run) -> list[str]:
    """How far the control moved the trait's metric."""
    control = run.measured("control")
    moved = None if control is None else shift(control, base, run.trait_metric)
    words = number(moved, signed(run.trait_metric))
    return [] if moved is None else [f"the control, healed once on unsteered text, is {words}"]


def _kept_words(state: Measured, run: Run) -> list[str]:
    """How much of the shift is left under attack."""
    found = kept(state, run)
    if found is None:
        return []
    mean, worst = (number(100 * share, ".0f") for share in (found.mean, found.shares[found.worst]))
    return [f"under attack keeps {mean} percent, at worst {worst} ({attack_title(found.worst)})"]


def best_round(run: Run) -> Graded | None:
    """The intact round of the best grade, among those that were kept. Among equals, one whose health is good comes
    first, then the one whose trait moved furthest the wanted way. None where no round is intact, or the model is
    untrained."""
    if run.untrained:
        return None
    graded = [grade(m, run) for m in run.each(Measured) if m.state == "healed" and m.round in run.rounds]
    intact = [each for each in graded if each.grade in GRADES]
    sign = run.start.trait.sign
    return min(
        intact, key=lambda each: (GRADES.index(each.grade), not each.healthy, -sign * (each.shift or 0.0)), default=None
    )


def chosen_round(run: Run, which: RoundName = "best", *, allow_broken: bool = False) -> int:
    """The round that was asked for, among those that were kept. Where no round is best, `best` is the last.

    A number counts from 1. UserError where there is none, or its model is broken or cannot be judged and that is
    not allowed.
    """
    if not run.rounds:
        if ended := ended_early(run):
            raise UserError(f"{ended}; make a new run with a lower --heal.lr, or a weaker teacher")
        if run.dead_end:
            raise UserError(f"the run has no healed round, and cannot go on: {run.dead_end}")
        raise UserError("the run has no healed round; continue it with `steer-heal resume`")
    best = best_round(run)
    r = which - 1 if isinstance(which, int) else run.rounds[-1]
    if which == "best" and best is not None:
        r = best.state.round
    healed = run.measured("healed", r)
    if r not in run.rounds or healed is None:
        dropped = [event for event in run.each(Dropped) if event.round == r]
        why = f"was dropped ({'; '.join(dropped[-1].past)})" if dropped else "does not exist"
        rounds = "round 1" if len(run.rounds) == 1 else f"rounds 1 to {len(run.rounds)}"
        raise UserError(f"{round_name(r)} {why}; the run has {rounds}")
    if not (run.untrained or allow_broken) and (found := grade(healed, run)).grade not in GRADES:
        past = _past_limits(healed, run)
        why = health_words(healed, past, "broken") if past else found.reason
        other = "no round is intact" if best is None else f"take {round_name(best.state.round)}"
        taken = f"--allow-broken takes {round_name(r)} all the same"
        raise UserError(f"{round_name(r)} is {found.grade}: {why}; {other}; {taken}")
    return r


def round_words(run: Run, r: int) -> str:
    """A kept round, what it was graded, and whether it is the best one: round 2 of 3 (MIXED, the best)."""
    best = best_round(run)
    healed = run.measured("healed", r)
    found = [] if run.untrained or healed is None else [grade(healed, run).grade]
    found += ["the best"] if best is not None and best.state.round == r else []
    return f"{round_name(r)} of {len(run.rounds)}" + (f" ({', '.join(found)})" if found else "")


def exit_status(run: Run) -> int:
    """The verdict on the last healed round as an exit status: one of STATUSES, else 6."""
    return STATUSES.get(verdict(run).partition(":")[0], 6)


def verdict(run: Run) -> str:
    """One line: the grade of the last healed round and why, the best round where it is another, and why the run ended
    early, if it did."""
    ended = ended_early(run)
    healed = [m for m in run.each(Measured) if m.state == "healed"]
    if not healed and not ended:
        return "no healed round yet"
    if run.untrained:
        return "; ".join(filter(None, (UNTRAINED, ended)))
    if not healed:
        return f"BROKEN: no round is intact; {ended}"
    last = grade(healed[-1], run)
    best = best_round(run)
    parts = [f"{last.grade}: {last.reason}"]
    if best is not None and best.state.round != last.state.round:
        parts.append(_best_words(best, run))
    parts += [f"{each}, so do not read it" for each in blind(run)]
    return "; ".join([*parts, *filter(None, [ended])])


def _best_words(best: Graded, run: Run) -> str:
    """best round: 2 (MIXED, -0.82 nats, broken texts 10%): ckpt/r1."""
    r = best.state.round
    assert r is not None
    health = health_words(best.state, health_of(run.metrics.values()))
    why = ", ".join(filter(None, (best.grade, shift_words(best.shift, run.trait_metric), health)))
    trained = run.at(Trained, r)
    saved = f": {trained.checkpoint}" if trained is not None and trained.checkpoint else ""
    return f"best round: {r + 1} ({why}){saved}"


def ended_early(run: Run) -> str:
    """Why the run ended before the last round that it was asked for; empty where it did not."""
    dropped = run.each(Dropped)
    if not dropped or dropped[-1].round in run.rounds:
        return ""
    r = dropped[-1].round
    assert r is not None
    if sum(event.round == r for event in dropped) <= run.start.config.backtrack.retries:
        return ""
    kept = f"the last intact round is {r}" if r > 0 else "no round was kept"
    return f"{kept}: {round_name(r)} was dropped ({'; '.join(dropped[-1].past)})"


# --- limits of a round -------------------------------------------------------------------------------------------
def limits(metrics: Sequence[Metric], base: EvalResult, cfg: BacktrackCfg, seed: int) -> dict[str, float]:
    """The value that each metric may reach: the one that is set or, for a health metric, the bad end of the base's own
    95 percent interval, or `good` where that allows more."""
    out = dict(cfg.limits)
    for metric in metrics:
        if metric.name in out or not metric.is_health:
            continue
        low, high = own_interval(base.items[metric.item], seed, metric.how)
        if math.isfinite(low):  # else too few items of the base have a value
            good = metric.good or 0.0
            out[metric.name] = min(low, good) if metric.high_is_good else max(high, good)
    return out


def own_interval(values: Sequence[float], seed: int, how: How = "mean") -> tuple[float, float]:
    """95 percent interval of the number that a state's items become: of Wilson (1927) for shares, whose items are 0 or
    1, else that of the difference to 0. A share of 0 thus leaves room for a broken text that chance brings."""
    x = np.asarray(values, dtype=np.float64)
    x = x[has_value(how, x)]
    if len(x) < 2:
        return -math.inf, math.inf
    if how == "mean" and np.isin(x, (0.0, 1.0)).all():
        return wilson(int(x.sum()), len(x))
    rng = np.random.default_rng(derive_seed(seed, "limits", len(x)) % 2**32)
    nothing = np.full_like(x, 1.0 if how == "log_mean" else 0.0)
    return of_difference(how, x, nothing, 2000, rng) or (-math.inf, math.inf)


def past_limits(metrics: Sequence[Metric], healed: Values, limits: Mapping[str, float]) -> list[str]:
    """Every limit that a state is past, in words. A metric without a value is past its limit."""
    out = []
    for metric in metrics:
        if metric.name not in limits:
            continue
        limit = limits[metric.name]
        value = healed.get(metric.name)
        if value is None:
            out.append(f"{title(metric)} has no value, the limit is {limit:{metric.form}}")
        elif not metric.within(value, limit):
            form = metric.form
            if f"{value:{form}}" == f"{limit:{form}}":
                form = ".4g"
            out.append(f"{title(metric)} is {value:{form}}, the limit is {limit:{form}}")
    return out
