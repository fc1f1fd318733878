"""The controller that picks kappa, and collects kept completions at it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from steer_heal.records import Collected, Completion, DoseProbe, Scored, Starved, derive_seed
from steer_heal.stages.cfg import DoseCfg, FilterCfg
from steer_heal.stages.generate import Ask

Write = Callable[[Sequence[Ask]], list[Completion]]
"""Completions of the steered student."""
Score = Callable[[Sequence[Completion]], list[Scored]]
"""The filter, under the base."""


@dataclass
class Asker:
    """Hands out prompts and alphas evenly, every pair of them before any comes again.

    It never restarts, so probes and collection together cover the pool.
    """

    prompts: Sequence[str]
    alphas: Sequence[float]
    seed: tuple[int | str, ...]
    n_asked: int = 0

    def asks(self, n: int, kappa: float) -> list[Ask]:
        out = []
        for _ in range(n):
            i, self.n_asked = self.n_asked, self.n_asked + 1
            prompt = i % len(self.prompts)
            cycle = i // math.lcm(len(self.prompts), len(self.alphas))
            alpha = self.alphas[(i + cycle) % len(self.alphas)]
            out.append(Ask(prompt, self.prompts[prompt], alpha, kappa, derive_seed(*self.seed, i)))
        return out


def collect(
    write: Write, score: Score, prompts: Sequence[str], alphas: Sequence[float], cfg: DoseCfg, keep: FilterCfg, seed: tuple[int | str, ...],
    kappa: float | None = None,
) -> Collected:
    """Collects kept completions at `kappa`; where it is None, first finds the highest kappa whose completions
    survive at the target rate.

    Survivors of the probes are banked: any dose up to the chosen one is training text, unless cfg.train_on is
    highest. Where even the floor starves the filter this is a Starved that says by how much.
    """
    asker = Asker(prompts, alphas if cfg.train_on == "all" else (max(alphas),), seed)
    scored: list[Scored] = []
    probes: list[DoseProbe] = []
    if kappa is None:
        kappa = find_kappa(lambda asks: score(write(asks)), asker, cfg, scored, probes)
    highest = kappa * max(alphas)
    while (missing := keep.n_keep - len(usable(scored, highest, cfg))) > 0 and len(scored) < keep.max_attempts:
        n = min(max(4, round(missing / cfg.target)), keep.max_attempts - len(scored))
        scored.extend(score(write(asker.asks(n, kappa))))
    return choose(scored, probes, kappa, alphas, cfg, keep)


def choose(
    scored: Sequence[Scored], probes: Sequence[DoseProbe], kappa: float, alphas: Sequence[float], cfg: DoseCfg, keep: FilterCfg
) -> Collected:
    """What trains of all that was written; Starved where it is less than keep.min_train."""
    kept = spread(usable(scored, kappa * max(alphas), cfg), keep.n_keep)
    found = Collected(tuple(kept), tuple(scored), kappa, tuple(probes))
    if len(kept) < keep.min_train:
        reasons: dict[str, int] = defaultdict(int)
        for row in scored:
            for reason in row.reasons:
                reasons[reason] += 1
        raise Starved(
            f"the filter starved: {len(kept)} of {len(scored)} completions kept at kappa {kappa:.3g}, filter.min_train is {keep.min_train} "
            f"(dropped for {dict(reasons)}); lower {'--dose.floor' if probes else 'the dose'}, raise --filter.ppl-max or --filter.max-attempts, or end at an earlier round",
            found,
        )
    return found


def to_rows(collected: Collected) -> list[dict[str, Any]]:
    """Every completion for an event, with its scores, what became of it and why."""
    order = {id(row): i for i, row in enumerate(collected.kept)}
    return [
        {
            **asdict(row.completion), "scores": row.scores, "keep": row.kept, "train": id(row) in order, "train_order": order.get(id(row)),
            "failed": row.failed, "reasons": row.reasons,
        }
        for row in collected.scored
    ]


def from_row(row: Mapping[str, Any]) -> Scored:
    """The completion of an event's row; a score that is null was the perplexity of an empty text."""
    values = {f.name: tuple(row[f.name]) if isinstance(row[f.name], list) else row[f.name] for f in fields(Completion)}
    scores = {name: math.inf if score is None else score for name, score in row["scores"].items()}
    return Scored(Completion(**values), scores, tuple(row["failed"]), tuple(row["reasons"]))


def usable(scored: Sequence[Scored], highest: float, cfg: DoseCfg) -> list[Scored]:
    """Survivors at the highest dose or, where lower ones train as well, up to it."""
    lowest = -math.inf if cfg.train_on == "all" else highest * (1 - 1e-9)
    return [row for row in scored if row.kept and lowest <= row.completion.dose <= highest * (1 + 1e-9)]


def find_kappa(
    judged: Callable[[Sequence[Ask]], list[Scored]], asker: Asker, cfg: DoseCfg, scored: list[Scored], probes: list[DoseProbe]
) -> float:
    """The highest probed kappa whose completions survive at the target rate, else the floor; appends what it wrote."""

    def probe(kappas: Sequence[float]) -> None:
        asks = [ask for kappa in kappas for ask in asker.asks(cfg.n_probes, kappa)]
        rows = judged(asks)
        scored.extend(rows)
        for i, kappa in enumerate(kappas):
            part = rows[i * cfg.n_probes : (i + 1) * cfg.n_probes]
            probes.append(DoseProbe(kappa, len(part), sum(row.kept for row in part)))

    probe(log_grid(cfg.floor, cfg.ceiling, cfg.n_kappas))
    for _ in range(cfg.n_refinements):
        low, high = bracket(probes, cfg.target)
        if high is None or low is None or high / low < 1.05:
            break
        probe(log_grid(low, high, cfg.n_kappas // 2 + 2)[1:-1])
    low, _ = bracket(probes, cfg.target)
    return cfg.floor if low is None else low


def log_grid(low: float, high: float, n: int) -> list[float]:
    """n values from low to high, both included, evenly spaced in the logarithm."""
    return [low * (high / low) ** (i / (n - 1)) for i in range(n)] if high > low else [low]


def bracket(probes: Sequence[DoseProbe], target: float) -> tuple[float | None, float | None]:
    """(highest kappa that survives, lowest that does not) under the decreasing fit to all probes."""
    fitted = decreasing_fit(sorted(probes, key=lambda p: p.kappa))
    good = [kappa for kappa, survival in fitted if survival >= target]
    bad = [kappa for kappa, survival in fitted if survival < target]
    return (max(good) if good else None), (min(bad) if bad else None)


def decreasing_fit(probes: Sequence[DoseProbe]) -> list[tuple[float, float]]:
    """(kappa, survival) with survival never rising in kappa: neighbours that break the order are pooled.

    Pool-adjacent-violators, weighted by probes, so that one lucky probe at a high dose does not pick it.
    """
    blocks: list[list] = []
    for probe in probes:
        blocks.append([[probe.kappa], probe.n_kept, probe.n])
        while len(blocks) > 1 and blocks[-1][1] / blocks[-1][2] > blocks[-2][1] / blocks[-2][2]:
            kappas, n_kept, n = blocks.pop()
            blocks[-1] = [blocks[-1][0] + kappas, blocks[-1][1] + n_kept, blocks[-1][2] + n]
    return [(kappa, n_kept / n) for kappas, n_kept, n in blocks for kappa in kappas]


def spread(rows: Sequence[Scored], n: int) -> list[Scored]:
    """At most n rows, as evenly over prompts as they allow, the highest dose of each prompt first."""
    by_prompt: dict[int, list[Scored]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: -row.completion.dose):
        by_prompt[row.completion.prompt_index].append(row)
    out: list[Scored] = []
    depth = 0
    while len(out) < min(n, len(rows)):
        layer = [by_prompt[p][depth] for p in sorted(by_prompt) if depth < len(by_prompt[p])]
        out.extend(layer[: n - len(out)])
        depth += 1
    return out
