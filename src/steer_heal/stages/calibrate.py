"""How strong a teacher is at a given divergence from the model: the dose of a vector, or the strength of a contrast."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import torch
from scipy.optimize import brentq
from torch import Tensor

from steer_heal.errors import UserError
from steer_heal.model.lm import LM
from steer_heal.model.steering import Condition
from steer_heal.records import Calibration, Completion, KlProbe
from steer_heal.stages.dose import log_grid
from steer_heal.stages.states import final_states, kl_between

BRACKET = (2.0**-6, 1024.0)
"""Doses searched. KL grows as dose squared, and a vector of length 1 needs about 100 for one nat."""
N_GRID = 17
"""Doses of the first grid over the bracket."""
N_REFINEMENTS = 2
"""Further grids, each between the two neighbours that enclose the target."""
N_INNER = 3
"""New doses in each of them."""
KL_TOLERANCE = 0.01
"""Share of the target by which the KL of a contrast may miss it."""
N_STEPS = 4
"""Steps of the secant method."""
WIDTHS = (0.2, 0.8, 3.0)
"""Distances from the first guess, in the logarithm of the strength, between which a strength is searched."""


def iso_kl_dose(lm: LM, teacher: Condition, texts: Sequence[Completion], target: float) -> Calibration:
    """The dose at which the 95th percentile over positions of KL(teacher || student) first reaches `target` nats.

    Teacher and student both read the student's own `texts`. The dose is 0 if the change from the student's system
    prompt to the teacher's reaches the target alone. UserError if no dose reaches it: the vector has no effect, or was
    extracted in the wrong place.
    """
    plain = final_states(lm, texts)

    def probe(dose: float) -> KlProbe:
        taught = final_states(lm, texts, replace(teacher, dose=dose))
        kl = torch.cat([kl_between(lm, *pair) for pair in zip(taught, plain, strict=True)])
        return KlProbe(dose, kl.quantile(0.95).item())

    undosed = probe(0.0)
    if undosed.kl_p95 >= target:
        return Calibration(0.0, (undosed,))
    probes = [probe(dose) for dose in log_grid(*BRACKET, N_GRID)]
    for _ in range(N_REFINEMENTS):
        low, high = _crossing(probes, target)
        probes += [probe(dose) for dose in log_grid(low.dose, high.dose, N_INNER + 2)[1:-1]]
        probes.sort(key=lambda p: p.dose)
    low, high = _crossing(probes, target)
    # between two neighbours, log KL is close to a line in log dose
    part = math.log(target / low.kl_p95) / math.log(high.kl_p95 / low.kl_p95) if low.kl_p95 > 0 else 1.0
    return Calibration(low.dose * (high.dose / low.dose) ** part, tuple(probes))


def mean_kl(lm: LM, teacher: Sequence[Tensor], student: Sequence[Tensor]) -> float:
    """The mean over all positions of KL(teacher || student) in nats, from final hidden states, each Float[n d].
    UserError if it is not finite."""
    kl = torch.cat([kl_between(lm, *pair) for pair in zip(teacher, student, strict=True)]).mean()
    if not kl.isfinite():
        raise UserError(
            f"the logits of a teacher of model {lm.name!r} are not finite: its strength or dose goes beyond "
            f"{str(lm.head.weight.dtype).removeprefix('torch.')}; start a new run with --dtype float32, or with "
            "another persona or vector",
            resumable=False,
        )
    return kl.item()


def contrast_strength(lm: LM, plain: Sequence[Tensor], difference: Sequence[Tensor], target: float) -> float | None:
    """The strength s at which the mean of KL(teacher || student) is `target` nats, up to KL_TOLERANCE. None: there is
    none. The teacher's states are plain + s * difference, all Float[n d] per text."""

    def kl_at(strength: float) -> float:
        return mean_kl(lm, [h + strength * d for h, d in zip(plain, difference, strict=True)], plain)

    return strength_at(kl_at, target)


def dose_at(lm: LM, steered: Condition, texts: Sequence[Completion], base: Sequence[Tensor], kl: float) -> float | None:
    """The dose of a vector at which the mean of KL(steered || base) along the texts is `kl` nats. None: none is found.
    `base`: the base's final hidden states on them, each Float[n d]."""
    return strength_at(lambda dose: mean_kl(lm, final_states(lm, texts, replace(steered, dose=dose)), base), kl)


def strength_at(kl_at: Callable[[float], float], target: float) -> float | None:
    """The strength of a teacher at which its KL is `target` nats, up to KL_TOLERANCE. None: none is found.

    KL grows nearly as the square of the strength, which gives the first guess. As a rule the secant method is close
    enough at the third reading. Where it is not after N_STEPS, Brent's method searches around the first guess.
    """

    @cache
    def excess(log_strength: float) -> float:
        kl = kl_at(math.exp(log_strength))
        return math.log(kl / target) if kl > 0 else -math.inf

    first = -excess(0.0) / 2
    if not math.isfinite(first):
        return None
    before, guess = 0.0, first
    for _ in range(N_STEPS):
        ahead = excess(guess)
        if abs(ahead) <= KL_TOLERANCE:
            return math.exp(guess)
        slope = (ahead - excess(before)) / (guess - before)
        if not 0 < slope < math.inf or abs(ahead / slope) > WIDTHS[-1]:
            break
        before, guess = guess, guess - ahead / slope
    for width in WIDTHS:
        if excess(first - width) <= 0 <= excess(first + width):
            found = brentq(excess, first - width, first + width, xtol=KL_TOLERANCE / 2)
            return math.exp(float(found))  # pyright: ignore[reportArgumentType]  not asked for its full output
    return None


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
