"""Everyday questions: is the right answer likelier than the wrong one as the model's reply?"""

from __future__ import annotations

from collections.abc import Sequence

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
    """For each question: the margin of the right answer, and 1 if it is likelier, otherwise 0."""
    found = question_margins(subject, subject.inputs.everyday)
    return {"everyday": won(found), "everyday_margin": found}


EVAL = Eval(
    items,
    (
        Metric(name="everyday_right", item="everyday", title="everyday questions right", form=".0%", good=0.5),
        per_token(name="everyday_nats", item="everyday_margin", title="margin of right answers", shown=False),
    ),
    of="question",
)
