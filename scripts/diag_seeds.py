"""How large is the noise? The same configuration over seeds: finished runs, or one round each here and now."""

import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from lab import Lab, LabCfg, LabFlags, cli, show

from steer_heal.report.measurements import table
from steer_heal.runs.events import read_events, schema_errors

NOT_OF_THE_STATE = ("state", "lo", "hi", "retain", "slope")


def of_run(folder: Path) -> dict[str, Any]:
    """The last healed round of a run."""
    events = read_events(folder)
    with schema_errors(folder):
        last = [row for row in table(events) if row["state"].startswith("healed")][-1]
        return last | {"state": f"seed {events[0]['seed']}, {last['state']}"}


def here(lab: LabCfg, seed: int) -> dict[str, Any]:
    """One round that is run now."""
    bench = Lab(replace(lab, seed=seed).run_config())
    result, _ = bench.healed(bench.collect(), bench.cfg.heal)
    return bench.row(f"seed {seed}, healed r0", result)


def main(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional], lab: LabFlags, seeds: tuple[int, ...] = (41, 42, 43)
) -> None:
    rows = [of_run(run) for run in runs] if runs else [here(lab, seed) for seed in seeds]
    names = [name for name in rows[0] if name not in NOT_OF_THE_STATE and all(row[name] is not None for row in rows)]
    values = {name: [row[name] for row in rows] for name in names}
    rows = [{"state": row["state"]} | {name: row[name] for name in names} for row in rows]
    rows.append({"state": "mean"} | {name: statistics.mean(column) for name, column in values.items()})
    if len(rows) > 2:
        rows.append({"state": "sd"} | {name: statistics.stdev(column) for name, column in values.items()})
    should = (
        "sd of shift be small against its mean: a difference between two arms means something beyond about two sd of "
        "their difference.",
        "every seed agree in sign.",
    )
    show(__doc__, rows, should, lab.out, "seeds", runs=[run.name for run in runs])


if __name__ == "__main__":
    sys.exit(cli(main))
