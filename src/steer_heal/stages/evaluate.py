"""Runs the evals on one state of the model, and compares it with the base on the same items."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from steer_heal.evals import drift, free_text, moral_foundations, persona
from steer_heal.evals.metrics import Condition, Metric
from steer_heal.evals.instrument import Instrument, Vignette, load_instrument, load_vignettes
from steer_heal.records import EvalResult, Trait, UserError, derive_seed
from steer_heal.stages.bake import Gate, Student
from steer_heal.stages.cfg import EvalCfg, FilterCfg
from steer_heal.stages.filter import judge
from steer_heal.stages.generate import Ask, generate


@dataclass(frozen=True)
class EvalItems:
    """What every state is asked, loaded once: the same items make the comparison paired."""

    vignettes: tuple[Vignette, ...]
    instrument: Instrument
    prompts: tuple[str, ...]


def load_items(cfg: EvalCfg, trait: Trait) -> EvalItems:
    if cfg.n_prompts > len(trait.prompts):
        raise UserError(f"eval.n_prompts is {cfg.n_prompts}: the pool of trait {trait.name!r} holds {len(trait.prompts)} prompts; ask for fewer")
    return EvalItems(tuple(load_vignettes(cfg.vignettes)), load_instrument(cfg.instrument), trait.prompts[-cfg.n_prompts :])


def evaluate(
    student: Student, which: Gate, condition: Condition, items: EvalItems, trait: Trait, cfg: EvalCfg, keep: FilterCfg, seed: int,
    base: EvalResult | None = None,
) -> EvalResult:
    """Every metric of one state; with `base`, also the 95 percent intervals `<name>_lo`, `<name>_hi` of the
    paired difference to it. Free text draws from the same random streams in every state."""
    texts = _free_text(student, which, condition, items, trait, cfg, seed)
    with student.gate(which) as lm:
        states = drift.final_states(lm, texts, condition)
    with student.gate("base") as lm:
        reference = drift.final_states(lm, texts, Condition(trait.plain_system))
        scored = [judge(c, lm.nll(h, c.completion_ids).cpu(), trait.narration, keep) for c, h in zip(texts, reference, strict=True)]
        under_base = drift.items(lm, states, reference) | persona.items(lm, texts, trait)
    oracle = None
    if cfg.oracle == "toylm":
        from steer_heal.toylm.oracle import oracle
    values = _vignettes(student, which, condition, items, cfg) | free_text.items(scored, oracle) | under_base
    used = moral_foundations.METRICS + free_text.METRICS + drift.METRICS + persona.METRICS + (free_text.ORACLE_METRICS if oracle else [])
    metrics: dict[str, float | None] = {m.name: collapse(m, values[m.item]) for m in used}
    if base is not None:
        metrics |= intervals(used, values, base.items, cfg.n_bootstrap, seed)
    rows = tuple(
        {"prompt": s.completion.prompt, "text": s.completion.text, **s.scores, "failed": s.failed, "reasons": s.reasons} for s in scored
    )
    return EvalResult(metrics, values, rows)


def from_event(event: Mapping[str, Any]) -> EvalResult:
    """The result that an event holds. Null is an item without a value or, of a perplexity, an infinite one (an empty text)."""
    lost = {metric.item: math.inf for metric in free_text.METRICS if metric.how == "median"}
    items = {name: [lost.get(name, math.nan) if x is None else x for x in values] for name, values in event["items"].items()}
    return EvalResult(event["metrics"], items, tuple(event.get("texts", ())))


def _free_text(
    student: Student, which: Gate, condition: Condition, items: EvalItems, trait: Trait, cfg: EvalCfg, seed: int
) -> list:
    n = len(items.prompts)
    asks = [
        Ask(i % n, items.prompts[i % n], alpha=condition.dose, kappa=1.0, seed=derive_seed(seed, "eval", i)) for i in range(cfg.n_texts)
    ]
    with student.gate(which) as lm:
        return generate(lm, asks, condition.vector, condition.system, trait.plain_system, cfg.max_new_tokens, cfg.batch_size)


def _vignettes(student: Student, which: Gate, condition: Condition, items: EvalItems, cfg: EvalCfg) -> dict[str, list[float]]:
    with student.gate(which) as lm:
        if cfg.backend == "tinymfv":
            from steer_heal.evals.tinymfv_backend import run as run_tinymfv

            return run_tinymfv(lm, items.vignettes, condition, cfg.think_tokens, cfg.batch_size)
        return moral_foundations.run(lm, items.vignettes, items.instrument, condition, cfg.think_tokens, cfg.batch_size)


_HOW = {
    "mean": lambda x, axis: np.nanmean(x, axis=axis),
    "log_mean": lambda x, axis: np.log(np.maximum(np.nanmean(x, axis=axis), 1e-30)),
    "median": lambda x, axis: np.nanmedian(x, axis=axis),
}


def collapse(metric: Metric, values: Sequence[float]) -> float | None:
    """The metric of its items; None where no item has a value."""
    array = np.asarray(values, dtype=np.float64)
    return None if np.isnan(array).all() else float(_HOW[metric.how](array, -1))


def intervals(
    used: Sequence[Metric], values: Mapping[str, Sequence[float]], base: Mapping[str, Sequence[float]], n_bootstrap: int, seed: int
) -> dict[str, float | None]:
    """Paired percentile bootstrap: the same resampled items are read in both states (Efron and Tibshirani 1993).

    Items without a value in either state are left out of both.
    """
    out: dict[str, float | None] = {}
    for metric in used:
        here, there = (np.asarray(side[metric.item], dtype=np.float64) for side in (values, base))
        both = np.isfinite(here) & np.isfinite(there) if metric.how != "median" else ~(np.isnan(here) | np.isnan(there))
        here, there = here[both], there[both]
        if not len(here):
            out |= {f"{metric.name}_lo": None, f"{metric.name}_hi": None}
            continue
        rows = np.random.default_rng(derive_seed(seed, "bootstrap", len(here)) % 2**32).integers(0, len(here), (n_bootstrap, len(here)))
        shift = _HOW[metric.how](here[rows], 1) - _HOW[metric.how](there[rows], 1)
        low, high = (float(q) for q in np.percentile(shift, [2.5, 97.5]))
        out |= {f"{metric.name}_lo": low, f"{metric.name}_hi": high}
    return out
