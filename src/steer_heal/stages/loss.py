"""The heal's loss: cross-entropy of each completion, and its divergence to the reference over the same positions.

A position's terms depend on its own hidden state alone. So the head is run forward and backward at once, a chunk of
positions at a time, and what is kept per position are two numbers and their two gradients of width d: no logits
outlive their chunk, and none are computed twice, whatever weights the aggregate and the barrier give them later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from steer_heal.divergence import DIVERGENCES, Divergence, aggregate
from steer_heal.lm import LM
from steer_heal.stages.cfg import HealCfg

CHUNK_BUFFERS = 4
"""float32 tensors of a chunk's positions x vocabulary that live at once: log-probabilities of student and reference,
and two that their divergence is made of. A model with a soft cap on its logits has three more."""


@dataclass(frozen=True)
class Sample:
    """A training sequence under the plain prompt, and the reference's final hidden states at its completion (on the CPU)."""

    prompt_index: int
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    reference: Float[Tensor, "n d"]

    @property
    def ids(self) -> tuple[int, ...]:
        return self.prompt_ids + self.completion_ids


def losses(lm: LM, batch: Sequence[Sample], cfg: HealCfg) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """(cross-entropy per token [b], aggregated divergence [b]) of each completion, in nats.

    Only completion positions reach the head. With cfg.lam 0 no gradient flows through the divergence.
    """
    hidden = lm.hidden([sample.ids for sample in batch])
    lengths = [len(sample.completion_ids) for sample in batch]
    starts = [len(sample.prompt_ids) - 1 for sample in batch]
    nll, divergence = position_terms(
        lm,
        torch.cat([row[start : start + n] for row, start, n in zip(hidden, starts, lengths, strict=True)]),
        torch.cat([sample.reference for sample in batch]).to(lm.device),
        torch.tensor([token for sample in batch for token in sample.completion_ids], device=lm.device),
        DIVERGENCES["kl_rev" if cfg.divergence == "nll" else cfg.divergence], cfg.lam > 0,
    )
    sft = torch.stack([part.mean() for part in nll.split(lengths)])
    return sft, torch.stack([aggregate(part, cfg.aggregate) for part in divergence.split(lengths)])


def position_terms(
    lm: LM, hidden: Float[Tensor, "n d"], reference: Float[Tensor, "n d"], targets: Int[Tensor, " n"], divergence: Divergence, pull: bool = True
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """(-log p(target), divergence to the reference) at each position, in nats; gradients reach `hidden` alone, and
    through the divergence only where it may `pull`."""
    return _PositionTerms.apply(hidden, reference, targets, lm, divergence, pull)


class _PositionTerms(torch.autograd.Function):
    """The terms with their gradients d term / d hidden [n d], which the backward pass only has to weigh and add."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, reference: Tensor, targets: Tensor, lm: LM, divergence: Divergence, pull: bool
    ) -> tuple[Tensor, Tensor]:
        train, size = ctx.needs_input_grad[0], lm.chunk_size
        chunks = zip(hidden.split(size), reference.split(size), targets.split(size), strict=True)
        terms, gradients = zip(*[_chunk(lm, *chunk, divergence, train, train and pull) for chunk in chunks], strict=True)
        nll, kl = (torch.cat(parts) for parts in zip(*terms, strict=True))
        ctx.save_for_backward(*(torch.cat(parts) for parts in zip(*gradients, strict=True)))
        if not pull:
            ctx.mark_non_differentiable(kl)
        return nll, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, on_nll: Tensor, on_kl: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        weighed = [weight[:, None] * gradient for weight, gradient in zip((on_nll, on_kl), ctx.saved_tensors)]
        return sum(weighed).to(ctx.saved_tensors[0].dtype), None, None, None, None, None


def _chunk(
    lm: LM, hidden: Tensor, reference: Tensor, targets: Tensor, divergence: Divergence, train: bool, pull: bool
) -> tuple[tuple[Tensor, Tensor], list[Tensor]]:
    """((nll, divergence) [n], their gradients with respect to `hidden` [n d], as far as they are asked for)."""
    hidden = hidden.detach().requires_grad_(train)
    with torch.set_grad_enabled(train):
        logits = lm.logits(hidden)
    logp, logp_ref = _log_softmax_(logits.detach()), _log_softmax_(lm.logits(reference))
    nll, kl = -logp.gather(-1, targets[:, None])[:, 0], divergence.value(logp, logp_ref)
    gradients = []
    if pull:
        gradients = list(torch.autograd.grad(logits, hidden, divergence.slope(logp, logp_ref, kl), retain_graph=True))
    del logp_ref
    if train:
        slope = logp.exp_().scatter_add_(-1, targets[:, None], logp.new_full((len(logp), 1), -1.0))  # p - [v is the target]
        gradients = [*torch.autograd.grad(logits, hidden, slope), *gradients]
    return (nll, kl), gradients


def _log_softmax_(logits: Float[Tensor, "n v"]) -> Float[Tensor, "n v"]:
    """In place: at 262,144 tokens a copy of one chunk is as large as a small model."""
    return logits.sub_(logits.logsumexp(-1, keepdim=True))
