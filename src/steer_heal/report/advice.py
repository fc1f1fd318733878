"""What should hold of the steps of a round, and what to do if it does not.

The console gives the advice only; the page shows every condition.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from steer_heal.events import AnyEvent, Calibrated, Extracted, Gathered, Measured, RoundDone, Run, Trained
from steer_heal.verdict import health_of, health_words


@dataclass(frozen=True)
class Check:
    """A condition on a step, whether it holds, and what to do if it does not."""

    should: str
    holds: bool
    advice: str


def checks(event: AnyEvent, run: Run) -> Iterator[Check]:
    """The conditions on the step of an event that could be checked. There are none on the control, which nobody tunes,
    and on an untrained model."""
    if run.untrained:
        return
    if isinstance(event, Measured) and event.state == "base":
        yield from _base(event, run)
    if event.round is None:
        return
    match event:
        case Extracted(cosine_to_first=cosine) if math.isfinite(cosine):
            turned = "the vector has turned away from that of round 1: stop at an earlier round"
            yield Check("the vector has a cosine above 0.5 to that of round 1", cosine > 0.5, turned)
        case Calibrated():
            probes = sorted(event.calibration.probes, key=lambda probe: probe.dose)
            known = [probe.kl_p95 for probe in probes if math.isfinite(probe.kl_p95)]
            if len(known) > 1:
                falls = "the KL does not rise with the dose: check the vector, or use --dose.mode survival"
                yield Check("the KL rises with the dose", known[-1] > known[0], falls)
        case Gathered() if event.collected.probes:
            probes = sorted(event.collected.probes, key=lambda probe: probe.kappa)
            lucky = "more text survives at the highest kappa than at the lowest: tighten the filter"
            holds = probes[-1].survival <= probes[0].survival
            yield Check("no more text survives at the highest kappa than at the lowest", holds, lucky)
        case Trained():
            yield from _heal(event)
        case RoundDone(cosine_student_teacher=cosine) if math.isfinite(cosine):
            lost = "the adapter did not learn the direction of the vector"
            yield Check("the adapter's own shift has a cosine of 0.1 or more to the vector", cosine >= 0.1, lost)


def _base(base: Measured, run: Run) -> Iterator[Check]:
    """What every round rests on."""
    health = health_of(run.metrics.values())
    past = [metric for metric in health if not metric.within(base[metric.name] or 0.0, metric.broken)]
    broken = (
        f"the untouched model already is past the limit ({health_words(base, past, 'broken')}), and so will be every "
        "round: read its answers in report.html, then give another --model, or looser limits (--filter.ppl-max)"
    )
    yield Check("the untouched model is intact", not past, broken)
    target = run.trait_metric
    items = base.items.get(target.item, ())
    n = sum(map(math.isfinite, items))
    unread = (
        f"the untouched model answers {n} of {len(items)} items of {target.name}: give another --model, or a trait "
        "with a target that needs no choice from a list (likelihood, contrast)"
    )
    yield Check("the untouched model answers half of the items of the trait's metric", 2 * n >= len(items), unread)


def _heal(event: Trained) -> Iterator[Check]:
    fits = [row["fit"] for row in event.validation]
    known = [fit for fit in fits if math.isfinite(fit)]
    if known:
        low = fits[-1] <= min(known) + 0.02
        rose = "the validation loss rose again: use fewer --heal.epochs"
        yield Check("the validation loss ends within 0.02 nats of its lowest value", low, rose)
    if event.lam > 0:
        idle = "the barrier hardly acts: use a lower --heal.tau"
        yield Check("the barrier acts in a tenth of the steps or more", event.fired >= 0.1, idle)
    if event.pressure is not None:
        strong = "the barrier undoes the trait: use a lower --heal.lam"
        yield Check("the gradient pressure of the barrier is 1 or less", event.pressure <= 1, strong)
