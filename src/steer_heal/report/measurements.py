"""What the events say: rows, ratios and the verdict. Pure functions of events.jsonl; no model, no files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steer_heal.records import FOUNDATIONS

Event = Mapping[str, Any]
MEASURED = ("base", "prompted", "control", "steered", "healed")
COHERENCE_BROKEN, COHERENCE_GOOD = 0.85, 0.95
TRAIT_MOVED_NATS = 0.3
SLOPE_GUARD_NATS = 0.05
DEGENERATE_GOOD = 0.1


@dataclass(frozen=True)
class Reading:
    """Metrics of one state in one round; base, prompted and control have round -1."""

    stage: str
    round: int
    metrics: Mapping[str, float | None]

    def __getitem__(self, name: str) -> float | None:
        return self.metrics.get(name)


def nats_name(foundation: str) -> str:
    """The metric of a foundation: auth_nats, care_nats, ..."""
    return f"{'auth' if foundation == 'authority' else foundation}_nats"


def readings(events: Sequence[Event]) -> list[Reading]:
    """Every measured state in the order of the run."""
    return [Reading(e["stage"], e["round"], e["metrics"]) for e in events if e["stage"] in MEASURED]


def target_of(events: Sequence[Event]) -> tuple[str, int]:
    """(target foundation, sign) of the run's trait."""
    trait = next(e for e in events if e["stage"] == "run_start")["trait"]
    if trait["target"] not in FOUNDATIONS:
        raise ValueError(f"the trait's target is {trait['target']!r:.80}, none of {', '.join(FOUNDATIONS)}")
    return trait["target"], trait["sign"]


def shift(reading: Reading, base: Reading, metric: str) -> float | None:
    here, there = reading[metric], base[metric]
    return None if here is None or there is None else here - there


def retain(healed: Reading, steered: Reading, base: Reading, metric: str) -> float | None:
    """Share of the steered shift that the healed student kept: 1 all, 0 undone, negative the wrong way."""
    kept, whole = shift(healed, base, metric), shift(steered, base, metric)
    return None if kept is None or whole is None or abs(whole) < SLOPE_GUARD_NATS else kept / whole


def slope(reading: Reading, base: Reading, metric: str) -> float | None:
    """Centinats of coherence (100 times the change of its log) per nat that the trait moved; negative is a loss.

    None where the trait hardly moved, since a collapsed or idle model would otherwise look perfect.
    """
    moved, here, there = shift(reading, base, metric), reading["coherence"], base["coherence"]
    if moved is None or not here or not there or abs(moved) < SLOPE_GUARD_NATS:
        return None
    return 100 * math.log(here / there) / abs(moved)


def moved_most(reads: Sequence[Reading], target: str) -> str:
    """The foundation besides the target that any healed (else any) state moved most from base."""
    base = next(r for r in reads if r.stage == "base")
    states = [r for r in reads if r.stage == "healed"] or [r for r in reads if r.stage != "base"]
    others = [name for name in FOUNDATIONS if name != target]
    return max(others, key=lambda name: max((abs(shift(r, base, nats_name(name)) or 0.0) for r in states), default=0.0))


def table(events: Sequence[Event]) -> list[dict[str, Any]]:
    """One row a state: where the trait stands, its shift with interval, and how coherent the model is."""
    reads = readings(events)
    target, _ = target_of(events)
    metric = nats_name(target)
    base = next((r for r in reads if r.stage == "base"), None)
    steered: dict[int, Reading] = {r.round: r for r in reads if r.stage == "steered"}
    rows = []
    for r in reads:
        row = {
            "state": r.stage if r.round < 0 else f"{r.stage} r{r.round}",
            metric: r[metric],
            "shift": None if r is base else shift(r, base, metric),
            "lo": r[f"{metric}_lo"], "hi": r[f"{metric}_hi"],
            "retain": retain(r, steered[r.round], base, metric) if r.stage == "healed" and r.round in steered else None,
            "slope": None if r is base else slope(r, base, metric),
            "coherence": r["coherence"], "prefill_nll": r["prefill_nll"], "text_ppl": r["text_ppl_median"], "degenerate": r["degenerate_frac"],
            "kl_base": r["kl_base"], "log_odds": r["persona_log_odds"],
        }
        if r["oracle"] is not None:
            row["oracle"] = r["oracle"]
        rows.append(row)
    return rows


def verdict(events: Sequence[Event]) -> str:
    """One line, checks in order: coherent at all, trait moved, more than the control, surgical, and its price."""
    reads = readings(events)
    target, sign = target_of(events)
    metric = nats_name(target)
    healed = [r for r in reads if r.stage == "healed"]
    if not healed:
        return "no healed round yet"
    base, last = next(r for r in reads if r.stage == "base"), healed[-1]
    moved, coherence = shift(last, base, metric), last["coherence"]
    degenerate = last["degenerate_frac"] or 0.0
    low, high = last[f"{metric}_lo"], last[f"{metric}_hi"]
    if moved is None or coherence is None:
        return "UNREADABLE: the vignettes could not be scored; look at frac_unscorable"
    tail = f"{metric} {moved:+.2f} nats at coherence {coherence:.3f}, degenerate text {degenerate:.0%}"
    if coherence < COHERENCE_BROKEN or degenerate > 0.5:
        return f"BROKEN: {tail}; nothing else counts"
    certain = low is not None and high is not None and (high < 0 if sign < 0 else low > 0)
    if moved * sign < 0 and abs(moved) >= SLOPE_GUARD_NATS:
        return f"WRONG WAY: {tail}; the trait should go {'down' if sign < 0 else 'up'}"
    if abs(moved) < TRAIT_MOVED_NATS or not certain:
        return f"NOT MOVED: {tail}; needs {TRAIT_MOVED_NATS} nats and an interval without 0 [{_sign(low)}, {_sign(high)}]"
    control = next((r for r in reads if r.stage == "control"), None)
    beyond = ""
    if control is not None:
        excess = (moved - (shift(control, base, metric) or 0.0)) * sign
        beyond = f", {excess:.2f} beyond the one-round control"
    others = {name: abs(shift(last, base, nats_name(name)) or 0.0) for name in ("care", "fairness") if name != target}
    wider = [name for name, size in others.items() if size >= abs(moved)]
    surgical = f"moves {', '.join(wider)} as much" if wider else "surgical"
    price = slope(last, base, metric)
    cost = "" if price is None else f", {price:+.2f} centinats of coherence per nat"
    grade = "GOOD" if coherence >= COHERENCE_GOOD and degenerate <= DEGENERATE_GOOD and not wider else "MIXED"
    return f"{grade}: {tail}{beyond}; {surgical}{cost}"


def _sign(value: float | None) -> str:
    return "?" if value is None else f"{value:+.2f}"


def result_row(events: Sequence[Event]) -> dict[str, Any]:
    """What results.tsv says of a finished run: its settings, its last state, its cosines and verdict."""
    start, end = events[0], events[-1]
    cfg, last = start["config"], lambda stage: [e for e in events if e["stage"] == stage][-1]
    return {
        "preset": start["preset"], "model": cfg["model"], "trait": start["trait"]["name"], "seed": cfg["seed"], "n_rounds": cfg["n_rounds"],
        **{name: cfg["heal"][name] for name in ("divergence", "aggregate", "lam", "tau", "reference")}, **table(events)[-1],
        "cosine_to_first": last("vector")["cosine_to_first"], "cosine_student_first": last("round")["cosine_student_first"],
        "wall_s": end["wall_s"], "verdict": end["verdict"],
    }
