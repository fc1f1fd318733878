"""How far a state has left the base: KL to it along the free text that the state itself wrote."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from steer_heal.divergence import kl_rev
from steer_heal.evals.metrics import Condition, Metric
from steer_heal.lm import LM
from steer_heal.records import Completion
from steer_heal.steering import steer

METRICS = [Metric("kl_base", "kl_base", "mean")]


@torch.no_grad()
def final_states(lm: LM, completions: Sequence[Completion], condition: Condition) -> list[Tensor]:
    """Per completion, Float[n d]: final hidden states at its positions, under the condition that it was written in."""
    prompts = [lm.chat(c.prompt, condition.system) for c in completions]
    out: list[Tensor] = [torch.empty(0)] * len(completions)

    def read(group: list[int]) -> None:
        with steer(lm, condition.vector, [condition.dose] * len(group)):
            hidden = lm.hidden([prompts[i] + completions[i].completion_ids for i in group])
        for row, i in enumerate(group):
            start = len(prompts[i]) - 1
            out[i] = hidden[row, start : start + len(completions[i].completion_ids)].clone()

    lm.in_batches([len(p) + len(c.completion_ids) for p, c in zip(prompts, completions, strict=True)], read)
    return out


@torch.no_grad()
def items(lm: LM, states: Sequence[Tensor], reference: Sequence[Tensor]) -> dict[str, list[float]]:
    """Per completion: mean over its positions of KL(state || base) in nats, from the final hidden states of both."""
    out = []
    for state, ref in zip(states, reference, strict=True):
        parts = zip(state.split(lm.chunk_size), ref.split(lm.chunk_size), strict=True)
        kl = torch.cat([kl_rev(lm.logits(s).log_softmax(-1), lm.logits(r).log_softmax(-1)) for s, r in parts]) if len(state) else state.new_zeros(1)
        out.append(kl.mean().item())
    return {"kl_base": out}
