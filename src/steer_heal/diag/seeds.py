"""How large is the noise? Repeats one round with several seeds (for finished runs, use scripts/results.py)."""

import statistics
from dataclasses import replace

from steer_heal.diag.lab import Given, Lab, PresetFlags, show
from steer_heal.settings import settings


@settings("")
class Flags(PresetFlags):
    seeds: tuple[int, ...] = (41, 42, 43)
    """Seeds of the rounds."""


def main(flags: Flags, given: Given) -> None:
    cfg = flags.settings(given)
    rows = []
    for seed in flags.seeds:
        lab = Lab.of(replace(cfg, seed=seed))
        result, _ = lab.healed(lab.collect(), cfg.heal)
        rows.append(lab.row(f"seed {seed}", result))
    columns = {name: [row[name] for row in rows] for name in rows[0] if name not in ("state", "lo", "hi")}
    values = {name: column for name, column in columns.items() if None not in column}
    rows.append({"state": "mean"} | {name: statistics.fmean(column) for name, column in values.items()})
    if len(flags.seeds) > 1:
        rows.append({"state": "sd"} | {name: statistics.stdev(column) for name, column in values.items()})
    should = (
        "sd of shift be small against its mean: a difference between two arms means something beyond about two sd of "
        "their difference.",
        "every seed agree in sign.",
    )
    show(__doc__, rows, should, flags.out, "seeds")
