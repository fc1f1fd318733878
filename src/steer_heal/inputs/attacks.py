"""Attacks on a trait: other system prompts, instructions, earlier talk and beginnings of a reply, under which a model
should keep it."""

from __future__ import annotations

from collections import Counter
from typing import Annotated

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from steer_heal.errors import validated
from steer_heal.inputs.files import DataFile, Text, parse_toml
from steer_heal.records import NO_ATTACK, Conversation, Trait

NEGATIVE = "{negative}"
"""Stands in a system prompt for the negative persona of the trait."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Attack:
    """What stands around the prompt of a pair."""

    name: Annotated[str, Field(pattern="^[a-z0-9_]+$")]
    opposes: bool
    """Whether it asks for the opposite of the trait, or to drop the trait. Otherwise it changes only the context."""
    system: str | None = None
    """System prompt in place of that of the state. Empty: none, so that the chat template may write its own."""
    before: str = ""
    """Paragraph before the user's message."""
    after: str = ""
    """Paragraph after the user's message."""
    turns: tuple[Text, ...] = ()
    """Earlier messages of the user and the assistant in turn."""
    prefill: str = ""
    """What the reply begins with."""

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.system or "", self.before, self.after, *self.turns, self.prefill)

    @model_validator(mode="after")
    def _check(self) -> Attack:
        around = {"before": self.before, "after": self.after, "prefill": self.prefill}
        problems = []
        if self.name == NO_ATTACK:
            problems.append(f"name is {NO_ATTACK!r}, which stands for no attack; choose another")
        if len(self.turns) % 2:
            problems.append(
                f"turns holds {len(self.turns)} messages: the user has the first and the assistant the last, so the "
                "number must be even; add or remove one"
            )
        if self.system is None and not self.turns and not any(text.strip() for text in around.values()):
            problems.append("the attack is empty; give it system, before, after, turns or prefill")
        texts = [*around.items(), *(("turns", text) for text in self.turns)]
        problems += [
            f"{field} contains {NEGATIVE}, which is replaced in system alone; write it out"
            for field, text in texts
            if NEGATIVE in text
        ]
        if problems:
            raise ValueError("\n".join(problems))
        return self


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class AttackFile:
    """The content of a file of attacks."""

    attack: Annotated[tuple[Attack, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _check(self) -> AttackFile:
        counts = Counter(each.name for each in self.attack)
        if lines := [f"{n} attacks are called {name!r}; names must differ" for name, n in counts.items() if n > 1]:
            raise ValueError("\n".join(lines))
        return self


def parse_attacks(file: DataFile) -> tuple[Attack, ...]:
    """The tables [[attack]] of a TOML file. UserError that names each invalid field and each repeated name."""
    return validated(AttackFile, parse_toml(file), str(file.path)).attack


def attacked(attack: Attack, prompt: str, trait: Trait) -> Conversation:
    """The user's message under the attack."""
    system = None if attack.system is None else attack.system.replace(NEGATIVE, trait.negative)
    message = "\n\n".join(text for text in (attack.before, prompt, attack.after) if text)
    return Conversation(turns=(*attack.turns, message), system=system, prefill=attack.prefill)
