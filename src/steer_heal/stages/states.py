"""What a model has in mind while it reads completions: final hidden states, and how far two of its states are apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from steer_heal.model.divergence import kl_rev
from steer_heal.model.lm import LM
from steer_heal.model.steering import Condition, steer
from steer_heal.records import Completion


@torch.no_grad()
def final_states(lm: LM, completions: Sequence[Completion], condition: Condition | None = None) -> list[Tensor]:
    """Per completion, Float[n d] on the CPU: final hidden states before each of its tokens, under `condition`; without
    one, after the prompt that it trains under."""
    prompts = [c.prompt_ids if condition is None else lm.chat(c.prompt, condition.system) for c in completions]
    vector, dose = (None, 0.0) if condition is None else (condition.vector, condition.dose)
    out: list[Tensor] = [torch.empty(0)] * len(completions)

    def read(group: list[int]) -> None:
        with steer(lm, vector, [dose] * len(group)):
            hidden = lm.hidden([prompts[i] + completions[i].completion_ids for i in group])
        for row, i in enumerate(group):
            start = len(prompts[i]) - 1
            out[i] = hidden[row, start : start + len(completions[i].completion_ids)].to("cpu", copy=True)

    lm.in_batches([len(p) + len(c.completion_ids) for p, c in zip(prompts, completions, strict=True)], read)
    return out


@torch.no_grad()
def kl_between(lm: LM, here: Float[Tensor, "n d"], there: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """KL(here || there) at each position, in nats, on the CPU; from final hidden states."""
    logp = lambda states: lm.logits(states.to(lm.device)).log_softmax(-1)
    parts = zip(here.split(lm.chunk_size), there.split(lm.chunk_size), strict=True)
    return torch.cat([kl_rev(logp(h), logp(t)).cpu() for h, t in parts])
