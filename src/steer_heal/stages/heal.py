"""Kept completions -> this round's adapter: the only optimiser.

loss = mean over completions of [ cross-entropy per token + lam * relu(D - tau) ], where D collapses the
divergence to the reference over the completion's positions. Every term is per completion, so a batch of 8
equals 8 batches of 1. The spectral penalty, where it is on, is added once per step.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from steer_heal.errors import UserError
from steer_heal.model.divergence import DIVERGENCES, spectral_step
from steer_heal.model.lm import LM
from steer_heal.model.memory import batches
from steer_heal.model.student import Student
from steer_heal.records import Completion, HealReport, HealStep, NotFinite
from steer_heal.settings import HealCfg
from steer_heal.stages.loss import Sample, losses
from steer_heal.stages.passes import Passes


@dataclass(frozen=True)
class SavedHeal:
    """A heal between two steps, as plain data: tensors by name, and the curves so far."""

    tensors: dict[str, Tensor]
    steps: tuple[HealStep, ...]
    curve: tuple[dict[str, float], ...]


@dataclass
class HealState:
    """Everything that changes from step to step."""

    parameters: Sequence[Tensor]
    optimiser: torch.optim.Optimizer
    directions: Sequence[Tensor] = ()
    """Of the spectral penalty, one per adapted matrix."""
    steps: list[HealStep] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)

    def saved(self) -> SavedHeal:
        """A view of the present state; it shares memory with the heal."""
        tensors = {f"factor.{i}": p.detach() for i, p in enumerate(self.parameters)}
        tensors |= {f"direction.{i}": d for i, d in enumerate(self.directions)}
        for i, parameter in enumerate(self.parameters):
            tensors |= {f"{kind}.{i}": value for kind, value in self.optimiser.state.get(parameter, {}).items()}
        return SavedHeal(tensors, tuple(self.steps), tuple(self.curve))

    @torch.no_grad()
    def restore(self, saved: SavedHeal) -> None:
        for name, tensor in saved.tensors.items():
            kind, i = name.split(".")
            if kind in ("factor", "direction"):
                (self.parameters if kind == "factor" else self.directions)[int(i)].copy_(tensor)
            else:
                parameter = self.parameters[int(i)]
                self.optimiser.state[parameter][kind] = tensor.to("cpu" if kind == "step" else parameter.device)
        self.steps[:], self.curve[:] = saved.steps, saved.curve


def heal(
    student: Student,
    kept: Sequence[Completion],
    round_: int,
    cfg: HealCfg,
    seed: int,
    on_step: Callable[[HealState], None] = lambda state: None,
    saved: SavedHeal | None = None,
) -> HealReport:
    """Trains a new round factor on `student`; bake it to keep it. One prompt in eight is held out for validation.

    It continues after the last step of `saved`. `on_step` is called after every step. NotFinite: see there.
    """
    lm, age = student.lm, 1 + max(0, round_)
    lam = cfg.lam * age**-cfg.lam_power if DIVERGENCES[cfg.divergence].barrier else 0.0
    cfg = replace(cfg, lam=lam, tau=cfg.tau * age**-cfg.tau_power)
    samples = reference_samples(student, kept, cfg)
    train, validation = split_by_prompt(samples, seed)
    student.new_round(seed)
    rng = random.Random(seed)
    per_epoch = math.ceil(len(train) / cfg.batch_size)
    n_steps = cfg.epochs * per_epoch
    with student.training() as parameters:
        spectral = SpectralPenalty(student, cfg.spectral, seed) if cfg.spectral else None
        optimiser = torch.optim.AdamW(parameters, lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0, foreach=False)
        passes = Passes(lm, cfg, student.cfg.layers, parameters)
        state = HealState(parameters, optimiser, spectral.directions if spectral is not None else ())
        if saved is not None:
            state.restore(saved)
        steps, curve = state.steps, state.curve
        if not curve:
            curve.append({"epoch": 0.0, **validate(lm, validation, cfg)})
        for epoch in range(cfg.epochs):
            order = rng.sample(range(len(train)), len(train))  # also of finished epochs: a resumed heal draws the same
            done = min(per_epoch, max(0, len(steps) - epoch * per_epoch))
            for start in range(done * cfg.batch_size, len(order), cfg.batch_size):
                batch = [train[i] for i in order[start : start + cfg.batch_size]]
                for group in optimiser.param_groups:
                    group["lr"] = cfg.lr * schedule(len(steps), n_steps)
                measure = len(steps) % cfg.pressure_every == 0
                ce, divergence, penalty, pressure = passes.gradients(batch, measure)
                if spectral is not None:
                    spectral.backward()
                norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                if not math.isfinite(ce + penalty + norm.item()):
                    raise not_finite(lm, batch, cfg, ce + penalty, norm.item(), len(steps), round_)
                optimiser.step()
                optimiser.zero_grad()
                lr, at = optimiser.param_groups[0]["lr"], (len(steps) + 1) / n_steps * cfg.epochs
                steps.append(HealStep(len(steps), at, lr, ce, divergence, penalty, pressure))
                on_step(state)
            if len(curve) == epoch + 1:
                curve.append({"epoch": epoch + 1.0, **validate(lm, validation, cfg)})
    held_out = tuple(sorted({sample.prompt_index for sample in validation}))
    n_train, n_validation = len(train), len(validation)
    return HealReport(n_train, n_validation, cfg.lam, cfg.tau, cfg.lr, tuple(steps), tuple(curve), held_out)


@torch.no_grad()
def not_finite(
    lm: LM, batch: Sequence[Sample], cfg: HealCfg, loss: float, norm: float, step: int, round_: int
) -> NotFinite:
    """The error: at the first completion of the step whose own loss is not finite, else at the one with the highest."""
    own = [sum(part.item() for part in losses(lm, [sample], cfg)) for sample in batch]
    worst = batch[max(range(len(batch)), key=lambda i: own[i] if math.isfinite(own[i]) else math.inf)]
    text = lm.decode(worst.completion_ids)[:60]
    where = f"round {round_}" if round_ >= 0 else "the control"
    return NotFinite(
        f"the heal's loss is {loss} and its gradient's norm {norm} at step {step} of {where}, on an answer to "
        f"prompt {worst.prompt_index} that begins {text!r}; lower --heal.lr (now {cfg.lr:g}) or "
        "look at the kept completions in events.jsonl",
        step,
        worst.prompt_index,
        text,
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
    the CPU; each step copies the few that it needs."""
    lm = student.lm
    references: list[Tensor] = [torch.empty(0)] * len(kept)

    def read(group: list[int]) -> None:
        hidden = lm.hidden([kept[i].prompt_ids + kept[i].completion_ids for i in group])
        for row, i in enumerate(group):
            start = len(kept[i].prompt_ids) - 1
            references[i] = hidden[row, start : start + len(kept[i].completion_ids)].to("cpu", copy=True)

    with student.using(cfg.reference, exact=True):
        lm.in_batches([len(c.prompt_ids) + len(c.completion_ids) for c in kept], read)
    return [Sample(c.prompt_index, c.prompt_ids, c.completion_ids, h) for c, h in zip(kept, references, strict=True)]


def split_by_prompt(samples: Sequence[Sample], seed: int) -> tuple[list[Sample], list[Sample]]:
    """(training, validation): an eighth of the prompts, at least one, are validation; no prompt is in both."""
    prompts = sorted({sample.prompt_index for sample in samples})
    if len(prompts) < 2:
        raise UserError(
            f"all {len(samples)} kept completions answer one prompt: none can be held out; raise --gen.n-prompts or "
            "--filter.n-keep",
            resumable=False,
        )
    held_out = set(random.Random(seed).sample(prompts, max(1, len(prompts) // 8)))
    train = [sample for sample in samples if sample.prompt_index not in held_out]
    return train, [sample for sample in samples if sample.prompt_index in held_out]


class SpectralPenalty:
    """weight / 2 * sum of the squared largest singular values of this round's updates B A, scaled as they act."""

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
    groups = batches([len(sample.ids) for sample in samples], cfg.tokens_per_pass)
    parts = [losses(lm, [samples[i] for i in group], cfg) for group in groups]
    return {name: torch.cat([p[k] for p in parts]).mean().item() for k, name in enumerate(("ce", "divergence"))}
