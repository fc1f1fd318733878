"""Does the barrier keep the trait and drop the gibberish? Heals of over-steered, UNFILTERED text, arm by arm, over seeds.

Every strength is chosen on --choose-seed and read on --seeds. `nll stopped` is nll ended when its trait has moved as far as
the barrier's: is the barrier more than less training? `control` is the same heal on the model's own unsteered text.
"""

import statistics
import sys
from dataclasses import replace
from typing import Annotated, Literal

import tyro

from steer_heal.lab import Lab, LabCfg, cli, show
from steer_heal.records import Completion
from steer_heal.stages.cfg import HealCfg

BARRIERS = tuple(f"{d}-{a}" for d in ("kl_rev", "kl_fwd") for a in ("mean", "rmse", "p95", "max"))
KEEP_SHIFT, MAX_PPL_SHARE, MIN_ORACLE_GAIN = 0.7, 1 / 3, 0.15
"""The bar: this share of nll's shift, at this share of its perplexity or less, and this much more possible text."""


class Seed:
    """One seed's over-steered text and the readings of the arms that healed it."""

    def __init__(self, lab: LabCfg, seed: int, kappa: float) -> None:
        self.lab = Lab(replace(lab, seed=seed).run_config())
        cfg = self.lab.cfg
        keep = replace(cfg.filter, gates=())
        self.found = self.lab.collect(cfg.dose, keep, kappa=kappa, alphas=(1.0,))
        self.kept = [row.completion for row in self.found.kept]
        own = self.lab.collect(cfg.dose, cfg.filter, unsteered=True)
        self.own = [row.completion for row in own.kept]
        self.steered_ppl, self.base_ppl = (
            statistics.mean(min(row.scores["ppl"], 1e6) for row in rows) for rows in (self.found.kept, own.scored)
        )

    def arm(self, cfg: HealCfg, kept: list[Completion] | None = None, n_steps: int | None = None) -> dict:
        result, steps = self.lab.healed(self.kept if kept is None else kept, cfg, n_steps=n_steps)
        return self.lab.row("", result) | {"n_steps": len(steps)}

    def nll_stopped_at(self, cfg: HealCfg, shift: float, n_steps: int) -> dict:
        """nll ended at the step where its shift comes closest to `shift`: bisection over the step."""
        low, high, best = 1, n_steps, None
        while low <= high:
            middle = (low + high) // 2
            row = self.arm(cfg, n_steps=middle)
            if best is None or abs(row["shift"] - shift) < abs(best["shift"] - shift):
                best = row
            if abs(row["shift"]) < abs(shift):
                low = middle + 1
            else:
                high = middle - 1
        return best


def _score(row: dict, nll: dict) -> float:
    """Higher is better: meets the bar by how much, its worst side counted. Without an oracle, whole texts stand in for possible sentences."""
    whole = lambda arm: arm["oracle"] if "oracle" in arm else 1 - arm["degenerate"]
    return min(
        row["shift"] / nll["shift"] / KEEP_SHIFT,
        MAX_PPL_SHARE * nll["text_ppl"] / row["text_ppl"],
        (whole(row) - whole(nll)) / MIN_ORACLE_GAIN,
    )


def main(
    lab: Annotated[LabCfg, tyro.conf.arg(name="")],
    kappa: float = 1.0,
    seeds: tuple[int, ...] = (41, 42, 43),
    choose_seed: int = 40,
    lams: tuple[float, ...] = (0.1, 0.3, 1.0),
    tau: float = 0.03,
    barriers: tuple[Literal[BARRIERS], ...] = BARRIERS,
) -> None:
    """Does the barrier keep the trait and drop the gibberish? Heals of over-steered, UNFILTERED text, arm by arm, over seeds."""
    arms = [tuple(name.split("-")) for name in barriers]
    heal = replace(lab.run_config().heal, tau=tau)
    nll = replace(heal, divergence="nll")
    chooser = Seed(lab, choose_seed, kappa)
    reference = chooser.arm(nll)
    chosen, ladder = {}, [{"arm": "nll", "lam": 0.0, **reference}]
    for divergence, aggregate in arms:
        rows = {lam: chooser.arm(replace(heal, divergence=divergence, aggregate=aggregate, lam=lam)) for lam in lams}
        ladder += [{"arm": f"{divergence} {aggregate}", "lam": lam, **row} for lam, row in rows.items()]
        chosen[divergence, aggregate] = max(lams, key=lambda lam: _score(rows[lam], reference))
    rows = []
    for seed in seeds:
        at = Seed(lab, seed, kappa)
        free = at.arm(nll)
        result = {"nll": free, "control": at.arm(nll, at.own)}
        for (divergence, aggregate), lam in chosen.items():
            result[f"{divergence} {aggregate}, lam {lam:g}"] = at.arm(
                replace(heal, divergence=divergence, aggregate=aggregate, lam=lam)
            )
        target = next((row for name, row in result.items() if name.startswith("kl_rev rmse")), None)
        if target is not None:
            result["nll stopped at kl_rev rmse's shift"] = at.nll_stopped_at(nll, target["shift"], free["n_steps"])
        rows += [
            {"arm": name, "seed": seed, "steered_ppl": at.steered_ppl, "base_ppl": at.base_ppl, **row}
            for name, row in result.items()
        ]
    table = [
        _mean([row for row in rows if row["arm"] == name], [row for row in rows if row["arm"] == "nll"])
        for name in dict.fromkeys(row["arm"] for row in rows)
    ]
    should = (
        f"kl_rev rmse keep at least {KEEP_SHIFT:.0%} of nll's shift (kept), at a third of its text_ppl or less and an oracle at least {MIN_ORACLE_GAIN} higher.",
        "nll stopped have broken text where kl_rev rmse has whole text: else the barrier is only less training.",
        "control stay at 0: the shift comes from the text and not from the training.",
    )
    show(
        f"Does the barrier keep the trait and drop the gibberish? (dose {kappa:g}, unfiltered, tau {tau:g}, seeds {seeds}; strengths chosen on seed {choose_seed})",
        table,
        should,
        lab,
        "bet",
        per_seed=rows,
        ladder=ladder,
        kappa=kappa,
    )


def _mean(rows: list[dict], nll: list[dict]) -> dict:
    """Mean and sd over seeds of one arm, and the share of nll's shift that it kept."""
    values = lambda name: [row[name] for row in rows if row.get(name) is not None]
    spread = lambda name: (
        f"{statistics.mean(values(name)):.3f} ± {statistics.stdev(values(name)):.3f}"
        if len(values(name)) > 1
        else f"{values(name)[0]:.3f}"
    )
    kept = [row["shift"] / free["shift"] for row, free in zip(rows, nll, strict=True)]
    columns = [name for name in ("shift", "coherence", "text_ppl", "oracle", "degenerate", "kl_base") if values(name)]
    return {"arm": rows[0]["arm"], "kept": statistics.mean(kept), **{name: spread(name) for name in columns}}


if __name__ == "__main__":
    sys.exit(cli(main))
