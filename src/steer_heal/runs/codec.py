"""How the result of a step becomes the fields of an event, and back. A number that was not finite is null there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from steer_heal.records import Collected, Completion, DoseProbe, EvalResult, HealReport, Metric, Scored
from steer_heal.settings import RunConfig
from steer_heal.stages.filter import GATES

Event = Mapping[str, Any]


def gate_fields(cfg: RunConfig) -> dict[str, dict[str, Any]]:
    """What readers of the events need to know of each gate."""
    facts = lambda gate: {"measures": gate.measures, "limit": gate.limit_in(cfg.filter), "at_least": gate.at_least}
    return {n: {**facts(gate), "broken": gate.degenerate, "on": n in cfg.filter.gates} for n, gate in GATES.items()}


def gen_fields(collected: Collected) -> dict[str, Any]:
    """Fields of a gen event: every completion with its scores, whether it trains, and why not."""
    order = {id(row): i for i, row in enumerate(collected.kept)}
    rows = [
        {
            **asdict(row.completion),
            "scores": row.scores,
            "keep": row.kept,
            "train": id(row) in order,
            "train_order": order.get(id(row)),
            "failed": row.failed,
            "reasons": row.reasons,
        }
        for row in collected.scored
    ]
    rehearsal = [asdict(completion) for completion in collected.rehearsal]
    return {"n_train": len(collected.kept), "completions": rows, "rehearsal": rehearsal}


def collected_from(gen: Event, dose: Event | None = None) -> Collected:
    """The record of a gen event and its dose event (none: unsteered text)."""
    scored, kept = [], {}
    for row in gen["completions"]:
        scores = {name: math.inf if score is None else score for name, score in row["scores"].items()}
        scored.append(Scored(_completion(row), scores, tuple(row["failed"]), tuple(row["reasons"])))
        if row["train"]:
            kept[row["train_order"]] = scored[-1]
    kappa, probes, top = (1.0, [], 0.0) if dose is None else (dose["kappa"], dose["probes"], dose["dose"])
    in_order = tuple(kept[i] for i in sorted(kept))
    probed, rehearsal = (DoseProbe(**probe) for probe in probes), (_completion(row) for row in gen["rehearsal"])
    return Collected(in_order, tuple(scored), kappa, tuple(probed), top, tuple(rehearsal))


def _completion(row: Mapping[str, Any]) -> Completion:
    own = {name: row[name] for name in Completion.__dataclass_fields__}
    own |= {name: tuple(own[name]) for name in ("prompt_ids", "completion_ids")}
    return Completion(**own)


def result_from(event: Event, metrics: Sequence[Metric]) -> EvalResult:
    """The metrics and items of an event. Null is an item without a value; of a perplexity (a median), infinity."""
    infinite = {metric.item for metric in metrics if metric.how == "median"}
    null = lambda name: math.inf if name in infinite else math.nan
    items = {name: [null(name) if x is None else x for x in values] for name, values in event["items"].items()}
    return EvalResult(event["metrics"], items, tuple(event.get("texts", ())))


def heal_fields(report: HealReport) -> dict[str, Any]:
    """The report of a heal without its steps, which are events of their own."""
    own = {key: value for key, value in asdict(report).items() if key != "steps"}
    return {**own, "n_steps": len(report.steps), "fired": report.fired, "pressure": report.pressure}
