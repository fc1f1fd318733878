"""What the states of a round answer. It knows no terminal and no browser."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Annotated

from pydantic import Field

from steer_heal.errors import UserError, nearest, printable
from steer_heal.model.decode import Decoding, Row, decode
from steer_heal.model.student import AdapterState
from steer_heal.records import derive_seed
from steer_heal.runs.opened import OpenedRun

SHOWN = ("base", "steered", "healed")
"""States that answer unless others are asked for."""
HALF_WRITTEN = "\ufffd"
"""What the tokenizer writes for the first bytes of a character whose last ones are still to come."""


@dataclass(frozen=True)
class State:
    """Which adapters act, under which system prompt, at which dose of the round's vector."""

    adapters: AdapterState
    about: str
    system: str = ""
    dose: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Question:
    """A conversation with one state, up to the user's last message."""

    state: str
    turns: Annotated[tuple[str, ...], Field(min_length=1)]
    """What the user and the state said in turn, the user first and last."""
    system: str = ""
    """System prompt, behind the one that makes the state what it is."""
    dose: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """Of the steered state; None: the round's."""
    seed: int = 0
    """All states draw from the same random stream of this seed and the number of the turn."""


@dataclass(frozen=True)
class Answer:
    text: str
    n_tokens: int
    seconds: float
    cut: bool
    """Whether it ends at the limit on new tokens, not where the model ended it."""


class Talk:
    """The states of one round on one loaded model. One answer is written at a time."""

    def __init__(self, run: OpenedRun, r: int, max_new_tokens: int = 256) -> None:
        """Loads the model, the student before round r, the round's own factor and its vector.

        UserError where one of them is gone or was changed.
        """
        self.run, self.round, self.max_new_tokens, self._lock = run, r, max_new_tokens, Lock()
        self.vector, teacher = run.vector(r), run.teacher(r)
        before, after = run.checkpoint(r - 1) if r else None, run.checkpoint(r)
        self.student = run.load()
        if before is not None:
            self.student.restore(before, r)
        self.student.restore_round(after)
        trait = run.inputs.trait
        own = {"vector": "its vector", "prompt": "the persona as system prompt", "both": "its vector and the persona"}
        steered = f"the student before round {r} with {own[run.cfg.heal.teacher]}"
        self.states = {
            "base": State("base", "the untouched model", trait.plain_system),
            "prompted": State("base", "the untouched model with the persona as system prompt", trait.positive),
            "steered": State("prev", steered, teacher.system, teacher.dose),
            "healed": State("full", f"the student after round {r}", trait.plain_system),
        }

    @property
    def room(self) -> int:
        """Tokens that a conversation may have, so that an answer still fits into what the model reads."""
        config = self.student.lm.model.config.get_text_config()
        return max(1, (getattr(config, "max_position_embeddings", None) or 4096) - self.max_new_tokens)

    def known(self, name: str) -> str:
        """The name itself. UserError where it is no state."""
        if name not in self.states:
            raise UserError(f"there is no state {name!r}: {nearest(name, self.states)}")
        return name

    def answer(self, question: Question, on_text: Callable[[str], object] = lambda piece: None) -> Answer:
        """What the state answers. `on_text` gets each piece as soon as it is written, for every token one, which may be
        empty; what it raises ends the answer. UserError where the conversation is too long or out of turn."""
        state, began = self.states[self.known(question.state)], time.monotonic()
        if len(question.turns) % 2 == 0:
            raise UserError(f"turns holds {len(question.turns)} texts: it must begin and end with the user's")
        lm, ids, told = self.student.lm, [], 0
        dose = question.dose if question.state == "steered" and question.dose is not None else state.dose

        def on_token(_: int, token: int) -> None:
            nonlocal told
            ids.append(token)
            whole = lm.decode(ids).rstrip(HALF_WRITTEN)
            on_text(whole[told:])
            told = max(told, len(whole))

        how = Decoding(self.max_new_tokens, 1, on_token=on_token)
        with self._lock:  # the tokenizer, too, serves one thread at a time
            row = Row(self._prompt(question, state), dose, derive_seed(question.seed, "chat", len(question.turns)))
            with self.student.using(state.adapters):
                decode(lm, [row], self.vector, how)
            text = lm.decode(ids)
        on_text(text[told:])
        return Answer(text, len(ids), time.monotonic() - began, ids[-1] not in lm.end_ids)

    def _prompt(self, question: Question, state: State) -> tuple[int, ...]:
        lm, turns = self.student.lm, [printable(text) for text in question.turns]
        system = "\n\n".join(text for text in (state.system, printable(question.system)) if text)
        ids = lm.encode(lm.conversation(turns, system))
        if len(ids) > self.room:
            raise UserError(
                f"the conversation has {len(ids)} tokens, and the model reads {self.room} before its answer; begin a "
                "new one, or lower --max-new-tokens"
            )
        return ids
