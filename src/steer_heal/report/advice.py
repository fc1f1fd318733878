"""What should hold of the steps of a round, and what to do where it does not: the console says that, the page all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steer_heal.report.measurements import is_untrained, run_start

Event = Mapping[str, Any]


@dataclass(frozen=True)
class Check:
    """A condition on a step, whether it holds, and what to do where it does not."""

    should: str
    holds: bool
    advice: str


def checks(event: Event, events: Sequence[Event]) -> list[Check]:
    """The conditions on the step of an event. What was not measured is not asked. The control, which nobody tunes, and
    an untrained model are asked nothing."""
    asked = _ASKED.get(event["stage"])
    return asked(event, events) if asked is not None and event["round"] >= 0 and not is_untrained(events) else []


def _vector(e: Event, _: Sequence[Event]) -> list[Check]:
    cosine = e["cosine_to_first"]
    if cosine is None:
        return []
    turned = "the vector has turned away from that of round 0: stop at an earlier round"
    return [Check("the vector has a cosine above 0.5 to that of round 0", cosine > 0.5, turned)]


def _dose(e: Event, _: Sequence[Event]) -> list[Check]:
    probes = sorted(e["probes"], key=lambda probe: probe["kappa"])
    if not probes:
        return []
    first, last = (p["n_kept"] / p["n"] for p in (probes[0], probes[-1]))
    lucky = "more text survives at the highest kappa than at the lowest: tighten the filter"
    return [Check("no more text survives at the highest kappa than at the lowest", last <= first, lucky)]


def _calibration(e: Event, _: Sequence[Event]) -> list[Check]:
    probes = sorted(e["probes"], key=lambda probe: probe["dose"])
    known = [p["kl_p95"] for p in probes if p["kl_p95"] is not None]
    if len(known) < 2:
        return []
    falls = "the KL does not rise with the dose: check the vector, or use --dose.mode survival"
    return [Check("the KL rises with the dose", known[-1] > known[0], falls)]


def _heal(e: Event, events: Sequence[Event]) -> list[Check]:
    fits, found = [row["fit"] for row in e["validation"]], []
    known, last = [fit for fit in fits if fit is not None], fits[-1]
    renewed = run_start(events)["config"]["heal"]["refresh_every"] > 0  # the curve is of the first text and teacher
    if known and not renewed:
        low = last is not None and last <= min(known) + 0.02
        rose = "the validation loss rose again: use fewer --heal.epochs"
        found.append(Check("the validation loss ends within 0.02 nats of its lowest value", low, rose))
    if e["lam"] > 0:
        idle = "the barrier hardly acts: use a lower --heal.tau"
        found.append(Check("the barrier acts in a tenth of the steps or more", e["fired"] >= 0.1, idle))
    if e["pressure"] is not None:
        strong = "the barrier undoes the trait: use a lower --heal.lam"
        found.append(Check("the gradient pressure of the barrier is 1 or less", e["pressure"] <= 1, strong))
    return found


def _round(e: Event, _: Sequence[Event]) -> list[Check]:
    cosine = e["cosine_student_teacher"]
    if cosine is None:
        return []
    lost = "the adapter did not learn the direction of the vector"
    return [Check("the adapter's own shift has a cosine of 0.1 or more to the vector", cosine >= 0.1, lost)]


_ASKED: dict[str, Callable[[Event, Sequence[Event]], list[Check]]] = {
    "vector": _vector,
    "dose": _dose,
    "calibration": _calibration,
    "heal": _heal,
    "round": _round,
}
