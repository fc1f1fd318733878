"""What should hold of the steps of a round, and what to do if it does not.

The console gives the advice only; the page shows every condition.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from steer_heal.events import AnyEvent, Calibrated, Extracted, Gathered, RoundDone, Run, Trained


@dataclass(frozen=True)
class Check:
    """A condition on a step, whether it holds, and what to do if it does not."""

    should: str
    holds: bool
    advice: str


def checks(event: AnyEvent, run: Run) -> list[Check]:
    """The conditions on the step of an event that could be checked. There are none on the control, which nobody tunes,
    and on an untrained model."""
    if event.round is None or run.untrained:
        return []
    match event:
        case Extracted():
            return _vector(event)
        case Calibrated():
            return _calibration(event)
        case Gathered():
            return _dose(event)
        case Trained():
            return _heal(event, renewed=run.start.config.heal.refresh_every > 0)
        case RoundDone():
            return _round(event)
    return []


def _vector(event: Extracted) -> list[Check]:
    cosine = event.cosine_to_first
    if not math.isfinite(cosine):
        return []
    turned = "the vector has turned away from that of round 0: stop at an earlier round"
    return [Check("the vector has a cosine above 0.5 to that of round 0", cosine > 0.5, turned)]


def _dose(event: Gathered) -> list[Check]:
    probes = sorted(event.collected.probes, key=lambda probe: probe.kappa)
    if not probes:
        return []
    lucky = "more text survives at the highest kappa than at the lowest: tighten the filter"
    holds = probes[-1].survival <= probes[0].survival
    return [Check("no more text survives at the highest kappa than at the lowest", holds, lucky)]


def _calibration(event: Calibrated) -> list[Check]:
    probes = sorted(event.calibration.probes, key=lambda probe: probe.dose)
    known = [probe.kl_p95 for probe in probes if math.isfinite(probe.kl_p95)]
    if len(known) < 2:
        return []
    falls = "the KL does not rise with the dose: check the vector, or use --dose.mode survival"
    return [Check("the KL rises with the dose", known[-1] > known[0], falls)]


def _heal(event: Trained, *, renewed: bool) -> list[Check]:
    """`renewed`: the text was written again during the heal, so that the curve is that of the first text."""
    fits = [row["fit"] for row in event.validation]
    known = [fit for fit in fits if math.isfinite(fit)]
    found = []
    if known and not renewed:
        low = fits[-1] <= min(known) + 0.02
        rose = "the validation loss rose again: use fewer --heal.epochs"
        found.append(Check("the validation loss ends within 0.02 nats of its lowest value", low, rose))
    if event.lam > 0:
        idle = "the barrier hardly acts: use a lower --heal.tau"
        found.append(Check("the barrier acts in a tenth of the steps or more", event.fired >= 0.1, idle))
    if event.pressure is not None:
        strong = "the barrier undoes the trait: use a lower --heal.lam"
        found.append(Check("the gradient pressure of the barrier is 1 or less", event.pressure <= 1, strong))
    return found


def _round(event: RoundDone) -> list[Check]:
    cosine = event.cosine_student_teacher
    if not math.isfinite(cosine):
        return []
    lost = "the adapter did not learn the direction of the vector"
    return [Check("the adapter's own shift has a cosine of 0.1 or more to the vector", cosine >= 0.1, lost)]
