"""How large is the noise? One round of the same configuration over seeds (of finished runs: scripts/results.py)."""

import statistics
from dataclasses import replace

from steer_heal.diag.lab import Lab, LabFlags, show


def main(lab: LabFlags, seeds: tuple[int, ...] = (41, 42, 43)) -> None:
    rows = []
    for seed in seeds:
        bench = Lab(replace(lab, seed=seed).run_config())
        result, _ = bench.healed(bench.collect(), bench.cfg.heal)
        rows.append(bench.row(f"seed {seed}", result))
    columns = {name: [row[name] for row in rows] for name in rows[0] if name not in ("state", "lo", "hi")}
    values = {name: column for name, column in columns.items() if None not in column}
    rows.append({"state": "mean"} | {name: statistics.fmean(column) for name, column in values.items()})
    if len(seeds) > 1:
        rows.append({"state": "sd"} | {name: statistics.stdev(column) for name, column in values.items()})
    should = (
        "sd of shift be small against its mean: a difference between two arms means something beyond about two sd of "
        "their difference.",
        "every seed agree in sign.",
    )
    show(__doc__, rows, should, lab.out, "seeds")
