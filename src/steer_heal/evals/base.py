"""What an eval is, which state of the model it sees, and how item values become metrics with intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
from torch import Tensor

from steer_heal.errors import UserError
from steer_heal.evals.replies import pair_margins
from steer_heal.inputs import Inputs
from steer_heal.intervals import by_prompt, has_value, of_difference, statistic
from steer_heal.model.decode import Decoding
from steer_heal.model.state import State
from steer_heal.model.steering import Condition
from steer_heal.model.student import Student
from steer_heal.progress import SILENT, Progress
from steer_heal.records import Answer, Completion, EvalResult, Metric, Scored, derive_seed
from steer_heal.settings import EvalCfg, FilterCfg
from steer_heal.stages.filter import score_texts
from steer_heal.stages.generate import Ask, generate
from steer_heal.stages.states import final_states

Items = dict[str, list[float]]
"""Per-item values by name. NaN: the item has no value."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One state of the model as the evals see it. Its texts are written when first asked for."""

    student: Student
    state: State
    inputs: Inputs
    cfg: EvalCfg
    keep: FilterCfg
    seed: int
    base: EvalResult | None = None
    """What was measured of the base, which this state is compared with."""
    cache: MutableMapping[str, Any] = field(default_factory=dict)
    """What evals keep between measurements, as JSON values by key. A run in a folder has it on disk."""

    @cached_property
    def texts(self) -> list[Completion]:
        """Free-text answers to the evaluation prompts. Every state draws from the same random streams."""
        prompts = self.inputs.eval_prompts
        n = len(prompts)
        condition = self.state.condition
        asks = [
            Ask(i % n, prompts[i % n], derive_seed(self.seed, "eval", i), alpha=condition.dose)
            for i in range(self.cfg.n_texts)
        ]
        plain = self.inputs.trait.plain_system
        how = Decoding(self.cfg.max_new_tokens, self.cfg.batch_size)
        with self.student.using(self.state.adapters) as lm:
            return generate(lm, asks, condition, plain_system=plain, how=how)

    @cached_property
    def margins(self) -> list[float]:
        """For each contrast pair of the trait, the margin of the positive reply: see `replies.margins`."""
        with self.student.using(self.state.adapters) as lm:
            return pair_margins(lm, self.inputs.pairs, self.state.condition)

    @cached_property
    def hidden(self) -> list[Tensor]:
        """Per text, Float[n d]: final hidden states at its positions, in the state that wrote it."""
        with self.student.using(self.state.adapters) as lm:
            return final_states(lm, self.texts, self.state.condition)

    @cached_property
    def base_hidden(self) -> list[Tensor]:
        """Per text, Float[n d]: final hidden states at its positions, under the base and the plain prompt."""
        with self.student.using("base") as lm:
            return final_states(lm, self.texts, Condition(self.inputs.trait.plain_system))

    @cached_property
    def scored(self) -> list[Scored]:
        """The texts with the number of every gate."""
        with self.student.using("base") as lm:
            pairs = zip(self.texts, self.base_hidden, strict=True)
            nlls = [lm.nll(hidden.to(lm.device), text.completion_ids).cpu() for text, hidden in pairs]
            return score_texts(lm, self.texts, trait=self.inputs.trait, cfg=self.keep, nlls=nlls)


@dataclass(frozen=True)
class Eval:
    """Item values of a state, and the metrics made of them."""

    items: Callable[[Subject], Items]
    metrics: tuple[Metric, ...]
    of: Literal["vignette", "text", "pair", "question", "instruction", "trait"]
    """What one item is; a text is an answer that the state wrote, a trait one of the panel. Items are in the order of
    those."""
    needs: tuple[str, ...] = ()
    """Fields of Inputs that a run without this eval may leave empty."""
    wording: tuple[str, ...] = ()
    """Keys of `Inputs.wording`, besides `of`, that readers of its items need."""
    writes: Callable[[Inputs], int] | None = None
    """Number of texts that it writes once a run and keeps in `Subject.cache`."""


per_token = partial(Metric, form="+.3f", unit="nats per token")
"""A metric of log-likelihoods."""
log_probability = partial(Metric, how="log_mean", form="+.3f", unit="nats", moved=0.3, shown=False)
"""A metric of the probability of an answer."""


def evaluate(subject: Subject, evals: Sequence[Eval], progress: Progress = SILENT) -> EvalResult:
    """Every metric of one state; with a base, also the 95 percent intervals `<name>_lo`, `<name>_hi` of the paired
    difference to it. Each eval is a part of `progress`."""
    values: Items = {}
    for i, each in enumerate(evals):
        progress.part(i + 1, len(evals))
        own = each.items(subject)
        if taken := sorted(values.keys() & own.keys()):
            raise UserError(f"two evals return items called {taken[0]!r}; rename those of one of them", resumable=False)
        values |= own
    metrics = [replace(metric, of=each.of) for each in evals for metric in each.metrics]
    found = {metric.name: collapse(metric, values[metric.item]) for metric in metrics}
    if subject.base is not None:
        prompts = [text.prompt for text in subject.texts]
        found |= intervals(metrics, values, subject.base.items, subject.cfg.n_bootstrap, subject.seed, prompts)
    answers = [
        Answer(prompt=text.prompt, text=text.text, scores=row.scores, failed=row.failed, reasons=row.reasons)
        for row, text in zip(subject.scored, subject.texts, strict=True)
    ]
    return EvalResult(found, values, tuple(answers))


# --- item values to metrics --------------------------------------------------------------------------------------
def collapse(metric: Metric, values: Sequence[float]) -> float | None:
    """The metric of its items; None where no item has a value."""
    array = np.asarray(values, dtype=np.float64)
    array = array[~np.isnan(array)]
    return float(statistic(metric.how, array)) if len(array) else None


def intervals(
    metrics: Sequence[Metric],
    values: Mapping[str, Sequence[float]],
    base: Mapping[str, Sequence[float]],
    n_bootstrap: int,
    seed: int,
    prompts: Sequence[str] = (),
) -> dict[str, float | None]:
    """The ends of the interval of each metric's difference to base. See `of_difference` and `by_prompt`. `prompts`:
    those of the texts.

    Items without a value in either state are left out of both. Both ends are None where fewer than two are left.
    """
    out: dict[str, float | None] = {}
    for metric in metrics:
        here, there = (np.asarray(side[metric.item], dtype=np.float64) for side in (values, base))
        both = has_value(metric.how, here) & has_value(metric.how, there)
        here, there = here[both], there[both]
        if metric.of == "text" and len(prompts) == len(both):  # an eval of a plugin may have other items
            here, there = by_prompt(metric.how, np.asarray(prompts)[both].tolist(), here, there)
        rng = np.random.default_rng(derive_seed(seed, "bootstrap", len(here)) % 2**32)
        low, high = of_difference(metric.how, here, there, n_bootstrap, rng) or (None, None)
        out |= {f"{metric.name}_lo": low, f"{metric.name}_hi": high}
    return out
