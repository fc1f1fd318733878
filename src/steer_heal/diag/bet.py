"""Does the barrier keep the trait and drop the gibberish? Heals over-steered, UNFILTERED text with several seeds.

The strength of each barrier is chosen on --choose-seed. All arms are then measured on --seeds. The arm `no barrier,
stopped` trains without a barrier and stops once the trait has moved as far as with kl_rev rmse. It shows whether the
barrier does more than a shorter heal. The arm `control` heals without a barrier on the model's own unsteered text.
"""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

from steer_heal.diag.distil import TOKENS
from steer_heal.diag.lab import Given, Lab, PresetFlags, Row, mean_sd, show
from steer_heal.records import Collected, Scored
from steer_heal.settings import HealCfg, RunConfig, changed, settings
from steer_heal.stages.filter import perplexity

Barrier = Literal[
    "kl_rev-mean", "kl_rev-rmse", "kl_rev-p95", "kl_rev-max", "kl_fwd-mean", "kl_fwd-rmse", "kl_fwd-p95", "kl_fwd-max"
]
KEEP_SHIFT = 0.7
"""The bar: at least this share of the shift without a barrier,"""
MAX_PPL_SHARE = 1 / 3
"""at most this share of its perplexity,"""
MIN_ORACLE_GAIN = 0.15
"""and at least this much more text that is possible."""
COLUMNS = ("shift", "coherence", "text_tail_ppl_median", "oracle", "degenerate_frac", "kl_base")


@settings("")
class Flags(PresetFlags):
    kappa: float = 1.0
    """Dose at which the text is written."""
    seeds: tuple[int, ...] = (41, 42, 43)
    """Seeds on which the arms are measured."""
    choose_seed: int = 40
    """Seed on which each strength is chosen."""
    lams: tuple[float, ...] = (0.1, 0.3, 1.0)
    """Strengths of the barrier to choose from."""
    tau: float = 0.03
    """Divergence, in nats, up to which the barrier costs nothing."""
    barriers: tuple[Barrier, ...] = get_args(Barrier)
    """The barriers to compare, each named by its divergence and aggregate."""


class Seed:
    """One seed's over-steered text, and the arms that heal it."""

    def __init__(self, cfg: RunConfig, seed: int, kappa: float) -> None:
        self.lab = Lab.of(replace(cfg, seed=seed))
        self.steered = self.lab.collect(kappa, alphas=(1.0,), gates=())
        self.own = self.lab.collect(unsteered=True)

    def mean_ppl(self, scored: Sequence[Scored]) -> float:
        """Mean perplexity of the whole texts under the base."""
        texts = [row.completion for row in scored]
        with self.lab.bench.student.using("base") as lm:
            nlls = lm.completion_nll([text.prompt_ids for text in texts], [text.completion_ids for text in texts])
        return statistics.mean(min(perplexity(nll), 1e6) for nll in nlls)

    def arm(self, heal: HealCfg, collected: Collected | None = None, n_steps: int | None = None) -> Row:
        result, report = self.lab.healed(collected or self.steered, heal, n_steps=n_steps)
        return self.lab.row("", result) | {"n_steps": len(report.steps)}

    def stopped_at(self, heal: HealCfg, shift: float, n_steps: int) -> Row:
        """The heal, ended at the step where its shift comes closest to `shift`. The step is found by bisection."""
        low = 1
        high = n_steps
        tried = []
        while low <= high:
            middle = (low + high) // 2
            tried.append(self.arm(heal, n_steps=middle))
            if abs(tried[-1]["shift"]) < abs(shift):
                low = middle + 1
            else:
                high = middle - 1
        return min(tried, key=lambda row: abs(row["shift"] - shift))


def intact_share(row: Row) -> float:
    """Share of possible sentences or, without an oracle, of texts that are not broken."""
    return row["oracle"] if "oracle" in row else 1 - row["degenerate_frac"]


def score(row: Row, free: Row) -> float:
    """The worst of the three sides of the bar, which is met above 1."""
    return min(
        row["shift"] / free["shift"] / KEEP_SHIFT,
        MAX_PPL_SHARE * free["text_tail_ppl_median"] / row["text_tail_ppl_median"],
        (intact_share(row) - intact_share(free)) / MIN_ORACLE_GAIN,
    )


def main(flags: Flags, given: Given) -> None:
    cfg = changed(flags.settings(given), TOKENS)
    no_barrier = replace(cfg.heal, tau=flags.tau, divergence="none")
    heals = {}
    for name in flags.barriers:
        divergence, aggregate = name.split("-")
        heals[f"{divergence} {aggregate}"] = replace(no_barrier, divergence=divergence, aggregate=aggregate)
    chooser = Seed(cfg, flags.choose_seed, flags.kappa)
    free = chooser.arm(no_barrier)
    ladder = [{"arm": "no barrier", "lam": 0.0, **free}]
    chosen = {}
    for name, heal in heals.items():
        tried = {lam: chooser.arm(replace(heal, lam=lam)) for lam in flags.lams}
        ladder += [{"arm": name, "lam": lam, **row} for lam, row in tried.items()]
        best = max(tried, key=lambda lam, tried=tried: score(tried[lam], free))
        chosen[f"{name}, lam {best:g}"] = replace(heal, lam=best)
    rows = [row for seed in flags.seeds for row in arms_of(Seed(cfg, seed, flags.kappa), seed, no_barrier, chosen)]
    by_arm = {name: [row for row in rows if row["arm"] == name] for name in dict.fromkeys(row["arm"] for row in rows)}
    table = [over_seeds(mine, by_arm["no barrier"]) for mine in by_arm.values()]
    should = (
        f"kl_rev rmse keep at least {KEEP_SHIFT:.0%} of the shift without a barrier (kept), at a third of its "
        f"perplexity or less and an oracle at least {MIN_ORACLE_GAIN} higher.",
        "no barrier, stopped have broken text where kl_rev rmse does not, otherwise the barrier is only less training.",
        "control stay at 0: the shift comes from the text and not from the training.",
    )
    facts = {"kappa": flags.kappa, "tau": flags.tau, "seeds": flags.seeds, "choose_seed": flags.choose_seed}
    show(__doc__, table, should, flags.out, "bet", per_seed=rows, ladder=ladder, **facts)


def arms_of(at: Seed, seed: int, no_barrier: HealCfg, chosen: dict[str, HealCfg]) -> list[Row]:
    """The rows of one seed."""
    rows = {"no barrier": at.arm(no_barrier), "control": at.arm(no_barrier, at.own)}
    rows |= {name: at.arm(heal) for name, heal in chosen.items()}
    barrier = next((row for name, row in rows.items() if name.startswith("kl_rev rmse")), None)
    if barrier is not None:
        stopped = at.stopped_at(no_barrier, barrier["shift"], rows["no barrier"]["n_steps"])
        rows["no barrier, stopped at kl_rev rmse's shift"] = stopped
    ppl = {"steered_ppl": at.mean_ppl(at.steered.kept), "base_ppl": at.mean_ppl(at.own.scored)}
    return [{"arm": name, "seed": seed, **ppl, **row} for name, row in rows.items()]


def over_seeds(rows: Sequence[Row], no_barrier: Sequence[Row]) -> Row:
    """Mean and sd of one arm, and the share that it kept of the shift without a barrier."""
    shares = [row["shift"] / free["shift"] for row, free in zip(rows, no_barrier, strict=True)]
    columns = {name: [row[name] for row in rows if row.get(name) is not None] for name in COLUMNS}
    spread = {name: mean_sd(values) for name, values in columns.items() if values}
    return {"arm": rows[0]["arm"], "kept": statistics.mean(shares), **spread}
