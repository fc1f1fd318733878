"""The recipe of a heal: who writes the text, who teaches along it, what is fitted, and what trains beside it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from steer_heal.errors import UserError
from steer_heal.model.steering import Condition, Contrast, Vector
from steer_heal.records import Trait, derive_seed
from steer_heal.settings import CONTRASTS, RunConfig, TeacherName

CONTROL_STREAM = -1
"""Stands for the round in the names of the control's random streams."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one heal is made. `of` gives that of a round, `control` that of the control."""

    name: Literal["round", "control"]
    text: Literal["steered", "own"]
    """Whose text trains: the teacher's, or the student's own under the plain prompt."""
    teacher: TeacherName | None
    """What makes the teacher out of the student. None: nobody teaches."""
    fit: Literal["tokens", "distribution"]
    """What is fitted: the tokens of the text, or the teacher's distribution along it."""
    hold: float = 0.0
    """Share of own text that is written and trains under attacks."""
    rehearsal: int = 0
    """Texts of the base on prompts that have nothing to do with the trait."""

    @classmethod
    def of(cls, cfg: RunConfig) -> Recipe:
        """The recipe of every round, as the settings say."""
        heal = cfg.heal
        return cls(
            name="round",
            text=heal.text,
            teacher=heal.teacher,
            fit=heal.target,
            hold=heal.hold,
            rehearsal=heal.rehearsal,
        )

    @classmethod
    def control(cls) -> Recipe:
        """The tokens of the student's own unsteered text: what training alone does to the trait."""
        return cls(name="control", text="own", teacher=None, fit="tokens")

    @property
    def uses_vector(self) -> bool:
        """Whether the teacher is steered, so that there is a dose to find."""
        return self.teacher in ("vector", "prompt+vector", "contrast+vector")

    def require_vector(self, given: str) -> None:
        """UserError if the teacher uses no vector. `given`: what would have no effect then."""
        if not self.uses_vector:
            raise UserError(
                f"{given} is given: heal.teacher is {self.teacher!r}, which uses no vector; leave it out. The teachers "
                "vector, prompt+vector and contrast+vector use one"
            )

    @property
    def uses_contrast(self) -> bool:
        """Whether the teacher is made of the difference between the two personas."""
        return self.teacher in CONTRASTS

    def teacher_condition(self, trait: Trait, vector: Vector, dose: float, strength: float) -> Condition:
        """What makes the teacher out of the student: the vector at a dose, the positive persona as system prompt, the
        contrast of the personas at a strength, or the vector beside a prompt or a contrast."""
        assert self.teacher is not None, "the control has no teacher"
        steered = Condition("", vector, dose) if self.uses_vector else Condition()
        if self.uses_contrast:
            contrast = Contrast(trait.positive, trait.negative, strength)
            return replace(steered, system=trait.plain_system, contrast=contrast)
        return replace(steered, system=trait.steered_system if self.teacher == "vector" else trait.positive)

    def dosed_condition(self, trait: Trait, vector: Vector, dose: float) -> Condition:
        """As `teacher_condition`, without a contrast: what a dose is chosen by."""
        if self.uses_contrast:
            return Condition(trait.steered_system, vector, dose) if self.uses_vector else Condition(trait.plain_system)
        return self.teacher_condition(trait, vector, dose, strength=0.0)

    def stream(self, r: int | None) -> int:
        """What names the round in random streams."""
        return CONTROL_STREAM if r is None else r

    def heal_seed(self, seed: int, r: int | None) -> int:
        """Seed of the factor, of the held-out prompts and of the batches."""
        return derive_seed(seed, self.stream(r), "control" if self.name == "control" else "heal")
