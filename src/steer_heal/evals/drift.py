"""How far a state has left the base: KL to it along the free text that the state itself wrote."""

from __future__ import annotations

import torch
from torch import Tensor

from steer_heal.evals.base import Eval, Items, Subject
from steer_heal.model.divergence import kl_rev
from steer_heal.model.lm import LM
from steer_heal.records import Metric


def items(subject: Subject) -> Items:
    """Per answer: mean over its positions of KL(state || base), nats."""
    with subject.student.using("base") as lm:
        pairs = zip(subject.hidden, subject.base_hidden, strict=True)
        return {"kl_base": [mean_kl(lm, state, reference) for state, reference in pairs]}


@torch.no_grad()
def mean_kl(lm: LM, state: Tensor, reference: Tensor) -> float:
    """Mean KL(state || reference) in nats over positions, from final hidden states Float[n d]; 0 for an empty text."""
    if not len(state):
        return 0.0
    parts = zip(state.split(lm.chunk_size), reference.split(lm.chunk_size), strict=True)
    kl = torch.cat([kl_rev(lm.logits(s).log_softmax(-1), lm.logits(r).log_softmax(-1)) for s, r in parts])
    return kl.mean().item()


EVAL = Eval(items, (Metric(name="kl_base", item="kl_base", title="KL to base", unit="nats"),))
