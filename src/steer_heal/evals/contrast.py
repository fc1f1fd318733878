"""Contrast pairs: how much likelier is the reply on the positive side of the trait? (Rimsky et al. 2024)

This eval works for every trait and tokenizer. It needs neither moral foundations, nor text written by the model.
"""

from __future__ import annotations

from steer_heal.evals.base import Eval, Items, Subject, per_token
from steer_heal.evals.replies import won
from steer_heal.records import PAIR_MOVED, Metric


def items(subject: Subject) -> Items:
    """For each pair: its margin in nats per token, and 1 if the positive reply is likelier, otherwise 0. NaN: no
    value."""
    return {"contrast": subject.margins, "contrast_win": won(subject.margins)}


EVAL = Eval(
    items,
    (
        per_token(
            name="contrast_nats", item="contrast", title="contrast of pairs", moved=PAIR_MOVED, towards_persona=True
        ),
        Metric(name="contrast_win", item="contrast_win", title="pairs won", form=".0%", shown=False),
    ),
    of="pair",
    needs=("pairs",),
)
