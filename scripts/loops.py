"""How do the arms compare round by round? Mean and sd over seeds of the healed students of finished runs, and the 95
percent interval of the mean shift (Student's t).

The rows are also kept in --data, one entry for each arm and seed, so that later runs extend the table:

    python scripts/loops.py out/<run> ... --data docs/evidence/loops_toy.json
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from scipy import stats

from steer_heal.diag.lab import cli, markdown, mean_sd
from steer_heal.errors import UserError, print_safe, validated
from steer_heal.inputs.files import read_file
from steer_heal.report.measurements import table, target_of
from steer_heal.runs.events import Event, current, of_stage, read_events, schema_errors
from steer_heal.settings import RunConfig

NOT_AVERAGED = ("state", "shift", "lo", "hi", "retain", "slope")


def entry(folder: Path, events: Sequence[Event]) -> tuple[str, dict[str, Any]]:
    """("arm/trait/settings/seed", the states of a run, those of the healed students as `rounds`)."""
    start, by_state = events[0], {row["state"]: row for row in table(events)}
    vectors, ends = of_stage(events, "vector"), of_stage(events, "round")
    rounds = [
        {
            **by_state.pop(f"healed r{end['round']}"),
            "cosine_to_first": vector["cosine_to_first"],
            **{name: end[name] for name in ("cosine_student_teacher", "cosine_student_first")},
        }
        for vector, end in zip(vectors, ends, strict=False)  # a run that was stopped has one vector more
    ]
    cfg, trait = validated(RunConfig, start["config"], f"{folder}/events.jsonl config"), start["trait"]["name"]
    arm, metric = cfg.arm or start["preset"], target_of(events)[0].name
    own = {"arm": arm, "seed": start["seed"], "trait": trait, "metric": metric, "command": start["command"]}
    return f"{arm}/{trait}/{cfg.fingerprint()}/{start['seed']}", own | {"states": by_state, "rounds": rounds}


def main(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = (),
    data: Path | None = None,
    rounds: tuple[int, ...] = (0, 1, 3, 5, 7),
) -> None:
    known = earlier(data) if data is not None and data.exists() else {}
    for run in runs:
        events = current(read_events(run))
        with schema_errors(run):
            key, found = entry(run, events)
        known[key] = found
    if not known:
        raise UserError("no runs; give run folders such as out/<timestamp>_<name>, or --data with earlier ones")
    if data is not None:
        data.parent.mkdir(parents=True, exist_ok=True)
        lines = json.dumps(known, separators=(",", ":")).replace('},"', '},\n"')
        data.write_text(lines + "\n", encoding="utf-8")
    rows = []
    for arm in dict.fromkeys(run["arm"] for run in known.values()):
        for r in rounds:
            same = [run["rounds"][r] for run in known.values() if run["arm"] == arm and len(run["rounds"]) > r]
            if same:
                rows.append({"arm": arm, "round": r, "n": len(same), **over_seeds(same)})
    print_safe(markdown(rows))


def over_seeds(same: Sequence[dict[str, Any]]) -> dict[str, str]:
    """`mean ± sd` of every column, and the interval of the shift."""
    columns = {name: [row[name] for row in same if row.get(name) is not None] for name in same[0]}
    shifts = columns["shift"]
    rest = {name: mean_sd(values) for name, values in columns.items() if name not in NOT_AVERAGED}
    return {"shift": mean_sd(shifts), "interval": interval(shifts), **rest}


def earlier(data: Path) -> dict[str, Any]:
    """What --data holds of earlier runs."""
    try:
        known = json.loads(read_file(data).text)
        if all({"arm", "rounds"} <= run.keys() for run in known.values()):
            return known
    except (ValueError, AttributeError):
        pass
    raise UserError(f"--data {data} was not written by this script; give another file, or delete it")


def interval(values: Sequence[float]) -> str:
    """95 percent interval of the mean of a few values; empty for one."""
    if len(values) < 2:
        return ""
    low, high = stats.t.interval(0.95, len(values) - 1, loc=sum(values) / len(values), scale=stats.sem(values))
    return f"{low:.3f} to {high:.3f}"


if __name__ == "__main__":
    sys.exit(cli(main))
