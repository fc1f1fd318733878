"""The chat template of a model: what it writes, where a reply begins, and what ends it.

It is tried with marks when the model is loaded. A reply is read and trained where the template writes one:

1. Render a user's mark with the tag that opens the assistant's turn: the prompt.
2. Render a user's and an assistant's mark: the conversation, split at the assistant's mark.
3. What the conversation has between the prompt and the mark belongs before each reply: an empty thought, or a channel.
4. What the conversation has after the mark ends the turn.

A template that can leave thinking off is asked to, if it then writes a reply behind the prompt. A thought that the
prompt opens is closed before the reply.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

from steer_heal.errors import UserError
from steer_heal.model.prompts import require_no_marks

SYSTEM, USER, REPLY = "SYSTEM-GOES-HERE", "USER-GOES-HERE", "REPLY-GOES-HERE"
CLOCK = re.compile(r"""strftime_now\(\s*("[^"]*"|'[^']*')\s*\)""")
"""A call by which a template reads the clock."""
OPEN_THOUGHT = re.compile(r"<(\w+)>\s*$")
THOUGHTS = ("think", "thinking", "thought", "reasoning")
CLOSED_THOUGHT = re.compile(rf"(</({'|'.join(THOUGHTS)})>|<channel\|>)\s*$")
Message = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """A chat template that was tried. `of` does that."""

    tokenizer: Any
    name: str
    """The model's, for messages."""
    source: str
    """The template, with a fixed date in the place of the clock."""
    date: str = ""
    """The date that it reads, as YYYY-MM-DD. Empty: it reads none."""
    in_parts: bool = False
    """Whether it takes the content of a message as a list of parts."""
    options: Mapping[str, bool]
    """Variables with which the assistant's turn begins with the reply, not with a thought."""
    takes_system: bool = True
    """Whether it supports system messages. Some templates refuse them, others drop them silently."""
    opening: str = ""
    """What stands between the tag of the assistant's turn and the reply."""
    space: str = ""
    """The spaces before a reply. They are encoded with it."""
    closing: str = ""
    """What follows a reply."""

    @classmethod
    def of(cls, tokenizer: Any, name: str, day: str = "") -> ChatTemplate:
        """The tokenizer's template, tried with marks. `day` is the date that it is to read: by default today's.

        UserError if it drops a message, or writes a reply elsewhere than a model that is asked would.
        """
        source, day = frozen(default_template(tokenizer, name), name, day)
        asked = [{"role": "user", "content": USER}]
        answered = [*asked, {"role": "assistant", "content": REPLY}]
        found = cls(tokenizer=tokenizer, name=name, source=source, date=day, options={})
        if not found._shows(USER, asked):
            found = replace(found, in_parts=True)
        if not found._shows(USER, asked):
            replace(found, in_parts=False).render(asked, add_generation_prompt=True)  # the reason, if it refuses it
            raise UserError(
                f"the chat template of {name!r} drops the user's message, so every prompt would be empty; use a "
                "tokenizer with another template"
            )
        opening, options, closing = found._reply_slot(asked, answered)
        reply = opening.rstrip(" ")
        return replace(
            found,
            opening=reply,
            space=opening[len(reply) :],
            closing=closing,
            options=options,
            takes_system=found._shows(SYSTEM, [{"role": "system", "content": SYSTEM}, *asked]),
        )

    def _shows(self, mark: str, messages: Sequence[Message]) -> bool:
        try:
            return mark in self.render(messages, add_generation_prompt=True)
        except UserError:
            return False

    def _reply_slot(self, asked: Sequence[Message], answered: Sequence[Message]) -> tuple[str, dict[str, bool], str]:
        """(opening, options, closing). UserError if the template opens a turn otherwise than it writes one."""
        opened, mark, closing = self.render(answered).partition(REPLY)
        if not mark:
            raise UserError(f"the chat template of {self.name!r} drops the assistant's message; use another model")
        prompt = self.render(asked, add_generation_prompt=True)
        off = {"enable_thinking": False}
        begun = self.render(asked, add_generation_prompt=True, **off)
        if begun != prompt:  # the template knows the option: without it the model would begin with a thought
            beside, _, after = self.render(answered, **off).partition(REPLY)
            if beside.startswith(begun):
                return beside[len(begun) :], off, after
            if begun.startswith(beside) and CLOSED_THOUGHT.search(begun):
                return "", off, after
        thought = OPEN_THOUGHT.search(prompt)
        named = thought is not None and thought[1] in THOUGHTS
        if opened.startswith(prompt) and not (named and opened == prompt):
            return opened[len(prompt) :], {}, closing
        if thought is not None and prompt.startswith(opened):
            return f"\n</{thought[1]}>\n\n", {}, closing
        if prompt.startswith(opened) and CLOSED_THOUGHT.search(prompt):
            return "", {}, closing
        n = next(i for i in range(len(opened) + 1) if opened[: i + 1] != prompt[: i + 1])
        raise UserError(
            f"the chat template of {self.name!r} opens the assistant's turn with {prompt[n:][:60]!r}, and writes a "
            f"reply behind {opened[n:][:60]!r}: replies would be read where the model never writes one; use a "
            "tokenizer with another template"
        )

    def render(self, messages: Sequence[Message], **how: bool) -> str:
        """The text that the template makes of messages. UserError if it refuses one."""
        given: list[Any] = list(messages)
        if self.in_parts:
            given = [{**each, "content": [{"type": "text", "text": each["content"]}]} for each in messages]
        try:
            how = {**self.options, **how}
            text = self.tokenizer.apply_chat_template(given, chat_template=self.source, tokenize=False, **how)
        except Exception as error:  # a template can raise anything
            roles = " and a ".join(dict.fromkeys(message["role"] for message in messages))
            why = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise UserError(
                f"the chat template of {self.name!r} refuses a {roles} message ({why}); use a model that allows them"
            ) from None
        return str(text)

    def conversation(self, turns: Sequence[str], system: str | None = None, *, thinks: bool = False) -> str:
        """The text of a conversation up to where the assistant's reply begins. `turns` alternate between user and
        assistant; the user has the first and the last.

        If the template does not support system messages, `system` goes before the user's message. Without `system`,
        the template may write its own default system prompt, as it does for every user of the model. With `thinks` the
        text ends with the tag of the assistant's turn, where a model that thinks begins to.
        """
        require_no_marks(self.tokenizer, {"the prompt": (*turns, system or "")})
        first, *rest = turns
        messages = []
        if system and self.takes_system:
            messages.append({"role": "system", "content": system})
        elif system:
            first = f"{system}\n\n{first}"
        roles = ("user", "assistant")
        messages += [{"role": roles[i % 2], "content": turn} for i, turn in enumerate((first, *rest))]
        if thinks:
            return self.render(messages, add_generation_prompt=True, **dict.fromkeys(self.options, True))
        return self.render(messages, add_generation_prompt=True) + self.opening


def default_template(tokenizer: Any, name: str) -> str:
    """The template that a tokenizer uses. UserError if it has none, or several of which none is the default."""
    if tokenizer.chat_template is None:
        raise UserError(
            f"the tokenizer of {name!r} has no chat template, and the vector is extracted at its assistant tag; use an "
            "instruction-tuned model"
        )
    if isinstance(tokenizer.chat_template, str):
        return tokenizer.chat_template
    if "default" not in tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {name!r} has the chat templates {', '.join(tokenizer.chat_template)}, none of which is "
            "called default; keep one of them in its chat_template.jinja"
        )
    return tokenizer.chat_template["default"]


def frozen(source: str, name: str, day: str = "") -> tuple[str, str]:
    """(template that does not read the clock, the date that stands in it). UserError if the clock cannot be fixed."""
    if "strftime_now" not in source:
        return source, ""
    today = date.fromisoformat(day) if day else date.today()
    fixed = CLOCK.sub(lambda call: repr(today.strftime(call[1][1:-1])), source)
    if re.search(r"strftime_now\s*\(", fixed):
        raise UserError(
            f"the chat template of {name!r} reads the clock in a format that it computes, so the same prompt would "
            "change from day to day; write the date into its chat_template.jinja"
        )
    return fixed, today.isoformat()
