"""Everyday questions: is the right answer likelier than the wrong one as the model's reply?"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from steer_heal.evals.base import Eval, Items, Subject
from steer_heal.evals.likelihood import own_reply_logp
from steer_heal.inputs.pairs import Question
from steer_heal.model.lm import LM
from steer_heal.model.prompts import require_finite
from steer_heal.model.steering import Condition
from steer_heal.records import Metric


def margins(lm: LM, questions: Sequence[Question], condition: Condition) -> list[float]:
    """For each question, the mean over tokens of log p(right answer) minus that of log p(wrong answer), in nats per
    token.

    The answers are the assistant's replies to the question under `condition`, without the token that ends the turn.
    """
    prompts = [lm.chat(each.question, condition.system) for each in questions]
    answers = [(lm.encode_reply(each.right), lm.encode_reply(each.wrong)) for each in questions]
    logp = own_reply_logp(lm, prompts, answers, condition)
    if not condition.dose:
        require_finite(lm, logp)
    right, wrong = (logp / torch.tensor([[*map(len, each)] for each in answers])).unbind(1)
    return (right - wrong).tolist()


def items(subject: Subject) -> Items:
    """For each question: the margin of the right answer in nats per token, and 1 if it is likelier, otherwise 0. NaN:
    no value."""
    with subject.student.using(subject.state.adapters) as lm:
        found = margins(lm, subject.inputs.everyday, subject.state.condition)
    right = [math.nan if math.isnan(margin) else float(margin > 0) for margin in found]
    return {"everyday": right, "everyday_margin": found}


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
