"""Contrast pairs: how much likelier is the reply on the positive side of the trait? (Rimsky et al. 2024)

This eval works for every trait and tokenizer. It needs neither moral foundations, nor text written by the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from steer_heal.evals.base import Eval, Items, Subject
from steer_heal.inputs.pairs import Pair
from steer_heal.model.lm import LM
from steer_heal.model.prompts import require_finite
from steer_heal.model.steering import Condition, steer
from steer_heal.records import Metric


@torch.no_grad()
def margins(lm: LM, pairs: Sequence[Pair], condition: Condition) -> list[float]:
    """For each pair, the mean over tokens of log p(positive reply) minus that of log p(negative reply), in nats per
    token.

    The replies are the assistant's replies to the prompt under `condition`, without the token that ends the turn.
    """
    prompts = [lm.chat(pair.prompt, condition.system) for pair in pairs]
    replies = [(lm.encode_reply(pair.positive), lm.encode_reply(pair.negative)) for pair in pairs]
    out = [math.nan] * len(pairs)

    def work(group: list[int]) -> None:
        rows = [(i, reply) for i in group for reply in replies[i]]
        with steer(lm, condition.vector, [condition.dose] * len(rows)):
            hidden = lm.completion_hidden([prompts[i] for i, _ in rows], [reply for _, reply in rows])
        nll = lm.nll(torch.cat(hidden), [token for _, reply in rows for token in reply])
        means = [part.mean().item() for part in nll.split([len(reply) for _, reply in rows])]
        for i, positive, negative in zip(group, means[::2], means[1::2], strict=True):
            out[i] = negative - positive

    # a pair counts as two rows that are as long as the longer one
    lm.in_batches([2 * (len(p) + max(map(len, r))) for p, r in zip(prompts, replies, strict=True)], work)
    if not condition.dose:
        require_finite(lm, torch.tensor(out))
    return out


def items(subject: Subject) -> Items:
    """For each pair: its margin in nats per token, and 1 if the positive reply is likelier, otherwise 0. NaN: no
    value."""
    with subject.student.using(subject.state.adapters) as lm:
        found = margins(lm, subject.inputs.pairs, subject.state.condition)
    return {"contrast": found, "contrast_win": [math.nan if math.isnan(m) else float(m > 0) for m in found]}


EVAL = Eval(
    items,
    (
        Metric(
            name="contrast_nats",
            item="contrast",
            title="contrast of pairs",
            form="+.3f",
            unit="nats per token",
            moved=0.05,
        ),
        Metric(name="contrast_win", item="contrast_win", title="pairs won", form=".0%", shown=False),
    ),
    of="pair",
    needs=("pairs",),
)
