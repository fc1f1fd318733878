"""Which heal is best for this round's data? Heals one round of a finished run again, on its own history."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import tyro

from steer_heal.diag.lab import measurement, replay, show
from steer_heal.report.measurements import slope


def main(
    run: Annotated[Path, tyro.conf.Positional],
    round_: Annotated[int, tyro.conf.arg(name="round")] = 0,
    divergences: tuple[str, ...] = ("kl_rev", "kl_fwd"),
    lams: tuple[float, ...] = (0.1, 1.0),
    references: tuple[str, ...] = ("prev", "base"),
    out: Path = Path("out/diag"),
) -> None:
    bench, collected = replay(run, round_)
    arms = [("none", 0.0, "prev")]
    arms += [(d, lam, r) for d in divergences for lam in lams for r in (references if round_ else references[:1])]
    base, rows = measurement(bench.base), []
    for divergence, lam, reference in arms:
        heal = replace(bench.cfg.heal, divergence=divergence, lam=lam, reference=reference)
        result, steps = bench.healed(collected, heal, round_)
        price = slope(measurement(result), base, bench.target, bench.metrics.values())
        row = bench.row(f"{divergence} lam {lam:g} to {reference}", result)
        rows.append(row | {"slope": price, "divergence": steps[-1].divergence})
    # whole first, then those that moved, then by shift in the wanted direction
    rank = lambda row: (not bench.is_whole(row), row["slope"] is None, -bench.trait.sign * row["shift"])
    should = (
        "the best arm (top) be whole: arms that broke the model come last, those that hardly moved before them; the "
        "rest stand by shift.",
        "slope (percent of coherence for a shift of 1, empty where nothing moved) stay near 0: below -1 the shift was "
        "bought with coherence.",
        "more lam mean less shift and a lower kl_base; where it does not, tau is above the operating divergence.",
        "none, the heal without a barrier, have the largest shift of all arms.",
    )
    rows = [bench.row("before", bench.read()), *sorted(rows, key=rank)]
    show(__doc__, rows, should, out, "heal_sweep", run=run.name, round=round_)
