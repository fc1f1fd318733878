"""The heal's loss: how well each example is fitted, and its divergence to the reference over the same positions.

An example is a Sample, one completion to fit: its tokens (cross-entropy) or, with a teacher, the teacher's distribution
(KL; Hinton et al. 2015). Or it is a Pair, two completions of which the first should become the likelier one (direct
preference optimisation; Rafailov et al. 2023).

The head maps hidden states of width d to logits over a vocabulary that can be a hundred times as wide. So that these
logits never exist for all positions at once, the forward and the backward pass of the head run together, one chunk of
positions at a time (`position_terms`):

1. Cut the hidden states of all completions into chunks of `lm.chunk_size` positions. This is allowed because the two
   terms of a position, its fit and its divergence, depend on its own hidden state alone.
2. Compute the logits of a chunk and normalise them in place to log-probabilities. Of the head's graph only the edge is
   kept, which holds no logits.
3. Compute both terms at each position and, by formula, their slopes: the gradients of the terms at the logits [n v].
   The log-probabilities of the teacher and of the reference exist only while they are compared with the student's.
4. Send each slope back through the head. This makes it a gradient at the hidden state [n d]. Keep the two terms and
   the two gradients of each position, drop all that is as wide as the vocabulary, and go on to the next chunk.
5. In the backward pass autograd says how much each term counts in the loss, after the mean, the aggregate and the
   barrier. Scale the kept gradients of each position by these two numbers and add them. Nothing is computed again.

If all positions fit into one chunk, step 4 waits for step 5: the slopes are kept, scaled, added, and sent through the
head in one product in place of two. Either way, memory holds the logits of a single chunk and vectors of width d.
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
"""float32 tensors [positions of a chunk, vocabulary] that exist at once: the log-probabilities of student and
reference, and two tensors from which their divergence is computed. A soft cap on the logits adds three. A teacher adds
one, its slope: its distribution is dropped before the reference is read."""
KL = {"forward": DIVERGENCES["kl_fwd"], "reverse": DIVERGENCES["kl_rev"]}
"""Distance to the teacher by the name that `heal.kl` takes."""


@dataclass(frozen=True)
class Sample:
    """A completion after its plain prompt, with the hidden states that were read once before training, on the CPU."""

    prompt_index: int
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    reference: Float[Tensor, "n d"]
    """Final hidden states of the reference."""
    teacher: Float[Tensor, "n d"] | None = None
    """Final hidden states of the teacher. None: fit the tokens."""
    rehearsed: bool = False
    """Whether the base is the teacher and the prompt is unrelated to the trait."""

    @property
    def ids(self) -> tuple[int, ...]:
        return self.prompt_ids + self.completion_ids

    @property
    def samples(self) -> tuple[Sample, ...]:
        return (self,)

    def fit(self, terms: Float[Tensor, " n"]) -> Float[Tensor, ""]:
        """Mean of the terms of its positions, in nats per token."""
        return terms.mean()


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, of which the chosen one should become the likelier one."""

    chosen: Sample
    rejected: Sample
    reference_margin: float
    """log p(chosen) - log p(rejected) under the reference, in nats."""
    beta: float
    """Scale of the margin: a smaller one lets the student go further from the reference."""

    @property
    def prompt_index(self) -> int:
        return self.chosen.prompt_index

    @property
    def samples(self) -> tuple[Sample, ...]:
        return (self.chosen, self.rejected)

    def fit(self, terms: Float[Tensor, " n"]) -> Float[Tensor, ""]:
        """-log sigmoid(beta * (margin - reference margin)), in nats (Rafailov et al. 2023, equation 7). The terms are
        -log p of the tokens of both answers, and margin = log p(chosen) - log p(rejected)."""
        n_chosen = len(self.chosen.completion_ids)
        margin = terms[n_chosen:].sum() - terms[:n_chosen].sum()
        return -torch.nn.functional.logsigmoid(self.beta * (margin - self.reference_margin))


Example = Sample | Pair
"""What one training example is."""


def n_positions(example: Example) -> int:
    """Completion tokens of an example."""
    return sum(len(sample.completion_ids) for sample in example.samples)


def n_padded(example: Example) -> int:
    """Tokens of an example's rows, padded to the longest of them."""
    return len(example.samples) * max(len(sample.ids) for sample in example.samples)


def completion_states(lm: LM, batch: Sequence[Example]) -> list[Float[Tensor, "_ d"]]:
    """Per example, the final hidden states before each completion token. Nothing else reaches the head."""
    samples = [sample for example in batch for sample in example.samples]
    states = iter(lm.completion_hidden([s.prompt_ids for s in samples], [s.completion_ids for s in samples]))
    return [torch.cat([next(states) for _ in example.samples]) for example in batch]


def losses(
    lm: LM, batch: Sequence[Example], cfg: HealCfg, states: Sequence[Float[Tensor, "_ d"]] | None = None
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """(fit [b], aggregated divergence [b]) of each example, in nats.

    `states` are the final hidden states of the examples, if known. If cfg.lam is 0, the divergence has no gradient.
    """
    if states is None:
        states = completion_states(lm, batch)
    samples = [sample for example in batch for sample in example.samples]
    taught = [sample.teacher for sample in samples if sample.teacher is not None]
    fit, divergence = position_terms(
        lm,
        torch.cat(list(states)),
        torch.cat([sample.reference for sample in samples]).to(lm.device),
        torch.tensor([token for sample in samples for token in sample.completion_ids], device=lm.device),
        DIVERGENCES[cfg.divergence],
        grad_through_divergence=cfg.lam > 0,
        teacher=(torch.cat(taught).to(lm.device), KL[cfg.kl]) if taught else None,
    )
    lengths = [n_positions(example) for example in batch]
    fits = [example.fit(terms) for example, terms in zip(batch, fit.split(lengths), strict=True)]
    divergences = [aggregate(part, cfg.aggregate) for part in divergence.split(lengths)]
    return torch.stack(fits), torch.stack(divergences)


def position_terms(
    lm: LM,
    hidden: Float[Tensor, "n d"],
    reference: Float[Tensor, "n d"],
    tokens: Int[Tensor, " n"],
    divergence: Divergence,
    *,
    grad_through_divergence: bool = True,
    teacher: tuple[Float[Tensor, "n d"], Divergence] | None = None,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """(fit, divergence to the reference) at each position, in nats. The fit is -log p(token) or, with a `teacher`
    (final hidden states, distance), the distance to the teacher's distribution.

    Gradients reach `hidden` alone. They flow through the divergence only if `grad_through_divergence` is set.
    """
    return _PositionTerms.apply(hidden, reference, tokens, lm, divergence, grad_through_divergence, teacher)


class _PositionTerms(torch.autograd.Function):
    """Steps 1 to 5 at the head of this file."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        reference: Tensor,
        tokens: Tensor,
        lm: LM,
        divergence: Divergence,
        grad_through_divergence: bool,
        teacher: tuple[Tensor, Divergence] | None,
    ) -> tuple[Tensor, Tensor]:
        train = ctx.needs_input_grad[0]
        size = lm.chunk_size
        fits, distances, gradients = [], [], []
        ctx.through_head = None
        for start in range(0, len(hidden), size):
            here = slice(start, start + size)
            fit, distance, slopes, through_head = _chunk(
                lm,
                hidden[here],
                reference[here],
                tokens[here],
                teacher=None if teacher is None else (teacher[0][here], teacher[1]),
                divergence=divergence,
                train=train,
                grad_through_divergence=train and grad_through_divergence,
            )
            fits.append(fit)
            distances.append(distance)
            if through_head is not None and len(hidden) > size:
                slopes = [through_head(slope)[0] for slope in slopes]
            else:
                ctx.through_head = through_head
            gradients.append(slopes)
        # a single part is not copied: it is as wide as the vocabulary
        columns = zip(*gradients, strict=True)
        ctx.save_for_backward(*(parts[0] if len(parts) == 1 else torch.cat(parts) for parts in columns))
        every_distance = torch.cat(distances)
        if not grad_through_divergence:
            ctx.mark_non_differentiable(every_distance)
        return torch.cat(fits), every_distance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, on_fit: Tensor, on_divergence: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        of_fit, *of_divergence = ctx.saved_tensors
        weighed = on_fit[:, None] * of_fit
        for gradient in of_divergence:
            weighed.addcmul_(on_divergence[:, None], gradient)
        if ctx.through_head is not None:
            (weighed,) = ctx.through_head(weighed)
        return weighed, None, None, None, None, None, None


def _chunk(
    lm: LM,
    hidden: Tensor,
    reference: Tensor,
    tokens: Tensor,
    *,
    teacher: tuple[Tensor, Divergence] | None,
    divergence: Divergence,
    train: bool,
    grad_through_divergence: bool,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], list[Float[Tensor, "n v"]], Callable | None]:
    """Steps 2 and 3 for the positions of one chunk: (fit, divergence, their gradients at the logits as far as they are
    needed, what turns a gradient at the logits into one at the hidden states)."""
    hidden = hidden.detach().requires_grad_(train)
    through_head = None
    with torch.set_grad_enabled(train):
        logits = lm.logits(hidden)
    if train:  # the edge, unlike the logits, holds no memory
        through_head = partial(torch.autograd.grad, get_gradient_edge(logits), hidden, retain_graph=True)
    logp = _log_softmax_(logits.detach())
    slopes = []
    if teacher is None:
        fit = -logp.gather(-1, tokens[:, None])[:, 0]
    else:
        fit, slopes = _to_teacher(lm, logp, *teacher, train=train)
    logp_ref = _log_softmax_(lm.logits(reference))
    distance = divergence.value(logp, logp_ref)
    if grad_through_divergence:
        slopes.append(divergence.gradient(logp, logp_ref, distance))
    if train and teacher is None:  # p - [v is the token], in the memory of logp: computed last
        slopes.insert(0, logp.exp_().scatter_add_(-1, tokens[:, None], logp.new_full((len(logp), 1), -1.0)))
    return fit, distance, slopes, through_head


def _to_teacher(
    lm: LM, logp: Float[Tensor, "n v"], teacher: Float[Tensor, "n d"], distance: Divergence, *, train: bool
) -> tuple[Float[Tensor, " n"], list[Tensor]]:
    """(distance to the teacher's distribution, [its slope at the logits] or, without `train`, [])."""
    logp_teacher = _log_softmax_(lm.logits(teacher))
    value = distance.value(logp, logp_teacher)
    return value, [distance.gradient(logp, logp_teacher, value)] if train else []


def _log_softmax_(logits: Float[Tensor, "n v"]) -> Float[Tensor, "n v"]:
    """Normalises the logits in place: with 262,144 tokens, a copy of one chunk is as large as a small model."""
    return logits.sub_(logits.logsumexp(-1, keepdim=True))
