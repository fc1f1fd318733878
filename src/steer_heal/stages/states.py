"""Final hidden states of a model while it reads completions, and the KL divergence between two such readings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from steer_heal.model.divergence import kl_rev
from steer_heal.model.lm import LM
from steer_heal.model.steering import Condition, Term, Vector, steer, weighted
from steer_heal.records import Completion, alone


def final_states(lm: LM, completions: Sequence[Completion], condition: Condition | None = None) -> list[Tensor]:
    """Per completion, the final hidden states before each of its tokens, Float[n d] on the CPU.

    The model reads each completion after its prompt, under `condition`. None: after the prompt it trains under.
    """
    if condition is None:
        return _read(lm, completions, [c.prompt_ids for c in completions])
    readings = [term_states(lm, completions, condition.vector, term) for term in condition.terms]
    return [weighted(condition.weights, states) for states in zip(*readings, strict=True)]


def term_states(lm: LM, completions: Sequence[Completion], vector: Vector | None, term: Term) -> list[Tensor]:
    """As `final_states`, of a single term of a condition."""
    prompts = [lm.prompt(c.taught or alone(c.prompt), term.system) for c in completions]
    return _read(lm, completions, prompts, vector, term.dose)


@torch.no_grad()
def _read(
    lm: LM,
    completions: Sequence[Completion],
    prompts: Sequence[Sequence[int]],
    vector: Vector | None = None,
    dose: float = 0.0,
) -> list[Tensor]:
    """Per completion, the final hidden states before each of its tokens, read after its prompt."""
    out: list[Tensor] = [torch.empty(0)] * len(completions)

    def read(group: list[int]) -> None:
        with steer(lm, vector, [dose] * len(group)):
            hidden = lm.completion_hidden([prompts[i] for i in group], [completions[i].completion_ids for i in group])
        for i, states in zip(group, hidden, strict=True):
            out[i] = states.to("cpu", copy=True)

    lm.in_batches([len(p) + len(c.completion_ids) for p, c in zip(prompts, completions, strict=True)], read)
    return out


@torch.no_grad()
def kl_between(lm: LM, here: Float[Tensor, "n d"], there: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """KL(here || there) in nats at each position, on the CPU, from final hidden states."""
    parts = []
    for h, t in zip(here.split(lm.chunk_size), there.split(lm.chunk_size), strict=True):
        logp, logp_there = (lm.logits(states.to(lm.device)).log_softmax(-1) for states in (h, t))
        parts.append(kl_rev(logp, logp_there).cpu())
    return torch.cat(parts)
