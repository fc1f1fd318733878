"""How large is the noise? The same configuration over seeds: finished runs, or one round each here and now."""

import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import tyro

from steer_heal.events import read_events, reading
from steer_heal.lab import Lab, LabCfg, cli, show
from steer_heal.readings import Reading, nats_name, readings, shift, target_of

NAMES = ("coherence", "text_ppl_median", "degenerate_frac", "oracle", "kl_base", "persona_log_odds")


def of_run(folder: Path) -> dict[str, float | None]:
    """Shift of the target and the coherence measures of a run's last healed round."""
    events = read_events(folder)
    with reading(folder):
        reads, metric = readings(events), nats_name(target_of(events)[0])
        base, last = reads[0], [r for r in reads if r.stage == "healed"][-1]
        return {
            "state": f"seed {events[0]['seed']}, r{last.round}",
            "shift": shift(last, base, metric),
            **{name: last[name] for name in NAMES},
        }


def here(lab: LabCfg, seed: int) -> dict[str, float | None]:
    """The same of one round that is run now."""
    bench = Lab(replace(lab, seed=seed).run_config())
    found = bench.collect(bench.cfg.dose, bench.cfg.filter)
    result, _ = bench.healed([row.completion for row in found.kept], bench.cfg.heal)
    read = Reading("healed", 0, result.metrics)
    moved = shift(read, Reading("base", -1, bench.base.metrics), bench.target)
    return {"state": f"seed {seed}, r0", "shift": moved, **{name: read[name] for name in NAMES}}


def main(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional],
    lab: Annotated[LabCfg, tyro.conf.arg(name="")],
    seeds: tuple[int, ...] = (41, 42, 43),
) -> None:
    """How large is the noise? The same configuration over seeds: finished runs, or one round each here and now."""
    rows = [of_run(run) for run in runs] if runs else [here(lab, seed) for seed in seeds]
    columns = [name for name in rows[0] if name != "state" and all(row[name] is not None for row in rows)]
    for label, how in (("mean", statistics.mean), ("sd", lambda x: statistics.stdev(x) if len(x) > 1 else None)):
        rows.append(
            {"state": label, **{name: how([row[name] for row in rows[: len(runs or seeds)]]) for name in columns}}
        )
    should = (
        "sd of shift be small against its mean: a difference between two arms means something beyond about two sd of their difference.",
        "every seed agree in sign.",
    )
    show("How large is the noise between seeds?", rows, should, lab, "seeds", runs=[run.name for run in runs])


if __name__ == "__main__":
    sys.exit(cli(main))
