"""Kept completions -> this round's adapter: the only optimiser.

loss = mean over completions of [ cross-entropy per token + lam * relu(D - tau) ], where D collapses the
divergence to the reference over the completion's positions. Every term is per completion, so a batch of 8
equals 8 batches of 1. The spectral penalty, where it is on, is added once per step.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from steer_heal.divergence import DIVERGENCES, aggregate, barrier, spectral_step
from steer_heal.lm import LM
from steer_heal.records import Completion, HealReport, HealStep, NotFinite, UserError
from steer_heal.stages.bake import Student
from steer_heal.stages.cfg import HealCfg
from steer_heal.stages.partial import HealFile


@dataclass(frozen=True)
class Sample:
    """A training sequence under the plain prompt, and the reference's final hidden states at its completion."""

    prompt_index: int
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    reference: Float[Tensor, "n d"]

    @property
    def ids(self) -> tuple[int, ...]:
        return self.prompt_ids + self.completion_ids


def heal(
    student: Student, kept: Sequence[Completion], round_: int, cfg: HealCfg, seed: int,
    on_step: Callable[[HealStep], None] = lambda step: None, partial: HealFile | None = None,
) -> HealReport:
    """Trains a new round factor on `student`; bake it to keep it. One prompt in eight is held out for validation.

    With `partial`, the heal goes on at the step which that file holds, and keeps it up to date.
    """
    lm, age = student.lm, 1 + max(0, round_)
    lam = 0.0 if cfg.divergence == "nll" else cfg.lam * age**-cfg.lam_power
    cfg = replace(cfg, lam=lam, tau=cfg.tau * age**-cfg.tau_power)
    samples = reference_samples(student, kept, cfg)
    train, validation = split_by_prompt(samples, seed)
    student.new_round(seed)
    rng = random.Random(seed)
    per_epoch = math.ceil(len(train) / cfg.batch_size)
    n_steps = cfg.epochs * per_epoch
    steps: list[HealStep] = []
    curve: list[dict[str, float]] = []
    with student.training() as parameters:
        spectral = SpectralPenalty(student, cfg.spectral, seed) if cfg.spectral else None
        optimiser = torch.optim.AdamW(parameters, lr=cfg.lr, betas=(0.9, 0.95), weight_decay=cfg.weight_decay)
        directions = spectral.directions if spectral is not None else []
        if partial is not None:
            steps, curve = partial.load(parameters, optimiser, directions)
        if not curve:
            curve.append({"epoch": 0.0, **validate(lm, validation, cfg)})
        for epoch in range(cfg.epochs):
            order = rng.sample(range(len(train)), len(train))  # drawn again for epochs that are behind, so that the next one is the same
            behind = min(per_epoch, max(0, len(steps) - epoch * per_epoch))
            for start in range(behind * cfg.batch_size, len(order), cfg.batch_size):
                batch = [train[i] for i in order[start : start + cfg.batch_size]]
                for group in optimiser.param_groups:
                    group["lr"] = cfg.lr * schedule(len(steps), n_steps)
                measure = len(steps) % cfg.pressure_every == 0
                sft, divergence, penalty, pressure = _gradients(lm, batch, cfg, parameters, measure)
                if spectral is not None:
                    spectral.backward()
                norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                if not math.isfinite(sft + penalty + norm.item()):
                    raise not_finite(lm, batch, cfg, sft + penalty, norm.item(), len(steps), round_)
                optimiser.step()
                optimiser.zero_grad()
                lr = optimiser.param_groups[0]["lr"]
                steps.append(HealStep(len(steps), (len(steps) + 1) / n_steps * cfg.epochs, lr, sft, divergence, penalty, pressure))
                on_step(steps[-1])
                if partial is not None:
                    partial.save(parameters, optimiser, directions, steps, curve)
            if len(curve) == epoch + 1:
                curve.append({"epoch": epoch + 1.0, **validate(lm, validation, cfg)})
    held_out = tuple(sorted({sample.prompt_index for sample in validation}))
    return HealReport(len(train), len(validation), cfg.lam, cfg.tau, cfg.lr, tuple(steps), tuple(curve), held_out)


@torch.no_grad()
def not_finite(lm: LM, batch: Sequence[Sample], cfg: HealCfg, loss: float, norm: float, step: int, round_: int) -> NotFinite:
    """Where a heal broke: at the first completion of the step whose own loss is not finite, else at the one with the highest."""
    own = [sum(part.item() for part in losses(lm, [sample], cfg)) for sample in batch]
    worst = batch[max(range(len(batch)), key=lambda i: own[i] if math.isfinite(own[i]) else math.inf)]
    text = lm.tokenizer.decode(worst.completion_ids, skip_special_tokens=True)[:60]
    return NotFinite(
        f"the heal's loss is {loss} and its gradient's norm {norm} at step {step} of round {round_}, on an answer to prompt {worst.prompt_index} "
        f"that begins {text!r}; lower --heal.lr (now {cfg.lr:g}) or look at the kept completions in events.jsonl", step, worst.prompt_index, text, cfg.lr,
    )


def schedule(step: int, n_steps: int) -> float:
    """Share of the peak learning rate: linear warm-up over the first tenth (never 0), then cosine towards 0."""
    warm = max(1, n_steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, n_steps - warm)))


@torch.no_grad()
def reference_samples(student: Student, kept: Sequence[Completion], cfg: HealCfg) -> list[Sample]:
    """Training sequences with the reference's hidden states: computed once per round, not once per step."""
    lm = student.lm
    references: list[Tensor] = [torch.empty(0)] * len(kept)
    with student.gate(cfg.reference, merged=False):
        for group in lm.batches([len(c.prompt_ids) + len(c.completion_ids) for c in kept]):
            hidden = lm.hidden([kept[i].prompt_ids + kept[i].completion_ids for i in group])
            for row, i in enumerate(group):
                start = len(kept[i].prompt_ids) - 1
                references[i] = hidden[row, start : start + len(kept[i].completion_ids)].clone()
    return [Sample(c.prompt_index, c.prompt_ids, c.completion_ids, h) for c, h in zip(kept, references, strict=True)]


def split_by_prompt(samples: Sequence[Sample], seed: int) -> tuple[list[Sample], list[Sample]]:
    """(training, validation): an eighth of the prompts, at least one, are validation; no prompt is in both."""
    prompts = sorted({sample.prompt_index for sample in samples})
    if len(prompts) < 2:
        raise UserError(f"all {len(samples)} kept completions answer one prompt: none can be held out; raise --gen.n-prompts or --filter.n-keep")
    held_out = set(random.Random(seed).sample(prompts, max(1, len(prompts) // 8)))
    train = [sample for sample in samples if sample.prompt_index not in held_out]
    return train, [sample for sample in samples if sample.prompt_index in held_out]


def losses(lm: LM, batch: Sequence[Sample], cfg: HealCfg) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """(cross-entropy per token [b], aggregated divergence [b]) of each completion, in nats.

    Only completion positions reach the head, a chunk at a time; a chunk's logits are computed again in the
    backward pass instead of being stored.
    """
    hidden = lm.hidden([sample.ids for sample in batch])
    recompute = sum(len(sample.completion_ids) for sample in batch) > lm.chunk_size
    sft, divergence = [], []
    for row, sample in enumerate(batch):
        start, n = len(sample.prompt_ids) - 1, len(sample.completion_ids)
        targets = torch.tensor(sample.completion_ids, device=lm.device)
        nll, kl = position_terms(lm, hidden[row, start : start + n], sample.reference, targets, cfg.divergence, recompute)
        sft.append(nll.mean())
        divergence.append(aggregate(kl, cfg.aggregate))
    return torch.stack(sft), torch.stack(divergence)


def position_terms(
    lm: LM, hidden: Float[Tensor, "n d"], reference: Float[Tensor, "n d"], targets: Int[Tensor, " n"], divergence: str, recompute: bool
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """(-log p(target), divergence to the reference) at each position, in nats."""
    distance = DIVERGENCES["kl_rev" if divergence == "nll" else divergence]

    def terms(h: Tensor, h_ref: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        logp, logp_ref = lm.logits(h).log_softmax(-1), lm.logits(h_ref).log_softmax(-1)
        return -logp.gather(-1, t[:, None])[:, 0], distance(logp, logp_ref)

    size, parts = lm.chunk_size, []
    for h, h_ref, t in zip(hidden.split(size), reference.split(size), targets.split(size), strict=True):
        parts.append(checkpoint(terms, h, h_ref, t, use_reentrant=False) if recompute else terms(h, h_ref, t))
    return torch.cat([nll for nll, _ in parts]), torch.cat([kl for _, kl in parts])


def _gradients(
    lm: LM, batch: Sequence[Sample], cfg: HealCfg, parameters: Sequence[Tensor], measure: bool
) -> tuple[float, float, float, float | None]:
    """Leaves the gradient of the loss in `.grad`; returns (sft, divergence, barrier, pressure or None)."""
    sums, pushed = torch.zeros(3, dtype=torch.float64), [torch.zeros_like(p) for p in parameters]
    for group in lm.batches([len(sample.ids) for sample in batch], cfg.tokens_per_pass):
        sft, divergence = losses(lm, [batch[i] for i in group], cfg)
        penalty = barrier(divergence, cfg.lam, cfg.tau) if cfg.lam > 0 else torch.zeros_like(sft)
        if measure and penalty.detach().max() > 0:
            for total, part in zip(pushed, torch.autograd.grad(penalty.sum() / len(batch), parameters, retain_graph=True, allow_unused=True)):
                total += 0 if part is None else part
        ((sft + penalty).sum() / len(batch)).backward()
        sums += torch.stack([part.detach().double().sum().cpu() for part in (sft, divergence, penalty)])
    pressure = None
    if measure:
        pulled = [p.grad - push for p, push in zip(parameters, pushed, strict=True)]
        pressure = _norm(pushed) / max(_norm(pulled), 1e-12)
    return *(sums / len(batch)).tolist(), pressure


class SpectralPenalty:
    """weight / 2 * the sum over this round's updates B A (scaled as they act) of their squared largest singular value."""

    def __init__(self, student: Student, weight: float, seed: int) -> None:
        self.weight, self.updates = weight, student.round_updates()
        generator = torch.Generator().manual_seed(seed)
        starts = (torch.randn(a.shape[1], generator=generator) for a, _, _ in self.updates)
        self.directions = [(v / v.norm()).to(a.device) for v, (a, _, _) in zip(starts, self.updates, strict=True)]

    def backward(self) -> float:
        """Adds the gradient of the penalty to `.grad`; returns the penalty."""
        total = torch.zeros((), device=self.directions[0].device)
        for i, (a, b, scale) in enumerate(self.updates):
            size, self.directions[i] = spectral_step(a, b, self.directions[i])
            total = total + 0.5 * self.weight * (scale * size).square()
        total.backward()
        return total.item()


def _norm(gradients: Sequence[Tensor]) -> float:
    return math.sqrt(sum(g.double().square().sum().item() for g in gradients))


@torch.no_grad()
def validate(lm: LM, samples: Sequence[Sample], cfg: HealCfg) -> dict[str, float]:
    """Cross-entropy and divergence on the held-out prompts, in nats, as in training."""
    parts = [losses(lm, samples[i : i + cfg.batch_size], cfg) for i in range(0, len(samples), cfg.batch_size)]
    return {name: torch.cat([p[k] for p in parts]).mean().item() for k, name in enumerate(("sft", "divergence"))}
