"""Everyday questions: is the right answer likelier than the wrong one as the model's reply?"""

from __future__ import annotations

from steer_heal.evals.base import Eval, Items, Subject
from steer_heal.evals.replies import margins, plain, won
from steer_heal.records import Metric


def items(subject: Subject) -> Items:
    """For each question: the margin of the right answer in nats per token, and 1 if it is likelier, otherwise 0. NaN:
    no value."""
    asked = [plain(each.question) for each in subject.inputs.everyday]
    answers = [(each.right, each.wrong) for each in subject.inputs.everyday]
    with subject.student.using(subject.state.adapters) as lm:
        found = margins(lm, asked, answers, subject.state.condition)
    return {"everyday": won(found), "everyday_margin": found}


EVAL = Eval(
    items,
    (
        Metric(name="everyday_right", item="everyday", title="everyday questions right", form=".0%", good=0.5),
        Metric(
            name="everyday_nats",
            item="everyday_margin",
            title="margin of right answers",
            form="+.3f",
            unit="nats per token",
            shown=False,
        ),
    ),
    of="question",
)
