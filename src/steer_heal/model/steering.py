"""Steering vectors: methods that extract them, ways in which a dose acts, and the hook on the residual stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from einops import einsum
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from steer_heal.model.lm import LM


@dataclass(frozen=True)
class Vector:
    """A direction Float[d] for each steered block, and the method by which a dose of it acts after that block."""

    directions: Mapping[int, Tensor]
    method: str = "mean_diff"

    def __repr__(self) -> str:
        norms = ", ".join(f"{layer}: {direction.norm():.2f}" for layer, direction in self.directions.items())
        return f"Vector({self.method}, norm by block {{{norms}}})"

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file with one tensor for each block, named by the block's number, counted from 0."""
        tensors = {str(layer): direction.clone().contiguous() for layer, direction in self.directions.items()}
        save_file(tensors, path, metadata={"method": self.method})

    @classmethod
    def load(cls, path: str | Path) -> Vector:
        """Reads a file that `save` wrote. `read_vector` also reads files of other tools, and explains invalid ones."""
        with safe_open(path, "pt") as file:
            layers = sorted(map(int, file.keys()))
            # clone: a tensor in the mapped file may not be aligned as torch's own tensors are
            return cls({layer: file.get_tensor(str(layer)).clone() for layer in layers}, file.metadata()["method"])


@dataclass(frozen=True)
class Contrast:
    """What separates two personas: strength * (positive - negative), as final hidden states on the same text."""

    positive: str
    """System prompt of the persona that is added."""
    negative: str
    """System prompt of the persona that is subtracted."""
    strength: float = 1.0


class Term(NamedTuple):
    """One reading of a text. The weighted sum of all terms is what the model reads under a condition."""

    weight: float
    system: str
    dose: float


@dataclass(frozen=True)
class Condition:
    """The influences on a model besides its weights."""

    system: str = ""
    """System prompt. Empty: without one."""
    vector: Vector | None = None
    dose: float = 0.0
    contrast: Contrast | None = None
    """Added to what the model reads under `system` alone. The dose acts on the two personas, with opposite signs."""

    @property
    def weights(self) -> tuple[float, ...]:
        """The weights of the terms. They sum to 1."""
        return tuple(term.weight for term in self.terms)

    @property
    def terms(self) -> tuple[Term, ...]:
        """The readings of a text that add up to this condition's, each with its weight."""
        if self.contrast is None:
            return (Term(1.0, self.system, self.dose),)
        side = self.contrast
        return (
            Term(1.0, self.system, 0.0),
            Term(side.strength, side.positive, self.dose),
            Term(-side.strength, side.negative, -self.dose),
        )


def weighted(weights: Sequence[float], readings: Sequence[Float[Tensor, "*n d"]]) -> Float[Tensor, "*n d"]:
    """The weighted sum of k readings, in float32. A single reading is returned unchanged.

    The head is linear, so the sum of final hidden states has the weighted sum of the readings' logits. A soft cap on
    the logits acts after the sum.
    """
    if len(readings) == 1:
        return readings[0]
    states = torch.stack([reading.float() for reading in readings])
    return einsum(states, torch.tensor(weights, device=states.device), "k ... d, k -> ... d")


# --- methods: pairs of states [i d] -> direction [d] --------------------------------------------------------------
def mean_diff(positive: Float[Tensor, "i d"], negative: Float[Tensor, "i d"]) -> Float[Tensor, " d"]:
    """Mean of the paired differences (activation addition; Turner et al. 2023, Rimsky et al. 2024)."""
    return (positive - negative).mean(0)


def principal(positive: Float[Tensor, "i d"], negative: Float[Tensor, "i d"]) -> Float[Tensor, " d"]:
    """First principal component of the states, after each pair is centred on its own mean (representation engineering;
    Zou et al. 2023). It has the sign of the mean difference. Its length is the root mean square of the differences
    along it."""
    differences = positive - negative
    _, sizes, directions = torch.linalg.svd(differences, full_matrices=False)
    direction = directions[0] * sizes[0] / len(differences) ** 0.5
    return direction if direction @ differences.mean(0) >= 0 else -direction


# --- how a dose acts on the residual stream -----------------------------------------------------------------------
def add(
    hidden: Float[Tensor, "b s d"], direction: Float[Tensor, " d"], dose: Float[Tensor, "#b 1 1"]
) -> Float[Tensor, "b s d"]:
    """h + dose v (activation addition; Turner et al. 2023)."""
    return hidden + dose * direction


def cosine_gate(
    hidden: Float[Tensor, "b s d"], direction: Float[Tensor, " d"], dose: Float[Tensor, "#b 1 1"]
) -> Float[Tensor, "b s d"]:
    """h + dose |cos(h, v)| v: a soft form of conditional activation steering (Lee et al. 2024)."""
    gate = torch.nn.functional.cosine_similarity(hidden, direction, dim=-1).abs()
    return hidden + dose * gate[..., None] * direction


def ablate(
    hidden: Float[Tensor, "b s d"], direction: Float[Tensor, " d"], dose: Float[Tensor, "#b 1 1"]
) -> Float[Tensor, "b s d"]:
    """h - (h . u) u + dose v with u = v / ||v||, which replaces the component along v (Arditi et al. 2024)."""
    unit = direction / direction.norm()
    component = einsum(hidden, unit, "b s d, d -> b s")
    return hidden - component[..., None] * unit + dose * direction


class Method(NamedTuple):
    """How pairs of states become a direction, and how a dose of it acts."""

    extract: Callable[[Tensor, Tensor], Tensor]
    apply: Callable[[Tensor, Tensor, Tensor], Tensor] = add


METHODS: dict[str, Method] = {
    "mean_diff": Method(mean_diff),
    "pca": Method(principal),
    "cosine_gated": Method(mean_diff, cosine_gate),
    "directional_ablation": Method(mean_diff, ablate),
}
"""Steering methods, by the values of `steer.method`."""


@contextmanager
def steer(lm: LM, vector: Vector | None, doses: Sequence[float]) -> Iterator[Steering]:
    """Inside the context, row b of every batch is steered with `doses[b]` at every position, after each block that the
    vector has a direction for.

    With any method, a dose of 0 does not change its row.
    """
    steering = Steering(torch.tensor(doses, device=lm.device, dtype=torch.float32))
    with ExitStack() as hooks:
        if vector is not None and any(doses):
            method = METHODS[vector.method]
            for layer, direction in vector.directions.items():
                dosed = partial(steering.dosed, method, direction.to(lm.device))
                hooks.enter_context(lm.after_block(layer, dosed))
        yield steering


@dataclass
class Steering:
    """The doses of the rows of the batch. Call `select` when rows leave it."""

    doses: Float[Tensor, " b"]

    def dosed(self, method: Method, direction: Float[Tensor, " d"], hidden: Tensor) -> Tensor:
        dose = self.doses[:, None, None]
        return torch.where(dose == 0, hidden, method.apply(hidden.float(), direction, dose).to(hidden.dtype))

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        self.doses = self.doses[rows]
