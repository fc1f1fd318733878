"""Contrast pairs: a prompt with two replies, one on each side of a trait. Everyday questions: one right, one wrong."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import ConfigDict, model_validator
from pydantic.dataclasses import dataclass

from steer_heal.errors import Problems
from steer_heal.inputs.alike import alike
from steer_heal.inputs.files import DataFile, Text, parse_jsonl


def require_two(what: str, *sides: str) -> None:
    """ValueError unless the two sides differ and none is empty. `what` names them."""
    if len({side.strip() for side in sides} - {""}) < 2:
        raise ValueError(f"{what}, and not empty")


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Pair:
    """A held-out prompt, and the replies that the positive and the negative persona would give."""

    prompt: Text
    positive: Text
    negative: Text

    @model_validator(mode="after")
    def _check(self) -> Pair:
        require_two("positive and negative must be different replies", self.positive, self.negative)
        return self


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Question:
    """A question with a right and a wrong answer."""

    question: Text
    right: Text
    wrong: Text
    system: str | None = None
    """System prompt in place of the one that the model is read under. None: that one."""

    @model_validator(mode="after")
    def _check(self) -> Question:
        require_two("right and wrong must be different answers", self.right, self.wrong)
        return self


def parse_questions(file: DataFile, *, with_system: bool = True) -> tuple[Question, ...]:
    """The questions of a JSON-lines file. UserError that names each invalid line, each repeated question and, unless
    `with_system`, each that has a system prompt."""
    questions: dict[str, Question] = {}
    problems = Problems()
    for number, each in parse_jsonl(file, Question):
        form = alike(each.question)
        if form in questions:
            problems.found.append(
                f"{file.path} line {number}: question {each.question!r:.80} was used before; keep it once"
            )
        if each.system is not None and not with_system:
            problems.found.append(
                f"{file.path} line {number}: `system` would replace the persona that is measured; remove it, or give "
                "the file as eval.instructions"
            )
        questions.setdefault(form, each)
    problems.raise_if_any()
    return tuple(questions.values())


def parse_pairs(file: DataFile) -> list[tuple[str, Pair]]:
    """(place, pair) of each JSON line with `prompt`, `positive` and `negative`."""
    return [(f"{file.path} line {number}", pair) for number, pair in parse_jsonl(file, Pair)]


def held_out(placed: Iterable[tuple[str, Pair]], prompts: Iterable[str]) -> tuple[Pair, ...]:
    """The pairs without their places. UserError that names each repeated prompt, and each that is in `prompts`."""
    problems = Problems()
    pairs = []
    taken = dict.fromkeys(map(alike, prompts), "is also a prompt of the trait")
    for where, pair in placed:
        form = alike(pair.prompt)
        if form in taken:
            problems.found.append(f"{where}: prompt {pair.prompt!r:.80} {taken[form]}; give the pair another")
        taken.setdefault(form, "was used before")
        pairs.append(pair)
    problems.raise_if_any()
    return tuple(pairs)
