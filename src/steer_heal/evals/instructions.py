"""Unrelated system prompts: is an answer that follows one likelier than an answer that does not?"""

from __future__ import annotations

from steer_heal.evals.base import Eval, Items, Subject, per_token
from steer_heal.evals.everyday import question_margins
from steer_heal.evals.replies import won
from steer_heal.records import Metric


def items(subject: Subject) -> Items:
    """For each system prompt: the margin of the answer that follows it, and 1 if it is likelier, otherwise 0."""
    found = question_margins(subject, subject.inputs.instructions)
    return {"instructions": won(found), "instructions_margin": found}


EVAL = Eval(
    items,
    (
        Metric(name="instructions_right", item="instructions", title="system prompts followed", form=".0%", good=0.5),
        per_token(name="instructions_nats", item="instructions_margin", title="margin of following", shown=False),
    ),
    of="instruction",
)
