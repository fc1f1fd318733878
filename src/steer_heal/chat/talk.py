"""Conversations with the states of a round. This module knows no terminal and no browser."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from threading import Lock
from typing import Annotated

from pydantic import Field

from steer_heal.chat import STATES, known_state
from steer_heal.errors import UserError, printable
from steer_heal.model.decode import Decoding, Row, decode
from steer_heal.model.prompts import context_length
from steer_heal.model.state import State
from steer_heal.recipe import Recipe
from steer_heal.records import derive_seed, round_name
from steer_heal.runs.opened import open_bench, put_in, state_of
from steer_heal.runs.stored import FolderRun
from steer_heal.settings import TEACHER_WORDS, RunConfig

HALF_WRITTEN = "\ufffd"
"""Stands for the first bytes of a character until the tokenizer has its last ones."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A conversation with one state, up to the last message of the user."""

    state: str
    turns: Annotated[tuple[str, ...], Field(min_length=1)]
    """Messages of the user and the state in turn. The user has the first and the last."""
    system: str = ""
    """System prompt, which follows the state's own."""
    dose: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """Dose of the steered state. None: the dose of the round."""
    seed: int = 0
    """Seed of the random stream, which also depends on the number of turns and is the same for all states."""


@dataclass(frozen=True)
class Answer:
    text: str
    n_tokens: int
    seconds: float
    cut: bool
    """Whether the limit on new tokens ended it, and not the model."""


class Talk:
    """The states of one round on one loaded model. Answers are written one at a time."""

    def __init__(
        self, run: FolderRun, cfg: RunConfig, r: int, max_new_tokens: int = 256, adapter_scale: float = 1.0
    ) -> None:
        """Loads the model, the student before round r, the factor of the round and its vector.

        UserError if one of them is gone or was changed. `adapter_scale`: see `Student.scaled`.
        """
        self.adapter_scale = adapter_scale
        self.run = run
        self.round = r
        self.max_new_tokens = max_new_tokens
        self.states: dict[str, State] = {name: state_of(run, name, r) for name in STATES}
        self.vector = run.vector(r)
        after = run.checkpoint(r)
        steered = self.states["steered"]
        if r:
            run.checkpoint(r - 1)  # checks its files before the model is loaded
        self.student = open_bench(run, cfg).student
        put_in(run, self.student, steered)
        self.student.restore_round(after)
        self._lock = Lock()

    def about(self, name: str) -> str:
        """A state in words."""
        made_by = TEACHER_WORDS[self.run.start.config.heal.teacher]
        scaled = "" if self.adapter_scale == 1 else f", its adapter times {self.adapter_scale:g}"
        return {
            "base": "the untouched model",
            "prompted": "the untouched model with the persona as system prompt",
            "steered": f"the student before {round_name(self.round)} with {made_by}{scaled if self.round else ''}",
            "healed": f"the student after {round_name(self.round)}{scaled}",
        }[name]

    @property
    def recipe(self) -> Recipe:
        """How the rounds of the run were made."""
        return Recipe.of(self.run.start.config)

    def dose(self, question: Question) -> float:
        """The dose that the state of the question is asked at. UserError if a dose is given and the teacher uses no
        vector."""
        if question.dose is not None:
            self.recipe.require_vector("dose")
        own = self.states[known_state(question.state)].condition.dose
        return own if question.dose is None or question.state != "steered" else question.dose

    def answer(self, question: Question, on_text: Callable[[str], object] = lambda piece: None) -> Answer:
        """The answer of a state.

        UserError if the conversation is too long, or the user does not have the last turn.

        Args:
            on_text: Receives one piece per token as soon as it is written. A piece may be empty. What `on_text` raises
                ends the answer.
        """
        state = self.states[known_state(question.state)]
        began = time.monotonic()
        if len(question.turns) % 2 == 0:
            raise UserError(f"turns holds {len(question.turns)} texts: the user must have the first and the last")
        lm = self.student.lm
        ids: list[int] = []
        shown = 0

        def on_token(_: int, token: int) -> None:
            nonlocal shown
            ids.append(token)
            complete = lm.decode(ids).rstrip(HALF_WRITTEN)
            on_text(complete[shown:])
            shown = max(shown, len(complete))

        how = Decoding(self.max_new_tokens, 1, on_token=on_token)
        with self._lock:  # the tokenizer, too, serves one thread at a time
            condition = replace(state.condition, dose=self.dose(question))
            seed = derive_seed(question.seed, "chat", len(question.turns))
            row = Row.under(condition, partial(self._prompt, question), seed)
            with self.student.scaled(self.adapter_scale), self.student.using(state.adapters):
                decode(lm, [row], self.vector, how)
            text = lm.decode(ids)
        on_text(text[shown:])
        return Answer(text, len(ids), time.monotonic() - began, ids[-1] not in lm.end_ids)

    def _prompt(self, question: Question, persona: str) -> tuple[int, ...]:
        lm = self.student.lm
        turns = [printable(text) for text in question.turns]
        system = "\n\n".join(text for text in (persona, printable(question.system)) if text)
        ids = lm.encode(lm.template.conversation(turns, system))
        limit = context_length(lm)
        if len(ids) + self.max_new_tokens > limit:
            raise UserError(
                f"the conversation has {len(ids)} tokens and an answer up to {self.max_new_tokens}: the context of the "
                f"model has {limit}; begin a new conversation, or lower --max-new-tokens"
            )
        return ids
