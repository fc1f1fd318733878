"""Unrelated system prompts: is an answer that follows one likelier than an answer that does not?"""

from __future__ import annotations

import math
from dataclasses import replace

from steer_heal.evals.base import Eval, Items, Subject, per_token
from steer_heal.evals.everyday import question_margins
from steer_heal.evals.replies import won
from steer_heal.records import Metric


def items(subject: Subject) -> Items:
    """For each system prompt: the margin of the answer that follows it, and 1 if it is likelier, otherwise 0.

    It replaces the plain system prompt, and follows a persona. NaN for a contrast of personas, which it cannot follow.
    """
    condition, asked = subject.state.condition, subject.inputs.instructions
    if condition.system != subject.inputs.trait.plain_system:
        asked = [replace(each, system=f"{condition.system}\n\n{each.system or ''}".strip()) for each in asked]
    found = [math.nan] * len(asked) if condition.contrast else question_margins(subject, asked)
    return {"instructions": won(found), "instructions_margin": found}


EVAL = Eval(
    items,
    (
        Metric(name="instructions_right", item="instructions", title="system prompts followed", form=".0%", good=0.5),
        per_token(name="instructions_nats", item="instructions_margin", title="margin of following", shown=False),
    ),
    of="instruction",
)
