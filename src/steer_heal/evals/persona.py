"""A trait score that needs no foundation and no judge: which persona would rather have written the text?"""

from __future__ import annotations

import math

from steer_heal.evals.base import Eval, Items, Subject
from steer_heal.records import Metric


def items(subject: Subject) -> Items:
    """Per answer: mean over tokens of log p(token | positive persona) - log p(token | negative persona) under the base.

    Nats per token; above 0 the text is the positive persona's. NaN for an empty text.
    """
    texts, trait = subject.texts, subject.inputs.trait
    rows = [c.completion_ids for c in texts]
    with subject.student.gate("base") as lm:
        positive, negative = (
            lm.completion_nll([lm.chat(c.prompt, side) for c in texts], rows)
            for side in (trait.positive, trait.negative)
        )
    odds = [(n - p).mean().item() if len(p) else math.nan for p, n in zip(positive, negative, strict=True)]
    return {"persona_log_odds": odds}


EVAL = Eval(
    items,
    (
        Metric(
            name="persona_log_odds",
            item="persona_log_odds",
            title="persona log-odds",
            form="+.3f",
            unit="nats a token",
            moved=0.05,
        ),
    ),
)
