"""Which barrier is best for a round's text? Repeats the heal of one round of a finished run with several barriers."""

from dataclasses import replace
from typing import Literal

from steer_heal.diag.lab import Given, OutFlags, Row, replay, show
from steer_heal.errors import UserError, nearest
from steer_heal.settings import Count, RunFolder, settings
from steer_heal.verdict import slope


@settings("")
class Flags(OutFlags):
    run: RunFolder
    """Folder of the run."""
    round: Count = 1
    """Round whose text is healed again, counted from 1."""
    divergences: tuple[str, ...] = ("kl_rev", "kl_fwd")
    """Divergences of the barrier."""
    lams: tuple[float, ...] = (0.1, 1.0)
    """Strengths of the barrier."""
    references: tuple[Literal["prev", "base"], ...] = ("prev", "base")
    """Reference models of the barrier. In round 1 prev and base are the same model."""


def main(flags: Flags, given: Given) -> None:
    r = flags.round - 1
    lab, collected = replay(flags.run, r, given)
    from steer_heal.model.divergence import DIVERGENCES  # torch; a plugin of the run may have added some

    if unknown := [name for name in flags.divergences if name not in DIVERGENCES]:
        raise UserError(f"divergences holds {unknown[0]!r}: {nearest(unknown[0], DIVERGENCES)}")
    heal = replace(lab.bench.cfg.heal, reference="prev")
    heals = [replace(heal, divergence="none", lam=0.0)]
    for divergence in flags.divergences:
        for lam in flags.lams:
            for reference in flags.references if r else flags.references[:1]:
                heals.append(replace(heal, divergence=divergence, lam=lam, reference=reference))
    rows = []
    for each in heals:
        result, report = lab.healed(collected, each, r)
        row = lab.row(f"{each.divergence} lam {each.lam:g} to {each.reference}", result)
        row["slope"] = slope(result, lab.base, lab.target, lab.metrics.values())
        rows.append(row | {"divergence": report.steps[-1].divergence})

    def rank(row: Row) -> tuple[bool, bool, float]:
        """Intact rows first, then those that moved, then by shift in the wanted direction."""
        return lab.is_healthy(row) is False, row["slope"] is None, -lab.bench.trait.sign * row["shift"]

    should = (
        "the best arm (top) be intact: arms that broke the model come last, those that hardly moved before them; the "
        "rest are ordered by shift.",
        "slope (percent of coherence for a shift of 1, empty if nothing moved) stay near 0: below -1 the shift was "
        "bought with coherence.",
        "more lam mean less shift and a lower kl_base, otherwise tau is above the operating divergence.",
        "none, the heal without a barrier, have the largest shift of all arms.",
    )
    rows = [lab.row("before", lab.measure()), *sorted(rows, key=rank)]
    show(__doc__, rows, should, flags.out, "heal_sweep", run=flags.run.name, round=flags.round)
