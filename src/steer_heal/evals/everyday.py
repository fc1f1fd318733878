"""Everyday questions: is the right answer likelier than the wrong one as the model's reply?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from steer_heal.evals.base import Eval, Items, Subject, per_token
from steer_heal.evals.replies import margins, won
from steer_heal.inputs.pairs import Question
from steer_heal.records import Conversation, Metric


def question_margins(subject: Subject, questions: Sequence[Question]) -> list[float]:
    """For each question, the margin of the right answer over the wrong one in nats per token. NaN: no value."""
    asked = [Conversation(turns=(each.question,), system=each.system) for each in questions]
    answers = [(each.right, each.wrong) for each in questions]
    with subject.student.using(subject.state.adapters) as lm:
        return margins(lm, asked, answers, subject.state.condition)


def items(subject: Subject) -> Items:
    """For each question: the margin of the right answer, 1 if it is likelier, and 1 if only the base, or only this
    state, is right. Otherwise 0."""
    found = question_margins(subject, subject.inputs.everyday)
    here = won(found)
    base = here if subject.base is None else subject.base.items["everyday"]
    change = np.subtract(here, base)
    return {
        "everyday": here,
        "everyday_margin": found,
        "everyday_lost": np.maximum(-change, 0).tolist(),
        "everyday_gained": np.maximum(change, 0).tolist(),
    }


EVAL = Eval(
    items,
    (
        Metric(name="everyday_right", item="everyday", title="everyday questions right", form=".0%", good=0.5),
        Metric(name="everyday_lost", item="everyday_lost", title="right only in the base", form=".0%", shown=False),
        Metric(name="everyday_gained", item="everyday_gained", title="wrong only in the base", form=".0%", shown=False),
        per_token(name="everyday_nats", item="everyday_margin", title="margin of right answers", shown=False),
    ),
    of="question",
)
