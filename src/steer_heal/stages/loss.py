"""The heal's loss: cross-entropy of each completion, and its divergence to the reference over the same positions.

A position's terms depend on its own hidden state alone. So the head runs forward and backward at once, a chunk of
positions at a time. Per position two numbers and their two gradients of width d are kept (of a single chunk, the two
gradients at the logits, until the aggregate and the barrier give their weights). Only one chunk is as wide as the
vocabulary at any time, and nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge

from steer_heal.model.divergence import DIVERGENCES, Divergence, aggregate
from steer_heal.model.lm import LM
from steer_heal.settings import HealCfg

CHUNK_BUFFERS = 4
"""float32 tensors of a chunk's positions x vocabulary that live at once: log-probabilities of student and reference,
and two that their divergence is made of. A model with a soft cap on its logits has three more."""


@dataclass(frozen=True)
class Sample:
    """A training sequence under the plain prompt, and the reference's hidden states at its completion, on the CPU."""

    prompt_index: int
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    reference: Float[Tensor, "n d"]

    @property
    def ids(self) -> tuple[int, ...]:
        return self.prompt_ids + self.completion_ids


def completion_states(lm: LM, batch: Sequence[Sample]) -> list[Float[Tensor, "_ d"]]:
    """Final hidden states before each token of each completion; nothing else reaches the head."""
    starts = [len(sample.prompt_ids) - 1 for sample in batch]
    rows = lm.hidden([sample.ids for sample in batch])
    return [
        row[start : start + len(sample.completion_ids)] for row, start, sample in zip(rows, starts, batch, strict=True)
    ]


def losses(
    lm: LM, batch: Sequence[Sample], cfg: HealCfg, states: Sequence[Float[Tensor, "_ d"]] | None = None
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """(cross-entropy per token [b], aggregated divergence [b]) of each completion, in nats.

    `states` are the completions' final hidden states, if known. With cfg.lam 0 the divergence has no gradient.
    """
    states = completion_states(lm, batch) if states is None else states
    lengths = [len(sample.completion_ids) for sample in batch]
    nll, divergence = position_terms(
        lm,
        torch.cat(list(states)),
        torch.cat([sample.reference for sample in batch]).to(lm.device),
        torch.tensor([token for sample in batch for token in sample.completion_ids], device=lm.device),
        DIVERGENCES[cfg.divergence],
        cfg.lam > 0,
    )
    ce = torch.stack([part.mean() for part in nll.split(lengths)])
    return ce, torch.stack([aggregate(part, cfg.aggregate) for part in divergence.split(lengths)])


def position_terms(
    lm: LM,
    hidden: Float[Tensor, "n d"],
    reference: Float[Tensor, "n d"],
    targets: Int[Tensor, " n"],
    divergence: Divergence,
    grad_through_divergence: bool = True,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """(-log p(target), divergence to the reference) at each position, in nats; gradients reach `hidden` alone, and
    through the divergence only where `grad_through_divergence` is set."""
    return _PositionTerms.apply(hidden, reference, targets, lm, divergence, grad_through_divergence)


class _PositionTerms(torch.autograd.Function):
    """The terms, and what the backward pass has to weigh: their gradients d term / d hidden [n d] or, where all
    positions fit one chunk, their slopes d term / d logits [n v], which then go through the head in one product."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        reference: Tensor,
        targets: Tensor,
        lm: LM,
        divergence: Divergence,
        grad_through_divergence: bool,
    ) -> tuple[Tensor, Tensor]:
        train, size = ctx.needs_input_grad[0], lm.chunk_size
        terms, found, ctx.head_vjp = [], [], None
        for chunk in zip(hidden.split(size), reference.split(size), targets.split(size), strict=True):
            values, slopes, head_vjp = _chunk(lm, *chunk, divergence, train, train and grad_through_divergence)
            terms.append(values)
            if head_vjp is not None and len(hidden) > size:
                slopes = [head_vjp(slope)[0] for slope in slopes]
            else:
                ctx.head_vjp = head_vjp
            found.append(slopes)
        ctx.save_for_backward(*(torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*found, strict=True)))  # pyright: ignore
        nll, kl = (torch.cat(parts) for parts in zip(*terms, strict=True))
        if not grad_through_divergence:
            ctx.mark_non_differentiable(kl)
        return nll, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, on_nll: Tensor, on_kl: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        first, *rest = ctx.saved_tensors
        weighed = on_nll[:, None] * first
        for part in rest:
            weighed.addcmul_(on_kl[:, None], part)
        gradient = weighed if ctx.head_vjp is None else ctx.head_vjp(weighed)[0]
        return gradient, None, None, None, None, None


def _chunk(
    lm: LM,
    hidden: Tensor,
    reference: Tensor,
    targets: Tensor,
    divergence: Divergence,
    train: bool,
    grad_through_divergence: bool,
) -> tuple[tuple[Tensor, Tensor], list[Tensor], Callable[[Tensor], tuple[Tensor, ...]] | None]:
    """((nll, divergence) [n], their slopes at the logits [n v] as far as they are asked for, what turns a slope into
    the gradient with respect to `hidden`)."""
    hidden, head_vjp = hidden.detach().requires_grad_(train), None
    with torch.set_grad_enabled(train):
        logits = lm.logits(hidden)
    if train:  # the edge, unlike the logits, holds no memory
        head_vjp = partial(torch.autograd.grad, get_gradient_edge(logits), hidden, retain_graph=True)
    logp, logp_ref = _log_softmax_(logits.detach()), _log_softmax_(lm.logits(reference))
    nll, kl = -logp.gather(-1, targets[:, None])[:, 0], divergence.value(logp, logp_ref)
    slopes = [divergence.gradient(logp, logp_ref, kl)] if grad_through_divergence else []
    if train:  # p - [v is the target]
        slopes.insert(0, logp.exp_().scatter_add_(-1, targets[:, None], logp.new_full((len(logp), 1), -1.0)))
    return (nll, kl), slopes, head_vjp


def _log_softmax_(logits: Float[Tensor, "n v"]) -> Float[Tensor, "n v"]:
    """In place: at 262,144 tokens a copy of one chunk is as large as a small model."""
    return logits.sub_(logits.logsumexp(-1, keepdim=True))
