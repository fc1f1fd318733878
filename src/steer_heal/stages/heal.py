"""Kept completions -> this round's adapter. This is the only training loop.

loss = mean over examples of [ fit + lam * relu(D - tau) ]. The fit is the cross-entropy per token, the mean KL to a
teacher or, of a pair, the preference loss (stages/loss.py). D is the divergence to the reference, aggregated over the
positions of the example. Every term belongs to one example, so a batch of 8 equals 8 batches of 1. The spectral
penalty, if it is on, is added once per step.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from steer_heal.errors import UserError
from steer_heal.model.divergence import DIVERGENCES, spectral_step
from steer_heal.model.lm import LM
from steer_heal.model.memory import batches
from steer_heal.model.steering import Condition
from steer_heal.model.student import Student
from steer_heal.records import Completion, HealReport, HealStep, NotFinite, round_name
from steer_heal.settings import HealCfg
from steer_heal.stages.loss import Example, Pair, Sample, completion_states, losses, n_padded
from steer_heal.stages.passes import Passes
from steer_heal.stages.states import final_states, kl_between

Some = TypeVar("Some", bound=Example)
BETAS = (0.9, 0.95)
"""Decay rates of AdamW's two moments."""
MAX_NORM = 1.0
"""Longest gradient of a step: a longer one is scaled down to it."""


@dataclass(frozen=True)
class SavedHeal:
    """A heal between two steps as plain data: tensors by name, and the curves so far."""

    tensors: dict[str, Tensor]
    steps: tuple[HealStep, ...]
    curve: tuple[dict[str, float], ...]


class HealState:
    """A running heal: how it takes a step, and everything that changes from step to step."""

    def __init__(
        self,
        student: Student,
        parameters: Sequence[Tensor],
        cfg: HealCfg,
        *,
        round_: int | None,
        seed: int,
        n_steps: int,
        train: Sequence[Example],
        validation: Sequence[Example],
    ) -> None:
        self.lm = student.lm
        self.parameters = parameters
        self.cfg = cfg
        self.round_ = round_
        self.n_steps = n_steps
        self.train = train
        self.validation = validation
        self.passes = Passes(student.lm, cfg, student.cfg.layers, parameters)
        self.optimiser = torch.optim.AdamW(parameters, lr=cfg.lr, betas=BETAS, weight_decay=0.0, foreach=False)
        self.spectral = SpectralPenalty(student, cfg.spectral, seed) if cfg.spectral else None
        self.steps: list[HealStep] = []
        self.curve: list[dict[str, float]] = []
        """Fit and divergence of the held-out examples, before the first step and after each epoch. With a teacher also
        the means of KL(teacher || student) over positions: of the held-out texts and, at both ends, of those that
        train."""

    def step(self, batch: Sequence[Example]) -> None:
        """One optimiser step and, at the end of an epoch, the validation. NotFinite, before any weight changes, if the
        loss or its gradient is not finite."""
        done = len(self.steps)
        lr = self.cfg.lr * schedule(done, self.n_steps)
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        terms = self.passes.gradients(batch, with_pressure=done % self.cfg.pressure_every == 0)
        if self.spectral is not None:
            self.spectral.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, MAX_NORM).item()
        loss = terms.fit + terms.barrier
        if not math.isfinite(loss + norm):
            raise not_finite(self.lm, batch, self.cfg, loss=loss, norm=norm, step=done, round_=self.round_)
        self.optimiser.step()
        self.optimiser.zero_grad()
        epoch = (done + 1) / self.n_steps * self.cfg.epochs
        self.steps.append(HealStep(step=done, epoch=epoch, lr=lr, **terms._asdict()))
        if len(self.steps) % (self.n_steps // self.cfg.epochs) == 0:
            self.add_to_curve()

    def add_to_curve(self) -> None:
        """Validates the student as it is now."""
        done = len(self.steps)
        point = {"epoch": done * self.cfg.epochs / self.n_steps, **validate(self.lm, self.validation, self.cfg)}
        kinds = {"kl_held_out": self.validation} | ({"kl_trained": self.train} if done in (0, self.n_steps) else {})
        for name, examples in kinds.items():
            kl = teacher_kl(self.lm, examples, self.cfg.tokens_per_pass)
            point |= {} if kl is None else {name: kl}
        self.curve.append(point)

    def saved(self) -> SavedHeal:
        """A view of the present state. It shares memory with the heal."""
        tensors = {f"factor.{i}": p.detach() for i, p in enumerate(self.parameters)}
        if self.spectral is not None:
            tensors |= {f"direction.{i}": d for i, d in enumerate(self.spectral.directions)}
        for i, parameter in enumerate(self.parameters):
            tensors |= {f"{kind}.{i}": value for kind, value in self.optimiser.state.get(parameter, {}).items()}
        return SavedHeal(tensors, tuple(self.steps), tuple(self.curve))

    @torch.no_grad()
    def restore(self, saved: SavedHeal) -> None:
        """Continues from a state that was saved by a heal of the same settings and texts."""
        for name, tensor in saved.tensors.items():
            kind, number = name.split(".")
            i = int(number)
            if kind == "factor":
                self.parameters[i].copy_(tensor)
            elif kind == "direction":
                assert self.spectral is not None
                self.spectral.directions[i].copy_(tensor)
            else:
                parameter = self.parameters[i]
                self.optimiser.state[parameter][kind] = tensor.to("cpu" if kind == "step" else parameter.device)
        self.steps[:] = saved.steps
        self.curve[:] = saved.curve

    def report(self) -> HealReport:
        return HealReport(
            n_train=len(self.train),
            n_validation=len(self.validation),
            lam=self.cfg.lam,
            tau=self.cfg.tau,
            lr=self.cfg.lr,
            steps=tuple(self.steps),
            validation=tuple(self.curve),
            validation_prompts=tuple(prompts_of(self.validation)),
        )


def heal(
    student: Student,
    kept: Sequence[Completion],
    cfg: HealCfg,
    *,
    round_: int | None,
    seed: int,
    teacher: Condition | None = None,
    taught: Sequence[Tensor] | None = None,
    rehearsal: Sequence[Completion] = (),
    rejected: Sequence[Completion] = (),
    beta: float = 0.1,
    saved: SavedHeal | None = None,
    n_steps: int | None = None,
    on_step: Callable[[HealState], object] = lambda state: None,
) -> HealReport:
    """Trains a new round factor on `student`. Bake it to keep it. One prompt in eight is held out for validation.

    Args:
        round_: None is the control.
        teacher: Its distribution is fitted. None: the tokens are fitted.
        taught: The teacher's final hidden states on `kept`, if they were read before.
        rehearsal: Texts fitted to the base, beside those of the teacher (pseudorehearsal; Robins 1995).
        rejected: In place of the tokens, fit preferences (`Pair`): for each of `kept`, an answer that should become
            less likely than it. `beta` scales their margin.
        saved: Continue after its last step.
        n_steps: End after this many steps, on the same schedule. None: after the last epoch.

    NotFinite if a loss or a gradient is not finite; UserError if no prompt can be held out.
    """
    cfg = in_round(cfg, round_)
    if rejected:
        assert teacher is None, "preferences have no teacher"
        examples: Sequence[Example] = read_pairs(student, kept, rejected, cfg=cfg, beta=beta)
    else:
        examples = read_samples(student, kept, cfg, teacher=teacher, taught=taught)
    train, validation = split_by_prompt(examples, seed)
    if rehearsal:
        assert teacher is not None, "rehearsed texts train beside those of a teacher"
        train += rehearsal_samples(student, rehearsal, cfg)
    plan = batch_plan(len(train), cfg.batch_size, epochs=cfg.epochs, seed=seed)
    student.new_round(seed)
    with student.training() as parameters:
        state = HealState(
            student, parameters, cfg, round_=round_, seed=seed, n_steps=len(plan), train=train, validation=validation
        )
        if saved is not None:
            state.restore(saved)
        if not state.curve:
            state.add_to_curve()
        for chosen in plan[len(state.steps) : n_steps]:
            state.step([train[i] for i in chosen])
            on_step(state)
    return state.report()


def in_round(cfg: HealCfg, round_: int | None) -> HealCfg:
    """The settings with lam of a round. None is the control: it has those of round 0."""
    age = 1 if round_ is None else 1 + round_
    lam = cfg.lam * age**-cfg.lam_power if DIVERGENCES[cfg.divergence].barrier else 0.0
    return replace(cfg, lam=lam)


def batch_plan(n: int, batch_size: int, *, epochs: int, seed: int) -> list[list[int]]:
    """Which of n examples each step takes. An epoch takes each of them once, in an order of its own."""
    rng = random.Random(seed)
    orders = [rng.sample(range(n), n) for _ in range(epochs)]
    return [order[start : start + batch_size] for order in orders for start in range(0, n, batch_size)]


@torch.no_grad()
def not_finite(
    lm: LM, batch: Sequence[Example], cfg: HealCfg, *, loss: float, norm: float, step: int, round_: int | None
) -> NotFinite:
    """The error for a step. It names the first example whose own loss is not finite, or else that of highest loss."""
    own = [sum(part.item() for part in losses(lm, [example], cfg)) for example in batch]
    worst = batch[max(range(len(batch)), key=lambda i: own[i] if math.isfinite(own[i]) else math.inf)].samples[0]
    text = lm.decode(worst.completion_ids)[:60]
    what = "a rehearsed text" if worst.rehearsed else f"an answer to prompt {worst.prompt_index}"
    where = "the control" if round_ is None else round_name(round_)
    return NotFinite(
        f"the heal's loss is {loss} and the norm of its gradient {norm} at step {step} of {where}, on {what} that "
        f"begins {text!r}; lower --heal.lr (now {cfg.lr:g}) or look at the kept completions in events.jsonl",
        step=step,
        prompt_index=None if worst.rehearsed else worst.prompt_index,
        text=text,
    )


def schedule(step: int, n_steps: int) -> float:
    """Share of the peak learning rate: linear warm-up over the first tenth, never 0, then cosine towards 0."""
    warm = max(1, n_steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, n_steps - warm)))


# --- examples ----------------------------------------------------------------------------------------------------
@torch.no_grad()
def read_samples(
    student: Student,
    kept: Sequence[Completion],
    cfg: HealCfg,
    *,
    teacher: Condition | None = None,
    taught: Sequence[Tensor] | None = None,
) -> list[Sample]:
    """Completions with the hidden states of the reference and, if there is a `teacher`, those of the student under it.
    `taught`: the teacher's states, if they were read before.

    The states are computed once per text, not once per step, and kept on the CPU. Each step copies the few it needs.
    """
    lm = student.lm
    with student.using(cfg.reference, exact=True):
        references = zip(kept, final_states(lm, kept), strict=True)
    samples = [Sample(c.prompt_index, c.prompt_ids, c.completion_ids, reference=states) for c, states in references]
    if teacher is None:
        return samples
    if taught is None:
        with student.using("full", exact=True):
            taught = final_states(lm, kept, teacher)
    return [replace(sample, teacher=states) for sample, states in zip(samples, taught, strict=True)]


@torch.no_grad()
def read_pairs(
    student: Student, chosen: Sequence[Completion], rejected: Sequence[Completion], *, cfg: HealCfg, beta: float
) -> list[Pair]:
    """Two answers to each prompt with the hidden states of the reference, and the margin between them under it."""
    lm = student.lm
    pairs = []
    for pair in zip(read_samples(student, chosen, cfg), read_samples(student, rejected, cfg), strict=True):
        up, down = (-lm.nll(s.reference.to(lm.device), s.completion_ids).sum().item() for s in pair)
        pairs.append(Pair(chosen=pair[0], rejected=pair[1], reference_margin=up - down, beta=beta))
    return pairs


@torch.no_grad()
def rehearsal_samples(student: Student, texts: Sequence[Completion], cfg: HealCfg) -> list[Sample]:
    """Completions with the base as their teacher, under the prompt they train under."""
    with student.using("base", exact=True):
        taught = final_states(student.lm, texts)
    pairs = zip(read_samples(student, texts, cfg), taught, strict=True)
    return [replace(sample, teacher=states, rehearsed=True) for sample, states in pairs]


def prompts_of(examples: Sequence[Example]) -> list[int]:
    """Their prompts by index, in order, each once."""
    return sorted({example.prompt_index for example in examples})


def split_by_prompt(examples: Sequence[Some], seed: int) -> tuple[list[Some], list[Some]]:
    """(training, validation): an eighth of the prompts, at least one, is held out. No prompt is in both."""
    prompts = prompts_of(examples)
    if len(prompts) < 2:
        raise UserError(
            f"all {len(examples)} kept completions answer the same prompt, so none can be held out; raise "
            "--gen.n-prompts or --filter.n-keep",
            resumable=False,
        )
    held_out = set(random.Random(seed).sample(prompts, max(1, len(prompts) // 8)))
    train = [example for example in examples if example.prompt_index not in held_out]
    return train, [example for example in examples if example.prompt_index in held_out]


# --- penalty and validation --------------------------------------------------------------------------------------
class SpectralPenalty:
    """weight / 2 * sum of the squared largest singular values of this round's updates B A, each times its scale."""

    def __init__(self, student: Student, weight: float, seed: int) -> None:
        self.weight = weight
        self.updates = student.adapter.updates()
        self.directions: list[Tensor] = []
        """A unit vector for each update, which comes closer to its first right singular vector with every step."""
        generator = torch.Generator().manual_seed(seed)
        for a, _, _ in self.updates:
            start = torch.randn(a.shape[1], generator=generator)
            self.directions.append((start / start.norm()).to(a.device))

    def backward(self) -> None:
        """Adds the gradient of the penalty to `.grad`."""
        total = torch.zeros((), device=self.directions[0].device)
        for i, (a, b, scale) in enumerate(self.updates):
            size, self.directions[i] = spectral_step(a, b, self.directions[i])
            total = total + 0.5 * self.weight * (scale * size).square()
        total.backward()


@torch.no_grad()
def teacher_kl(lm: LM, examples: Sequence[Example], tokens_per_pass: int) -> float | None:
    """The mean of KL(teacher || student) in nats over all positions of the texts, without those that are rehearsed.
    None: they have no teacher."""
    taught = [(s, s.teacher) for each in examples for s in each.samples if s.teacher is not None and not s.rehearsed]
    if not taught:
        return None
    found = []
    for group in batches([len(sample.ids) for sample, _ in taught], tokens_per_pass):
        states = completion_states(lm, [taught[i][0] for i in group])
        found += [kl_between(lm, taught[i][1], h) for i, h in zip(group, states, strict=True)]
    return torch.cat(found).mean().item()


@torch.no_grad()
def validate(lm: LM, examples: Sequence[Example], cfg: HealCfg) -> dict[str, float]:
    """Mean fit and divergence in nats, as in training."""
    groups = batches([n_padded(example) for example in examples], cfg.tokens_per_pass)
    parts = [losses(lm, [examples[i] for i in group], cfg) for group in groups]
    fits, divergences = zip(*parts, strict=True)
    return {"fit": torch.cat(fits).mean().item(), "divergence": torch.cat(divergences).mean().item()}
