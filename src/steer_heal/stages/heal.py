"""Kept completions -> this round's adapter: the only optimiser.

loss = mean over completions of [ cross-entropy per token + lam * relu(D - tau) ], where D collapses the
divergence to the reference over the completion's positions. Every term is per completion, so a batch of 8
equals 8 batches of 1. The spectral penalty, where it is on, is added once per step.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from steer_heal.divergence import spectral_step
from steer_heal.lm import LM
from steer_heal.records import Completion, HealReport, HealStep, NotFinite, UserError
from steer_heal.stages.bake import Student
from steer_heal.stages.cfg import HealCfg
from steer_heal.stages.loss import Sample, losses
from steer_heal.stages.partial import HealFile
from steer_heal.stages.passes import Passes


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
        optimiser = torch.optim.AdamW(parameters, lr=cfg.lr, betas=(0.9, 0.95), weight_decay=cfg.weight_decay, foreach=False)
        passes = Passes(lm, cfg, parameters)
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
                sft, divergence, penalty, pressure = passes.gradients(batch, measure)
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
    """Training sequences with the reference's hidden states: computed once per round, not once per step, and kept on
    the CPU, from where those of a step are a small copy."""
    lm = student.lm
    references: list[Tensor] = [torch.empty(0)] * len(kept)

    def read(group: list[int]) -> None:
        hidden = lm.hidden([kept[i].prompt_ids + kept[i].completion_ids for i in group])
        for row, i in enumerate(group):
            start = len(kept[i].prompt_ids) - 1
            references[i] = hidden[row, start : start + len(kept[i].completion_ids)].to("cpu", copy=True)

    with student.gate(cfg.reference, exact=True):
        lm.in_batches([len(c.prompt_ids) + len(c.completion_ids) for c in kept], read)
    return [Sample(c.prompt_index, c.prompt_ids, c.completion_ids, h) for c, h in zip(kept, references, strict=True)]


def split_by_prompt(samples: Sequence[Sample], seed: int) -> tuple[list[Sample], list[Sample]]:
    """(training, validation): an eighth of the prompts, at least one, are validation; no prompt is in both."""
    prompts = sorted({sample.prompt_index for sample in samples})
    if len(prompts) < 2:
        raise UserError(f"all {len(samples)} kept completions answer one prompt: none can be held out; raise --gen.n-prompts or --filter.n-keep")
    held_out = set(random.Random(seed).sample(prompts, max(1, len(prompts) // 8)))
    train = [sample for sample in samples if sample.prompt_index not in held_out]
    return train, [sample for sample in samples if sample.prompt_index in held_out]


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


@torch.no_grad()
def validate(lm: LM, samples: Sequence[Sample], cfg: HealCfg) -> dict[str, float]:
    """Cross-entropy and divergence on the held-out prompts, in nats, as in training."""
    groups = lm.batches([len(sample.ids) for sample in samples], cfg.tokens_per_pass)
    parts = [losses(lm, [samples[i] for i in group], cfg) for group in groups]
    return {name: torch.cat([p[k] for p in parts]).mean().item() for k, name in enumerate(("sft", "divergence"))}
