"""What the grammar of the toy world says of free text: which sentences are possible, and which side they take."""

from __future__ import annotations

import math

from steer_heal.evals.base import Eval, Items, Subject
from steer_heal.records import Metric
from steer_heal.toylm.oracle import oracle


def items(subject: Subject) -> Items:
    """Per answer: the share of possible sentences and, among those that take a side of any persona pair, the share of
    the positive side (NaN: none takes a side)."""
    judged = [oracle(text.text) for text in subject.texts]
    sides = [(o.n_care + o.n_love, o.n_care + o.n_defer + o.n_love + o.n_deny) for o in judged]
    return {"oracle": [o.share for o in judged], "positive": [positive / n if n else math.nan for positive, n in sides]}


EVAL = Eval(
    items,
    (
        Metric(name="oracle", item="oracle", title="possible sentences"),
        Metric(name="positive_frac", item="positive", title="positive side", shown=False),
    ),
    of="text",
)
