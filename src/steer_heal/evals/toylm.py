"""Free text of the toy model, checked against the grammar of the toy world: possible sentences, and their stance."""

from __future__ import annotations

from steer_heal.evals.base import Eval, Items, Subject
from steer_heal.records import Metric
from steer_heal.toylm.oracle import oracle


def items(subject: Subject) -> Items:
    """For each answer: the share of sentences that the grammar can produce, and the share of positive sentences among
    those that take the side of a persona (NaN if there are none)."""
    scores = [oracle(each.text) for each in subject.texts]
    return {"oracle": [score.share for score in scores], "positive": [score.positive_share for score in scores]}


EVAL = Eval(
    items,
    (
        Metric(name="oracle", item="oracle", title="possible sentences"),
        Metric(name="positive_frac", item="positive", title="positive side", shown=False),
    ),
    of="text",
)
