"""Moral-foundation vignettes, and the instruments that ask them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated

from pydantic import BeforeValidator, ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from steer_heal.errors import Problems, nearest, validated
from steer_heal.inputs.files import DataFile, Text, parse_jsonl, parse_toml

FOUNDATIONS = ("care", "fairness", "loyalty", "authority", "sanctity", "liberty", "social")
"""The seven answers of the moral-foundations eval; `social` is "not morally wrong"."""
LEAST_WORDINGS = 3
"""Minimum number of wordings of an answer in the likelihood instrument. The likelihood of a single sentence depends on
its words as much as on its meaning."""
_COARSE = {name: name for name in FOUNDATIONS} | {"socialnorms": "social", "social norms": "social"}
_SLOTS = {"prompt": ("{vignette}", "{schema}"), "schema": ("{options}",), "option": ("{index}", "{gloss}")}


def _foundation(name: object) -> object:
    """One of FOUNDATIONS. ValueError for an unknown name."""
    if isinstance(name, str):
        if name.lower() not in _COARSE:
            raise ValueError(f"unknown foundation {name!r:.80}; {nearest(name.lower(), _COARSE)}")
        return _COARSE[name.lower()]
    return name


Foundation = Annotated[str, BeforeValidator(_foundation)]


@dataclass(frozen=True)
class Vignette:
    """A scene, and the foundation that it violates. If the scene is ambiguous, `also` is a second foundation.

    In a vignette file `foundation` is called foundation_coarse. Other fields are ignored.
    """

    id: Text
    foundation: Annotated[Foundation, Field(validation_alias="foundation_coarse")]
    text: Text
    also: Foundation | None = None


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Instrument:
    """The wording of the forced choice."""

    name: str
    order: tuple[str, ...]
    """Order of the options in the first frame. The second frame reverses it."""
    prompt: str
    """The user message, with the slots {vignette} and {schema}."""
    schema: str
    """The description of the answer, with the slot {options} for the option lines, joined by newlines."""
    option: str
    """The line of one option, with the slots {index} (its position) and {gloss}."""
    think_open: str
    think_close: str
    nudge: str
    """User turn that ends the thinking. Empty: the answer follows in the same turn."""
    prefill: Text
    """The beginning of the answer, which is forced."""
    gloss: dict[str, str]
    """The words for each foundation."""

    @model_validator(mode="after")
    def _check(self) -> Instrument:
        names = ", ".join(FOUNDATIONS)
        problems = [
            f"{where} must name the seven answers {names} once each"
            for where, given in (("order", self.order), ("[gloss]", self.gloss))
            if sorted(given) != sorted(FOUNDATIONS)
        ]
        for field, slots in _SLOTS.items():
            problems += [f"{field!r} lacks {slot}" for slot in slots if slot not in getattr(self, field)]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def question(self, vignette: str, order: tuple[str, ...]) -> str:
        """The user message that asks about a scene, with the options in the given order."""
        options = "\n".join(
            self.option.replace("{index}", str(i)).replace("{gloss}", self.gloss[name]) for i, name in enumerate(order)
        )
        schema = self.schema.replace("{options}", options)
        return self.prompt.replace("{schema}", schema).replace("{vignette}", vignette)

    def questions(self, vignettes: Sequence[Vignette]) -> list[str]:
        """The user messages of all scenes: each in both frames, one after the other."""
        return [self.question(vignette.text, order) for vignette in vignettes for order in self.frames]

    @property
    def frames(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The two orders in which the options are listed."""
        return self.order, self.order[::-1]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class LikelihoodInstrument:
    """A question about a scene, and the replies that count as its answers."""

    name: str
    prompt: str
    """The user message, with the slot {vignette}."""
    answers: dict[str, tuple[str, ...]]
    """Wordings of each of the seven answers."""

    @model_validator(mode="after")
    def _check(self) -> LikelihoodInstrument:
        problems = []
        if "{vignette}" not in self.prompt:
            problems.append("'prompt' lacks {vignette}")
        if sorted(self.answers) != sorted(FOUNDATIONS):
            problems.append(f"[answers] must name the seven answers {', '.join(FOUNDATIONS)} once each")
        for name, wordings in self.answers.items():
            if len(wordings) < LEAST_WORDINGS:
                problems.append(f"'answers.{name}' has {len(wordings)} wordings: it needs at least {LEAST_WORDINGS}")
            if not all(text.strip() for text in wordings):
                problems.append(f"'answers.{name}' contains an empty wording; write a sentence")
        counts = Counter(text for wordings in self.answers.values() for text in wordings)
        problems += [f"the wording {text!r:.80} occurs {n} times; keep one" for text, n in counts.items() if n > 1]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def question(self, vignette: str) -> str:
        """The user message that asks about a scene."""
        return self.prompt.replace("{vignette}", vignette)


def parse_instrument(file: DataFile) -> Instrument:
    return validated(Instrument, parse_toml(file), str(file.path))


def parse_likelihood(file: DataFile) -> LikelihoodInstrument:
    return validated(LikelihoodInstrument, parse_toml(file), str(file.path))


def parse_vignettes(file: DataFile) -> tuple[Vignette, ...]:
    """The vignettes of a JSON-lines file. UserError that names each invalid line and each repeated id."""
    vignettes: dict[str, Vignette] = {}
    problems = Problems()
    for number, vignette in parse_jsonl(file, Vignette):
        if vignette.id in vignettes:
            problems.found.append(f"{file.path} line {number}: id {vignette.id!r:.80} was used before; ids must differ")
        vignettes[vignette.id] = vignette
    problems.raise_if_any()
    return tuple(vignettes.values())
