"""Which heal is best for this round's data? Heals one round of a finished run again, on its own history."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import tyro

from steer_heal.lab import cli, replay, show
from steer_heal.readings import Reading, slope

ARMS = (("nll", 0.0, "prev"),)


def main(
    run: Annotated[Path, tyro.conf.Positional], round_: Annotated[int, tyro.conf.arg(name="round")] = 0,
    divergences: tuple[str, ...] = ("kl_rev", "kl_fwd"), lams: tuple[float, ...] = (0.1, 1.0), references: tuple[str, ...] = ("prev", "base"),
    n_threads: int = 0, out: Path = Path("out/diag"),
) -> None:
    """Which heal is best for this round's data? Heals one round of a finished run again, on its own history."""
    again = replay(run, round_, n_threads)
    bench = again.lab
    base = Reading("base", -1, bench.base.metrics)
    arms = [*ARMS, *((d, lam, r) for d in divergences for lam in lams for r in (references if round_ else references[:1]))]
    rows = [bench.row("before", bench.read()) | {"slope": None}]
    for divergence, lam, reference in arms:
        cfg = replace(bench.cfg.heal, divergence=divergence, lam=lam, reference=reference)
        result, steps = bench.healed(again.kept, cfg, round_)
        price = slope(Reading("healed", round_, result.metrics), base, bench.target)
        rows.append(bench.row(f"{divergence} lam {lam:g} to {reference}", result) | {"slope": price, "divergence": steps[-1].divergence})
    ranked = rows[:1] + sorted(rows[1:], key=lambda row: -1e9 if row["slope"] is None else -row["slope"])
    should = (
        "the best arm (top) keep its shift beyond the row `before` at a slope near 0: slope is centinats of coherence per nat of trait, blank where nothing moved.",
        "more lam mean less shift and a lower kl_base; where it does not, tau is above the operating divergence.",
        "nll have the largest shift of all arms.",
    )
    show(f"Which heal is best for round {round_} of {run.name}?", ranked, should, out, "heal_sweep", run=run.name, round=round_)


if __name__ == "__main__":
    sys.exit(cli(main))
