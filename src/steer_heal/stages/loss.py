"""The heal's loss: how well each completion is fitted, and its divergence to the reference over the same positions.

What is fitted are the tokens of the completion (cross-entropy) or, where a sample has a teacher, the teacher's
distribution (KL; Hinton et al. 2015).

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
and two that their divergence is made of. A model with a soft cap on its logits has three more. A teacher's distribution
is dropped before the reference is read; its slope, one more, stays."""
KL = {"forward": DIVERGENCES["kl_fwd"], "reverse": DIVERGENCES["kl_rev"]}
"""Distance to the teacher by the name that `heal.kl` takes."""


@dataclass(frozen=True)
class Sample:
    """A training sequence under the plain prompt, and what was read at its completion once, on the CPU."""

    prompt_index: int
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    reference: Float[Tensor, "n d"]
    """Final hidden states of the reference."""
    teacher: Float[Tensor, "n d"] | None = None
    """Final hidden states of the teacher; None: the tokens are fitted."""
    weights: Float[Tensor, " n"] | None = None
    """Of each position in the mean of what is fitted; None: equal."""
    rehearsed: bool = False
    """Whether the prompt has nothing to do with the trait, and the base is the teacher."""

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
    """(fit [b], aggregated divergence [b]) of each completion, in nats. The fit is a mean over positions.

    `states` are the completions' final hidden states, if known. With cfg.lam 0 the divergence has no gradient.
    """
    states = completion_states(lm, batch) if states is None else states
    lengths = [len(sample.completion_ids) for sample in batch]
    taught = [sample.teacher for sample in batch if sample.teacher is not None]
    fit, divergence = position_terms(
        lm,
        torch.cat(list(states)),
        torch.cat([sample.reference for sample in batch]).to(lm.device),
        torch.tensor([token for sample in batch for token in sample.completion_ids], device=lm.device),
        DIVERGENCES[cfg.divergence],
        cfg.lam > 0,
        (torch.cat(taught).to(lm.device), KL[cfg.kl]) if taught else None,
    )
    parts = zip(fit.split(lengths), batch, strict=True)
    fits = torch.stack([weighted_mean(part, sample.weights) for part, sample in parts])
    return fits, torch.stack([aggregate(part, cfg.aggregate) for part in divergence.split(lengths)])


def weighted_mean(terms: Float[Tensor, " n"], weights: Float[Tensor, " n"] | None) -> Float[Tensor, ""]:
    """Mean of a completion's positions; 0 where no position has a weight."""
    if weights is None:
        return terms.mean()
    weights = weights.to(terms.device)
    return (terms * weights).sum() / weights.sum().clamp(min=1.0)


def position_terms(
    lm: LM,
    hidden: Float[Tensor, "n d"],
    reference: Float[Tensor, "n d"],
    targets: Int[Tensor, " n"],
    divergence: Divergence,
    grad_through_divergence: bool = True,
    teacher: tuple[Float[Tensor, "n d"], Divergence] | None = None,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """(fit, divergence to the reference) at each position, in nats: the fit is -log p(target) or, with a `teacher`
    (final hidden states, distance), the distance to its distribution.

    Gradients reach `hidden` alone, and through the divergence only where `grad_through_divergence` is set."""
    return _PositionTerms.apply(hidden, reference, targets, lm, divergence, grad_through_divergence, teacher)


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
        teacher: tuple[Tensor, Divergence] | None,
    ) -> tuple[Tensor, Tensor]:
        train, size = ctx.needs_input_grad[0], lm.chunk_size
        terms, found, ctx.head_vjp = [], [], None
        for start in range(0, len(hidden), size):
            here = slice(start, start + size)
            taught = None if teacher is None else (teacher[0][here], teacher[1])
            chunk = hidden[here], reference[here], targets[here], taught
            values, slopes, head_vjp = _chunk(lm, *chunk, divergence, train, train and grad_through_divergence)
            terms.append(values)
            if head_vjp is not None and len(hidden) > size:
                slopes = [head_vjp(slope)[0] for slope in slopes]
            else:
                ctx.head_vjp = head_vjp
            found.append(slopes)
        ctx.save_for_backward(*(torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*found, strict=True)))  # pyright: ignore
        fit, kl = (torch.cat(parts) for parts in zip(*terms, strict=True))
        if not grad_through_divergence:
            ctx.mark_non_differentiable(kl)
        return fit, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, on_fit: Tensor, on_kl: Tensor) -> tuple[Tensor, None, None, None, None, None, None]:
        first, *rest = ctx.saved_tensors
        weighed = on_fit[:, None] * first
        for part in rest:
            weighed.addcmul_(on_kl[:, None], part)
        gradient = weighed if ctx.head_vjp is None else ctx.head_vjp(weighed)[0]
        return gradient, None, None, None, None, None, None


def _chunk(
    lm: LM,
    hidden: Tensor,
    reference: Tensor,
    targets: Tensor,
    teacher: tuple[Tensor, Divergence] | None,
    divergence: Divergence,
    train: bool,
    grad_through_divergence: bool,
) -> tuple[tuple[Tensor, Tensor], list[Tensor], Callable[[Tensor], tuple[Tensor, ...]] | None]:
    """((fit, divergence) [n], their slopes at the logits [n v] as far as they are asked for, what turns a slope into
    the gradient with respect to `hidden`)."""
    hidden, head_vjp = hidden.detach().requires_grad_(train), None
    with torch.set_grad_enabled(train):
        logits = lm.logits(hidden)
    if train:  # the edge, unlike the logits, holds no memory
        head_vjp = partial(torch.autograd.grad, get_gradient_edge(logits), hidden, retain_graph=True)
    logp, slopes = _log_softmax_(logits.detach()), []
    if teacher is None:
        fit = -logp.gather(-1, targets[:, None])[:, 0]
    else:
        fit, slopes = _to_teacher(lm, logp, *teacher, train)
    logp_ref = _log_softmax_(lm.logits(reference))
    kl = divergence.value(logp, logp_ref)
    if grad_through_divergence:
        slopes.append(divergence.gradient(logp, logp_ref, kl))
    if train and teacher is None:  # p - [v is the target]
        slopes.insert(0, logp.exp_().scatter_add_(-1, targets[:, None], logp.new_full((len(logp), 1), -1.0)))
    return (fit, kl), slopes, head_vjp


def _to_teacher(
    lm: LM, logp: Float[Tensor, "n v"], teacher: Float[Tensor, "n d"], distance: Divergence, train: bool
) -> tuple[Float[Tensor, " n"], list[Tensor]]:
    """(distance to the teacher's distribution, its slope at the logits if asked for)."""
    logp_teacher = _log_softmax_(lm.logits(teacher))
    value = distance.value(logp, logp_teacher)
    return value, [distance.gradient(logp, logp_teacher, value)] if train else []


def _log_softmax_(logits: Float[Tensor, "n v"]) -> Float[Tensor, "n v"]:
    """In place: at 262,144 tokens a copy of one chunk is as large as a small model."""
    return logits.sub_(logits.logsumexp(-1, keepdim=True))
