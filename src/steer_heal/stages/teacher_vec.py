"""Persona pairs -> a vector per layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from steer_heal.lm import LM
from steer_heal.records import Trait, UserError
from steer_heal.stages.bake import Student
from steer_heal.stages.cfg import SteerCfg, layer_band
from steer_heal.steering import Application, Vector
from steer_heal.traits import load_contexts


def teacher_vec(lm: LM, trait: Trait, cfg: SteerCfg) -> Vector:
    """What the positive persona adds to the residual stream after each block of the band, applied as cfg.method does.

    Both personas answer the same contexts; the state is read at the last prompt token, the assistant tag.
    """
    band = layer_band(cfg.layers, len(lm.blocks))
    if not band:
        raise UserError(f"steer.layers is {cfg.layers}: that band holds none of the {len(lm.blocks)} blocks of {lm.name!r}; widen it")
    contexts = load_contexts(cfg)
    positive, negative = ([lm.chat(c, persona) for c in contexts] for persona in (trait.positive, trait.negative))
    if cfg.backend == "steering-lite":
        from steer_heal.stages.steering_lite_backend import steering_lite_vec

        directions = steering_lite_vec(lm, positive, negative, band, cfg)
    else:
        states = last_token_states(lm, [*positive, *negative], band)
        extract = METHODS[cfg.method].extract
        directions = {layer: extract(state[: len(contexts)], state[len(contexts) :]) for layer, state in states.items()}
    if cfg.normalize:
        directions = {layer: direction / direction.norm() for layer, direction in directions.items()}
    return Vector(directions, METHODS[cfg.method].application)


def student_vec(student: Student, trait: Trait, cfg: SteerCfg) -> Vector:
    """Where the adapter moved the residual stream: mean over the contexts of student minus base, under the plain prompt."""
    contexts = [student.lm.chat(context, trait.plain_system) for context in load_contexts(cfg)]
    band = layer_band(cfg.layers, len(student.lm.blocks))
    states = {}
    for which in ("full", "base"):
        with student.gate(which) as lm:
            states[which] = last_token_states(lm, contexts, band)
    return Vector({layer: mean_diff(states["full"][layer], states["base"][layer]) for layer in band})


def mean_diff(positive: Float[Tensor, "i d"], negative: Float[Tensor, "i d"]) -> Float[Tensor, " d"]:
    """Mean of the paired differences (activation addition; Turner et al. 2023, Rimsky et al. 2024)."""
    return (positive - negative).mean(0)


def principal(positive: Float[Tensor, "i d"], negative: Float[Tensor, "i d"]) -> Float[Tensor, " d"]:
    """First principal component of the states after each pair was centred on its own middle (representation
    engineering; Zou et al. 2023), signed like the mean difference and as long as the differences' root mean square along it."""
    differences = positive - negative
    _, sizes, directions = torch.linalg.svd(differences, full_matrices=False)
    direction = directions[0] * sizes[0] / len(differences) ** 0.5
    return direction if direction @ differences.mean(0) >= 0 else -direction


class Method(NamedTuple):
    """How pairs of states become a direction, and how a dose of it acts."""

    extract: Callable[[Tensor, Tensor], Tensor]
    application: Application = "add"


METHODS: dict[str, Method] = {
    "mean_diff": Method(mean_diff),
    "pca": Method(principal),
    "cosine_gated": Method(mean_diff, "cosine_gate"),
    "directional_ablation": Method(mean_diff, "ablate"),
}


class _BandRead(Exception):
    """Ends a forward pass once the last block of the band was read: the blocks and the head above cost nothing."""


@torch.no_grad()
def last_token_states(lm: LM, rows: Sequence[tuple[int, ...]], band: range) -> dict[int, Float[Tensor, "i d"]]:
    """Residual stream after each block of the band at every row's last token, float32 on the CPU."""
    states = {layer: torch.empty(len(rows), lm.width) for layer in band}

    def read_batch(group: list[int]) -> None:
        last = torch.tensor([len(rows[i]) - 1 for i in group], device=lm.device)

        def read(layer: int) -> Callable:
            def hook(_module: torch.nn.Module, _inputs: tuple, output: Tensor | tuple) -> None:
                hidden = output[0] if isinstance(output, tuple) else output
                states[layer][group] = hidden[torch.arange(len(group), device=lm.device), last].float().cpu()
                if layer == band[-1]:
                    raise _BandRead

            return hook

        handles = [lm.blocks[layer].register_forward_hook(read(layer)) for layer in band]
        try:
            lm.hidden([rows[i] for i in group])
        except _BandRead:
            pass
        finally:
            for handle in handles:
                handle.remove()

    lm.in_batches([len(row) for row in rows], read_batch)
    return states


def cosine(a: Vector, b: Vector) -> float:
    """Cosine of two vectors over all their layers together; 0 where one of them is zero."""
    x, y = (torch.cat([v.directions[layer].flatten().float() for layer in sorted(v.directions)]) for v in (a, b))
    return torch.nn.functional.cosine_similarity(x, y, dim=0).item()
