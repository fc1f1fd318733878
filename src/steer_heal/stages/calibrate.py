"""The dose at which a vector moves the model by a given divergence: calibration without a filter."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from steer_heal.errors import UserError
from steer_heal.model.decode import Decoding, Row, decode
from steer_heal.model.divergence import kl_rev
from steer_heal.model.lm import LM
from steer_heal.model.steering import Vector, steer
from steer_heal.records import Calibration, KlProbe
from steer_heal.stages.dose import log_grid

BRACKET = (2.0**-6, 1024.0)
"""Doses searched. KL grows as dose squared, and a vector of length 1 needs about 100 for one nat."""
N_GRID, N_REFINEMENTS, N_INNER = 17, 2, 3


def iso_kl_dose(
    lm: LM, vector: Vector, prompts: Sequence[tuple[int, ...]], target: float, n_tokens: int, batch_size: int
) -> Calibration:
    """The dose where the 95th percentile over positions of KL(steered || unsteered) first reaches `target` nats.

    Each probe lets the steered model write `n_tokens` greedily after every prompt and reads both distributions
    along that text. UserError where no dose gets there: the vector has no effect, or was read in the wrong place.
    """
    probes: list[KlProbe] = []

    def probe(doses: Sequence[float]) -> None:
        probes.extend(
            KlProbe(dose, kl)
            for dose, kl in zip(doses, kl_p95(lm, vector, doses, prompts, n_tokens, batch_size), strict=True)
        )
        probes.sort(key=lambda p: p.dose)

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


@torch.no_grad()
def kl_p95(
    lm: LM, vector: Vector, doses: Sequence[float], prompts: Sequence[tuple[int, ...]], n_tokens: int, batch_size: int
) -> list[float]:
    """Per dose: the 95th percentile over prompts and positions of KL(steered || unsteered), nats."""
    rows = [Row(prompt, dose) for dose in doses for prompt in prompts]
    written = decode(lm, rows, vector, Decoding(n_tokens, batch_size, sample=False))
    divergences: list[Tensor] = [torch.empty(0)] * len(rows)
    texts = [row.prompt_ids + ids for row, ids in zip(rows, written, strict=True)]

    def read(group: list[int]) -> None:
        with steer(lm, vector, [rows[i].dose for i in group]):
            steered = lm.hidden([texts[i] for i in group])
        plain = lm.hidden([texts[i] for i in group])
        for b, i in enumerate(group):
            start, n = len(rows[i].prompt_ids) - 1, len(written[i])
            parts = zip(
                steered[b, start : start + n].split(lm.chunk_size),
                plain[b, start : start + n].split(lm.chunk_size),
                strict=True,
            )
            divergences[i] = torch.cat(
                [kl_rev(lm.logits(s).log_softmax(-1), lm.logits(p).log_softmax(-1)) for s, p in parts]
            ).cpu()

    lm.in_batches([len(text) for text in texts], read)
    per_dose = [torch.cat(divergences[k * len(prompts) : (k + 1) * len(prompts)]) for k in range(len(doses))]
    return [kls.quantile(0.95).item() for kls in per_dose]
