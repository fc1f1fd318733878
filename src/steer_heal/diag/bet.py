"""Does the barrier keep the trait and drop the gibberish? Heals of over-steered, UNFILTERED text, over seeds.

Every strength is chosen on --choose-seed and measured on --seeds. `no barrier, stopped` ends once its trait has moved
as far as with the barrier: does the barrier do more than less training would? `control` is the heal without a barrier
on the model's own unsteered text.
"""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

from steer_heal.diag.lab import Lab, LabCfg, LabFlags, mean_sd, show
from steer_heal.records import Collected, Scored
from steer_heal.settings import HealCfg
from steer_heal.stages.filter import perplexity

Barrier = Literal[
    "kl_rev-mean", "kl_rev-rmse", "kl_rev-p95", "kl_rev-max", "kl_fwd-mean", "kl_fwd-rmse", "kl_fwd-p95", "kl_fwd-max"
]
KEEP_SHIFT, MAX_PPL_SHARE, MIN_ORACLE_GAIN = 0.7, 1 / 3, 0.15
"""The bar: this share of the shift without a barrier, at this share of its perplexity or less, and this much more text
that is possible."""
COLUMNS = ("shift", "coherence", "text_tail_ppl_median", "oracle", "degenerate_frac", "kl_base")
Row = dict[str, Any]


class Seed:
    """One seed's over-steered text, and the arms that heal it."""

    def __init__(self, lab: LabCfg, seed: int, kappa: float) -> None:
        self.lab = Lab(replace(lab, seed=seed).run_config())
        self.found = self.lab.collect(kappa, alphas=(1.0,), gates=())
        self.own = self.lab.collect(unsteered=True)

    def mean_ppl(self, scored: Sequence[Scored]) -> float:
        """Mean over texts of the perplexity of each whole text under the base."""
        texts = [row.completion for row in scored]
        with self.lab.student.using("base") as lm:
            nlls = lm.completion_nll([text.prompt_ids for text in texts], [text.completion_ids for text in texts])
        return statistics.mean(min(perplexity(nll), 1e6) for nll in nlls)

    def arm(self, heal: HealCfg, collected: Collected | None = None, n_steps: int | None = None) -> Row:
        result, steps = self.lab.healed(collected or self.found, heal, n_steps=n_steps)
        return self.lab.row("", result) | {"n_steps": len(steps)}

    def stopped_at(self, heal: HealCfg, shift: float, n_steps: int) -> Row:
        """The heal ended at the step where its shift comes closest to `shift`: bisection over the step."""
        low, high, tried = 1, n_steps, []
        while low <= high:
            middle = (low + high) // 2
            tried.append(self.arm(heal, n_steps=middle))
            low, high = (middle + 1, high) if abs(tried[-1]["shift"]) < abs(shift) else (low, middle - 1)
        return min(tried, key=lambda row: abs(row["shift"] - shift))


def whole(row: Row) -> float:
    """Share of possible sentences; without an oracle, of whole texts."""
    return row["oracle"] if "oracle" in row else 1 - row["degenerate_frac"]


def score(row: Row, free: Row) -> float:
    """Above 1 where the bar is met; the worst of its three sides counts."""
    return min(
        row["shift"] / free["shift"] / KEEP_SHIFT,
        MAX_PPL_SHARE * free["text_tail_ppl_median"] / row["text_tail_ppl_median"],
        (whole(row) - whole(free)) / MIN_ORACLE_GAIN,
    )


def main(
    lab: LabFlags,
    kappa: float = 1.0,
    seeds: tuple[int, ...] = (41, 42, 43),
    choose_seed: int = 40,
    lams: tuple[float, ...] = (0.1, 0.3, 1.0),
    tau: float = 0.03,
    barriers: tuple[Barrier, ...] = get_args(Barrier),
) -> None:
    no_barrier = replace(lab.run_config().heal, tau=tau, divergence="none")
    arms = {name.replace("-", " "): name.split("-") for name in barriers}

    def heal(arm: str, lam: float) -> HealCfg:
        divergence, aggregate = arms[arm]
        return replace(no_barrier, divergence=divergence, aggregate=aggregate, lam=lam)

    chooser = Seed(lab, choose_seed, kappa)
    free = chooser.arm(no_barrier)
    tried = {(arm, lam): chooser.arm(heal(arm, lam)) for arm in arms for lam in lams}
    ladder = [{"arm": arm, "lam": lam, **row} for (arm, lam), row in {("no barrier", 0.0): free, **tried}.items()]
    best = {arm: max(lams, key=lambda lam, arm=arm: score(tried[arm, lam], free)) for arm in arms}
    rows = []
    for seed in seeds:
        at = Seed(lab, seed, kappa)
        result = {"no barrier": at.arm(no_barrier), "control": at.arm(no_barrier, at.own)}
        result |= {f"{arm}, lam {lam:g}": at.arm(heal(arm, lam)) for arm, lam in best.items()}
        barrier = next((row for name, row in result.items() if name.startswith("kl_rev rmse")), None)
        if barrier is not None:
            stopped = at.stopped_at(no_barrier, barrier["shift"], result["no barrier"]["n_steps"])
            result["no barrier, stopped at kl_rev rmse's shift"] = stopped
        ppl = {"steered_ppl": at.mean_ppl(at.found.kept), "base_ppl": at.mean_ppl(at.own.scored)}
        rows += [{"arm": name, "seed": seed, **ppl, **row} for name, row in result.items()]
    of_arm = lambda name: [row for row in rows if row["arm"] == name]
    table = [over_seeds(of_arm(name), of_arm("no barrier")) for name in dict.fromkeys(row["arm"] for row in rows)]
    should = (
        f"kl_rev rmse keep at least {KEEP_SHIFT:.0%} of the shift without a barrier (kept), at a third of its "
        f"perplexity or less and an oracle at least {MIN_ORACLE_GAIN} higher.",
        "no barrier, stopped have broken text where kl_rev rmse has whole text: else the barrier is only less "
        "training.",
        "control stay at 0: the shift comes from the text and not from the training.",
    )
    settings = {"kappa": kappa, "tau": tau, "seeds": seeds, "choose_seed": choose_seed}
    show(__doc__, table, should, lab.out, "bet", per_seed=rows, ladder=ladder, **settings)


def over_seeds(rows: Sequence[Row], no_barrier: Sequence[Row]) -> Row:
    """Mean and sd of one arm, and the share that it kept of the shift without a barrier."""
    shares = [row["shift"] / free["shift"] for row, free in zip(rows, no_barrier, strict=True)]
    columns = {name: [row[name] for row in rows if row.get(name) is not None] for name in COLUMNS}
    spread = {name: mean_sd(values) for name, values in columns.items() if values}
    return {"arm": rows[0]["arm"], "kept": statistics.mean(shares), **spread}
