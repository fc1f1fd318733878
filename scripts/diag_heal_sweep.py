"""Which heal is best for this round's data? Heals one round of a finished run again, on its own history."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import tyro

from steer_heal.lab import cli, replay, show
from steer_heal.readings import COHERENCE_GOOD, DEGENERATE_GOOD, Reading, slope

ARMS = (("nll", 0.0, "prev"),)


def rank(row: dict, sign: int) -> tuple:
    """Coherent and whole first, then moved at all, then the largest shift in the wanted direction."""
    broken = row["coherence"] < COHERENCE_GOOD or row["degenerate"] > 2 * DEGENERATE_GOOD
    return broken, row["slope"] is None, -sign * row["shift"]


def main(
    run: Annotated[Path, tyro.conf.Positional],
    round_: Annotated[int, tyro.conf.arg(name="round")] = 0,
    divergences: tuple[str, ...] = ("kl_rev", "kl_fwd"),
    lams: tuple[float, ...] = (0.1, 1.0),
    references: tuple[str, ...] = ("prev", "base"),
    out: Path = Path("out/diag"),
) -> None:
    """Which heal is best for this round's data? Heals one round of a finished run again, on its own history."""
    again = replay(run, round_)
    bench = again.lab
    base = Reading("base", -1, bench.base.metrics)
    arms = [
        *ARMS,
        *((d, lam, r) for d in divergences for lam in lams for r in (references if round_ else references[:1])),
    ]
    rows = [bench.row("before", bench.read()) | {"slope": None}]
    for divergence, lam, reference in arms:
        cfg = replace(bench.cfg.heal, divergence=divergence, lam=lam, reference=reference)
        result, steps = bench.healed(again.kept, cfg, round_)
        price = slope(Reading("healed", round_, result.metrics), base, bench.target)
        rows.append(
            bench.row(f"{divergence} lam {lam:g} to {reference}", result)
            | {"slope": price, "divergence": steps[-1].divergence}
        )
    ranked = rows[:1] + sorted(rows[1:], key=lambda row: rank(row, bench.trait.sign))
    should = (
        "the best arm (top) be whole: arms that lost coherence or write broken text come last, those that hardly moved before them, the rest stand by shift.",
        "slope (centinats of coherence per nat of trait, blank where nothing moved) stay near 0: below -1 the shift was bought with coherence.",
        "more lam mean less shift and a lower kl_base; where it does not, tau is above the operating divergence.",
        "nll have the largest shift of all arms.",
    )
    show(
        f"Which heal is best for round {round_} of {run.name}?",
        ranked,
        should,
        out,
        "heal_sweep",
        run=run.name,
        round=round_,
    )


if __name__ == "__main__":
    sys.exit(cli(main))
