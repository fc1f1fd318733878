"""Kept completions -> this round's adapter: the only optimiser.

loss = mean over completions of [ fit + lam * relu(D - tau) ]. The fit is the cross-entropy per token, or the mean KL to
a teacher; D collapses the divergence to the reference over the completion's positions. Every term is per completion, so
a batch of 8 equals 8 batches of 1. The spectral penalty, where it is on, is added once per step.
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
from steer_heal.model.steering import Condition
from steer_heal.model.student import AdapterState, Student
from steer_heal.records import Completion, HealReport, HealStep, NotFinite, Scored
from steer_heal.settings import HealCfg
from steer_heal.stages.loss import Sample, losses
from steer_heal.stages.passes import Passes
from steer_heal.stages.states import final_states, kl_between


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
    n_steps: int
    """Steps of the whole heal."""
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


Renew = Callable[[int, Sequence[int]], tuple[Sequence[Scored], Condition | None]]
"""(text that the student wrote just now, who teaches on it), of (how often text was renewed before, held-out prompts).
"""


def heal(
    student: Student,
    kept: Sequence[Completion],
    round_: int,
    cfg: HealCfg,
    seed: int,
    teacher: Condition | None = None,
    renew: Renew | None = None,
    on_step: Callable[[HealState], None] = lambda state: None,
    saved: SavedHeal | None = None,
    rehearsal: Sequence[Completion] = (),
) -> HealReport:
    """Trains a new round factor on `student`; bake it to keep it. One prompt in eight is held out for validation.

    With a `teacher` its distribution is fitted, otherwise the tokens. The texts of `rehearsal` need a teacher and no
    `renew`: they are fitted to the base (pseudorehearsal; Robins 1995). Every cfg.refresh_every steps `renew` replaces
    the text. It continues after the last step of `saved`, which then lies between two texts. `on_step` is called after
    every step. NotFinite: see there.
    """
    lm, age = student.lm, 1 + max(0, round_)
    lam = cfg.lam * age**-cfg.lam_power if DIVERGENCES[cfg.divergence].barrier else 0.0
    cfg = replace(cfg, lam=lam, tau=cfg.tau * age**-cfg.tau_power)
    samples = read_samples(student, kept, cfg, teacher)
    train, validation = split_by_prompt(samples, seed)
    held_out = sorted({sample.prompt_index for sample in validation})
    if rehearsal:
        assert teacher is not None and renew is None, "rehearsed texts train beside those of one teacher"
        train += rehearsal_samples(student, rehearsal, cfg)
    n_train, left_out = len(train), share_left_out(samples)
    student.new_round(seed)
    per_epoch = math.ceil(n_train / cfg.batch_size)
    n_steps = cfg.epochs * per_epoch
    with student.training() as parameters:
        spectral = SpectralPenalty(student, cfg.spectral, seed) if cfg.spectral else None
        optimiser = torch.optim.AdamW(parameters, lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0, foreach=False)
        passes = Passes(lm, cfg, student.cfg.layers, parameters)
        state = HealState(parameters, optimiser, n_steps, spectral.directions if spectral is not None else ())
        if saved is not None:
            state.restore(saved)
        if not state.curve:
            state.curve.append({"epoch": 0.0, **validate(lm, validation, cfg)})
    window = cfg.refresh_every if renew is not None else n_steps
    steps = state.steps
    for n_text, first in enumerate(range(0, n_steps, window)):
        end = min(first + window, n_steps)
        if len(steps) >= end:
            continue
        if renew is not None and n_text > 0:
            train = renewed(student, renew, n_text - 1, held_out, cfg)
        plan = batch_plan(len(train), cfg.batch_size, end - first, seed + n_text)
        with student.training():
            while len(steps) < end:
                batch = [train[i] for i in plan[len(steps) - first]]
                for group in optimiser.param_groups:
                    group["lr"] = cfg.lr * schedule(len(steps), n_steps)
                fit, divergence, penalty, pressure = passes.gradients(batch, len(steps) % cfg.pressure_every == 0)
                if spectral is not None:
                    spectral.backward()
                norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                if not math.isfinite(fit + penalty + norm.item()):
                    raise not_finite(lm, batch, cfg, fit + penalty, norm.item(), len(steps), round_)
                optimiser.step()
                optimiser.zero_grad()
                lr, at = optimiser.param_groups[0]["lr"], (len(steps) + 1) / n_steps * cfg.epochs
                steps.append(HealStep(len(steps), at, lr, fit, divergence, penalty, len(train), pressure))
                if len(steps) % per_epoch == 0:
                    state.curve.append({"epoch": len(steps) / per_epoch, **validate(lm, validation, cfg)})
                on_step(state)
    return HealReport(
        n_train, len(validation), cfg.lam, cfg.tau, cfg.lr, tuple(steps), tuple(state.curve), tuple(held_out), left_out
    )


def renewed(student: Student, renew: Renew, n: int, held_out: Sequence[int], cfg: HealCfg) -> list[Sample]:
    """New text, as far as it passes the gates, with what the teacher says of it."""
    scored, teacher = renew(n, held_out)
    kept = [row.completion for row in scored if row.kept]
    if not kept:
        raise UserError(
            f"none of {len(scored)} texts that the student wrote anew passes the filter: the heal has broken it; lower "
            "the dose, --heal.lr or --heal.refresh-every",
            resumable=False,
        )
    return read_samples(student, kept, cfg, teacher, "full" if cfg.refresh == "teacher" else "prev")


def batch_plan(n: int, batch_size: int, n_steps: int, seed: int) -> list[list[int]]:
    """Which of n completions each step takes: every one once an epoch, in a new order each time."""
    rng, plan = random.Random(seed), []
    while len(plan) < n_steps:
        order = rng.sample(range(n), n)
        plan += [order[start : start + batch_size] for start in range(0, n, batch_size)]
    return plan[:n_steps]


@torch.no_grad()
def not_finite(
    lm: LM, batch: Sequence[Sample], cfg: HealCfg, loss: float, norm: float, step: int, round_: int
) -> NotFinite:
    """The error: at the first completion of the step whose own loss is not finite, else at the one with the highest."""
    own = [sum(part.item() for part in losses(lm, [sample], cfg)) for sample in batch]
    worst = batch[max(range(len(batch)), key=lambda i: own[i] if math.isfinite(own[i]) else math.inf)]
    text = lm.decode(worst.completion_ids)[:60]
    what = "a rehearsed text" if worst.rehearsed else f"an answer to prompt {worst.prompt_index}"
    where = f"round {round_}" if round_ >= 0 else "the control"
    return NotFinite(
        f"the heal's loss is {loss} and its gradient's norm {norm} at step {step} of {where}, on {what} that "
        f"begins {text!r}; lower --heal.lr (now {cfg.lr:g}) or "
        "look at the kept completions in events.jsonl",
        step,
        None if worst.rehearsed else worst.prompt_index,
        text,
    )


def schedule(step: int, n_steps: int) -> float:
    """Share of the peak learning rate: linear warm-up over the first tenth (never 0), then cosine towards 0."""
    warm = max(1, n_steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, n_steps - warm)))


@torch.no_grad()
def read_samples(
    student: Student,
    kept: Sequence[Completion],
    cfg: HealCfg,
    teacher: Condition | None = None,
    of: AdapterState = "full",
) -> list[Sample]:
    """Training sequences with the hidden states of the reference and of the `teacher`, made of the student in state
    `of`. They are computed once a text, not once a step, and kept on the CPU; each step copies the few that it needs.
    """
    lm = student.lm
    with student.using(cfg.reference, exact=True):
        references = final_states(lm, kept)
    if teacher is None:
        return [_sample(c, reference) for c, reference in zip(kept, references, strict=True)]
    with student.using(of, exact=True):
        taught = final_states(lm, kept, teacher)
    weights: list[Tensor | None] = [None] * len(kept)
    if cfg.max_departure:
        with student.using("base", exact=True):
            bases = final_states(lm, kept)
            departures = [kl_between(lm, here, base) for here, base in zip(taught, bases, strict=True)]
        weights = [(far <= cfg.max_departure).float() for far in departures]
    return [_sample(*each) for each in zip(kept, references, taught, weights, strict=True)]


@torch.no_grad()
def rehearsal_samples(student: Student, texts: Sequence[Completion], cfg: HealCfg) -> list[Sample]:
    """Training sequences that the base teaches, under the prompt that they train under."""
    with student.using("base", exact=True):
        taught = references = final_states(student.lm, texts)
    if cfg.reference != "base":
        with student.using(cfg.reference, exact=True):
            references = final_states(student.lm, texts)
    samples = [_sample(*each) for each in zip(texts, references, taught, strict=True)]
    return [replace(sample, rehearsed=True) for sample in samples]


def _sample(c: Completion, *read: Tensor | None) -> Sample:
    return Sample(c.prompt_index, c.prompt_ids, c.completion_ids, *read)  # pyright: ignore[reportArgumentType]


def share_left_out(samples: Sequence[Sample]) -> float:
    """Of all positions, the share without a weight."""
    weighed = [sample.weights for sample in samples if sample.weights is not None]
    return 1.0 - torch.cat(weighed).mean().item() if weighed else 0.0


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
    """Fit and divergence on the held-out prompts, in nats, as in training."""
    groups = batches([len(sample.ids) for sample in samples], cfg.tokens_per_pass)
    parts = [losses(lm, [samples[i] for i in group], cfg) for group in groups]
    return {name: torch.cat([p[k] for p in parts]).mean().item() for k, name in enumerate(("fit", "divergence"))}
