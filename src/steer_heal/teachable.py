"""Is there anything to teach? What a teacher made of the personas changes on the trait's pairs, before any training.

    found = teachable(bench)

The contrast of the personas is set beside two kinds of teachers that have nothing to do with the trait, each as far
from the base: contrasts of the personas of other traits, and vectors that point anywhere. spec.md has the rules.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from steer_heal.bench import Bench
from steer_heal.evals.replies import reply_states
from steer_heal.inputs.pairs import Pair
from steer_heal.inputs.traits import load_trait, other_traits
from steer_heal.intervals import of_difference
from steer_heal.model.lm import LM
from steer_heal.model.steering import Condition, Vector, weighted
from steer_heal.progress import SILENT, Progress
from steer_heal.records import NOTHING, Completion, Teachable, Teaching, alone, derive_seed
from steer_heal.stages.calibrate import contrast_strength, dose_at, mean_kl
from steer_heal.stages.generate import Ask
from steer_heal.stages.states import final_states

BUDGETS = (0.03, 0.1, 0.3)
"""Means of KL(teacher || base) on the base's own text, in nats, at which the contrast is read."""
BUDGET = 0.1
"""The one at which it is judged, and at which all other teachers are read."""
N_TEXTS, N_TOKENS = 8, 48
"""Own texts that the budgets are measured on."""
N_RANDOM = 10
TIMES_BAND = 2.0
"""How many times the null band a teachable contrast moves the pairs."""


@dataclass(frozen=True)
class Read:
    """Final hidden states of the base under one condition."""

    texts: list[Tensor]
    """On its own text, each Float[n d]."""
    replies: list[list[Tensor]]
    """On the two replies of each pair, each Float[n d]."""


@dataclass(frozen=True)
class Reader:
    """The base, its own text, and the pairs."""

    lm: LM
    texts: Sequence[Completion]
    pairs: Sequence[Pair]
    progress: Progress
    n_readings: int
    n_read: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def read(self, condition: Condition) -> Read:
        self.progress.part(next(self.n_read), self.n_readings, "teacher")
        asked = [alone(pair.prompt) for pair in self.pairs]
        replies = reply_states(self.lm, asked, self.reply_ids, condition)
        return Read(final_states(self.lm, self.texts, condition), replies)

    @cached_property
    def reply_ids(self) -> list[list[tuple[int, ...]]]:
        return [[self.lm.encode_reply(text) for text in (pair.positive, pair.negative)] for pair in self.pairs]

    def margins(self, replies: Sequence[Sequence[Tensor]]) -> np.ndarray:
        """For each pair, as the eval contrast has it: nats per token by which the positive reply is likelier."""
        found = []
        for states, ids in zip(replies, self.reply_ids, strict=True):
            nlls = [self.lm.nll(h.to(self.lm.device), i).mean().item() for h, i in zip(states, ids, strict=True)]
            found.append(nlls[1] - nlls[0])
        return np.array(found)


def teachable(bench: Bench, *, short: bool = False, progress: Progress = SILENT) -> Teachable:
    """The verdict on the trait of a bench, which has pairs, with the readings that it rests on. `short`: at one budget
    and without random vectors. Each reading of the pairs is a part of `progress`."""
    inputs, trait, cfg = bench.inputs, bench.trait, bench.cfg
    asks = [Ask(i, p, derive_seed(cfg.seed, "teachable", i)) for i, p in enumerate(inputs.prompts[:N_TEXTS])]
    texts = bench.write(bench.plain, asks, adapters="base", max_new_tokens=N_TOKENS)
    with bench.student.using("base") as lm:
        others = [load_trait(name) for name in other_traits(trait, inputs.pairs)]
        reader = Reader(lm, texts, inputs.pairs, progress, 3 + 2 * len(others) + (0 if short else N_RANDOM))
        base = reader.read(bench.plain)
        start = reader.margins(base.replies)

        def told(name: str, read: Read, strength: float | None = None) -> Teaching:
            change = reader.margins(read.replies) - start
            rng = np.random.default_rng(derive_seed(cfg.seed, "teachable", name) % 2**32)
            ends = of_difference("mean", change, np.zeros_like(change), cfg.eval.n_bootstrap, rng) or (None, None)
            kl = mean_kl(lm, read.texts, base.texts)
            return Teaching(
                name=name,
                strength=strength,
                kl=kl,
                shift=float(change.mean()),
                low=ends[0],
                high=ends[1],
                right=float((change > 0).mean()),
                halves=(float(change[::2].mean()), float(change[1::2].mean()) if len(change) > 1 else math.nan),
            )

        def contrast(name: str, positive: Read, negative: Read, budget: float) -> list[Teaching]:
            apart = _combined(positive, negative, (1.0, -1.0))
            strength = contrast_strength(lm, base.texts, apart.texts, budget)
            return [] if strength is None else [told(name, _combined(base, apart, (1.0, strength)), strength)]

        positive, negative = (reader.read(Condition(side)) for side in (trait.positive, trait.negative))
        personas = (told("persona", positive), told("opposite persona", negative))
        budgets = (BUDGET,) if short else BUDGETS
        contrasts = [each for b in budgets for each in contrast(f"contrast at {b:g}", positive, negative, b)]
        null = []
        for other in others:
            of, against = (reader.read(Condition(side)) for side in (other.positive, other.negative))
            null += contrast(f"contrast of {other.name}", of, against, BUDGET)
        for i in range(0 if short else N_RANDOM):
            read = _random(bench, reader, base, i)
            null += [] if read is None else [told(f"random vector {i + 1}", read)]
    return judged(personas, tuple(contrasts), tuple(null))


def _combined(first: Read, second: Read, weights: tuple[float, float]) -> Read:
    """The weighted sum of two readings."""

    def add(a: Tensor, b: Tensor) -> Tensor:
        return weighted(weights, (a, b))

    return Read(
        [add(*both) for both in zip(first.texts, second.texts, strict=True)],
        [[add(*both) for both in zip(*pair, strict=True)] for pair in zip(first.replies, second.replies, strict=True)],
    )


def _random(bench: Bench, reader: Reader, base: Read, i: int) -> Read | None:
    """The base with a random vector on the steered blocks, as far from the base as the budget. None: no dose is."""
    lm = reader.lm
    generator = torch.Generator().manual_seed(derive_seed(bench.cfg.seed, "teachable", "vector", i))
    blocks = lm.band("steer.layers", bench.cfg.steer.layers)
    vector = Vector({block: torch.randn(lm.width, generator=generator) for block in blocks})
    steered = Condition(bench.trait.plain_system, vector)
    dose = dose_at(lm, steered, reader.texts, base.texts, BUDGET)
    return None if dose is None else reader.read(replace(steered, dose=dose))


def judged(personas: tuple[Teaching, ...], contrasts: tuple[Teaching, ...], null: tuple[Teaching, ...]) -> Teachable:
    """The verdict, by the contrast at BUDGET:

    - nothing to teach: the interval of its shift is not above 0, or no strength of it reaches BUDGET.
    - teachable: the shift is TIMES_BAND times the null band or more, and both halves of the pairs rise.
    - weak: all else.
    """
    own = next((each for each in contrasts if abs(each.kl / BUDGET - 1) < 0.1), None)
    band = math.sqrt(sum(each.shift**2 for each in null) / len(null)) if null else 0.0
    verdict = "weak"
    if own is None:
        verdict = NOTHING
        reason = f"no strength of the contrast of the personas moves the base by {BUDGET:g} nats: they hardly differ"
    else:
        ends = "unknown" if own.low is None or own.high is None else f"{own.low:+.3f} to {own.high:+.3f}"
        reason = (
            f"at {BUDGET:g} nats from the base, the contrast of the personas moves the pairs by {own.shift:+.3f} nats "
            f"per token (95 % interval {ends}), {own.right:.0%} of them the right way; teachers that have nothing to "
            f"do with the trait move them by {band:.3f}"
        )
        if own.low is not None and own.low <= 0:
            verdict = NOTHING
        elif own.low is not None and own.shift >= TIMES_BAND * band and min(own.halves) > 0:
            verdict = "teachable"
    return Teachable(verdict=verdict, reason=reason, band=band, personas=personas, contrasts=contrasts, null=null)
