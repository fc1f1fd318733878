"""The dose at which a vector moves the model by a given divergence: calibration without a filter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from steer_heal.errors import UserError
from steer_heal.model.lm import LM
from steer_heal.model.steering import Condition
from steer_heal.records import Calibration, Completion, KlProbe
from steer_heal.stages.dose import log_grid
from steer_heal.stages.states import final_states, kl_between

BRACKET = (2.0**-6, 1024.0)
"""Doses searched. KL grows as dose squared, and a vector of length 1 needs about 100 for one nat."""
N_GRID, N_REFINEMENTS, N_INNER = 17, 2, 3


def iso_kl_dose(lm: LM, teacher: Condition, texts: Sequence[Completion], target: float) -> Calibration:
    """The dose where the 95th percentile over positions of KL(teacher || student) first reaches `target` nats.

    Both are read along the student's own `texts`. 0 where the teacher's system prompt alone is past the target.
    UserError where no dose gets there: the vector has no effect, or was read in the wrong place.
    """
    plain, probes = final_states(lm, texts), []

    def read(dose: float) -> KlProbe:
        taught = final_states(lm, texts, replace(teacher, dose=dose))
        kl = torch.cat([kl_between(lm, *pair) for pair in zip(taught, plain, strict=True)])
        return KlProbe(dose, kl.quantile(0.95).item())

    def probe(doses: Sequence[float]) -> None:
        probes.extend(map(read, doses))
        probes.sort(key=lambda p: p.dose)

    if teacher.system and (alone := read(0.0)).kl_p95 >= target:
        return Calibration(0.0, (alone,))
    probe(log_grid(*BRACKET, N_GRID))
    for _ in range(N_REFINEMENTS):
        low, high = _crossing(probes, target)
        probe(log_grid(low.dose, high.dose, N_INNER + 2)[1:-1])
    low, high = _crossing(probes, target)
    # log KL is close to a line in log dose between two neighbours
    part = math.log(target / low.kl_p95) / math.log(high.kl_p95 / low.kl_p95) if low.kl_p95 > 0 else 1.0
    return Calibration(low.dose * (high.dose / low.dose) ** part, tuple(probes))


def _crossing(probes: Sequence[KlProbe], target: float) -> tuple[KlProbe, KlProbe]:
    """Neighbouring probes, the first below the target and the second at or above it."""
    above = next((i for i, p in enumerate(probes) if p.kl_p95 >= target), None)
    if above is None:
        most = max(probes, key=lambda p: p.kl_p95)
        raise UserError(
            f"the vector has no effect: no dose up to {BRACKET[1]:g} moves the model by dose.kl_target = {target:g} "
            f"nats (the most is {most.kl_p95:.3g} at dose {most.dose:g}); choose other --steer.layers or another "
            "persona pair, or lower --dose.kl-target",
            resumable=False,
        )
    if above == 0:
        raise UserError(
            f"dose {BRACKET[0]:g} already moves the model by {probes[0].kl_p95:.3g} nats, more than dose.kl_target = "
            f"{target:g}; raise the target, use --steer.normalize or, with directional_ablation, another method "
            "(removing the component moves the model at any dose)",
            resumable=False,
        )
    return probes[above - 1], probes[above]
