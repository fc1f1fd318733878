"""Extracts the steering vector of a trait, and the direction in which adapters moved the residual stream."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from steer_heal.backends import steering_lite
from steer_heal.model.lm import LM
from steer_heal.model.prompts import require_finite
from steer_heal.model.steering import METHODS, Vector, mean_diff
from steer_heal.model.student import Student
from steer_heal.records import Trait
from steer_heal.settings import SteerCfg


def teacher_vec(lm: LM, trait: Trait, contexts: Sequence[str], cfg: SteerCfg) -> Vector:
    """What the positive persona adds to the residual stream after each block of the band.

    Both personas answer the same contexts. Their states are taken at the last prompt token, the assistant tag.
    UserError if the band contains no block.
    """
    band = lm.band("steer.layers", cfg.layers)
    positive, negative = ([lm.chat(c, persona) for c in contexts] for persona in (trait.positive, trait.negative))
    if cfg.backend == "steering-lite":
        directions = steering_lite.extract(lm, positive, negative, band)
    else:
        states = last_token_states(lm, [*positive, *negative], band)
        n = len(contexts)
        extract = METHODS[cfg.method].extract
        directions = {layer: extract(state[:n], state[n:]) for layer, state in states.items()}
    if cfg.normalize:
        directions = {layer: direction / direction.norm() for layer, direction in directions.items()}
    return Vector(directions, cfg.method)


def student_vec(student: Student, trait: Trait, contexts: Sequence[str], cfg: SteerCfg) -> Vector:
    """The direction in which the adapters moved the residual stream: the mean of student minus base over the contexts,
    under the plain prompt."""
    prompts = [student.lm.chat(context, trait.plain_system) for context in contexts]
    band = student.lm.band("steer.layers", cfg.layers)
    states = {}
    for which in ("full", "base"):
        with student.using(which) as lm:
            states[which] = last_token_states(lm, prompts, band)
    return Vector({layer: mean_diff(states["full"][layer], states["base"][layer]) for layer in band})


class _BandRead(Exception):
    """Ends a forward pass after the last block of the band, so that the blocks above and the head do not run."""


@torch.no_grad()
def last_token_states(lm: LM, rows: Sequence[tuple[int, ...]], band: range) -> dict[int, Float[Tensor, "i d"]]:
    """The residual stream after each block of the band at the last token of each row, float32 on the CPU."""
    states = {layer: torch.empty(len(rows), lm.width) for layer in band}

    def read_batch(group: list[int]) -> None:
        last = torch.tensor([len(rows[i]) - 1 for i in group], device=lm.device)

        def read(layer: int, hidden: Tensor) -> None:
            states[layer][group] = hidden[torch.arange(len(group), device=lm.device), last].float().cpu()
            if layer == band[-1]:
                raise _BandRead

        with ExitStack() as hooks, suppress(_BandRead):
            for layer in band:
                hooks.enter_context(lm.after_block(layer, partial(read, layer)))
            lm.hidden([rows[i] for i in group])

    lm.in_batches([len(row) for row in rows], read_batch)
    require_finite(lm, torch.cat(list(states.values())), "hidden states")
    return states


def cosine(a: Vector, b: Vector) -> float:
    """Cosine of two vectors, each taken as one over all its layers. 0 if one of them is zero."""
    x, y = (torch.cat([v.directions[layer].flatten().float() for layer in sorted(v.directions)]) for v in (a, b))
    return torch.nn.functional.cosine_similarity(x, y, dim=0).item()
