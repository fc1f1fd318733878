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
from common import cli
from scipy import stats

from steer_heal.diag.lab import mean_sd
from steer_heal.errors import UserError, print_safe
from steer_heal.events import Extracted, RoundDone, Run, plain
from steer_heal.inputs.files import read_file
from steer_heal.records import state_label
from steer_heal.report.tables import markdown
from steer_heal.runs.log import schema_errors
from steer_heal.runs.stored import FolderRun
from steer_heal.verdict import table

NOT_AVERAGED = ("state", "shift", "lo", "hi", "retain", "slope")


def entry(run: Run) -> tuple[str, dict[str, Any]]:
    """("arm/trait/settings/seed", the states of a run, with those of the healed students as `rounds`)."""
    start = run.start
    cfg = start.config
    states: dict[str, Any] = {str(row["state"]): row for row in table(run)}
    rounds = []
    for end in run.each(RoundDone):
        row = states.pop(state_label("healed", end.round))
        row["cosine_to_first"] = run.require(Extracted, end.round).cosine_to_first
        row["cosine_student_teacher"] = end.cosine_student_teacher
        row["cosine_student_first"] = end.cosine_student_first
        rounds.append(row)
    arm = cfg.arm or start.preset
    own = {"arm": arm, "seed": cfg.seed, "trait": start.trait.name, "metric": run.trait_metric.name}
    key = f"{arm}/{start.trait.name}/{cfg.fingerprint()}/{cfg.seed}"
    return key, own | {"command": start.command, "states": states, "rounds": rounds}


def main(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = (),
    data: Path | None = None,
    rounds: tuple[int, ...] = (0, 1, 3, 5, 7),
) -> None:
    """Prints the table.

    Args:
        runs: Folders of finished runs.
        data: JSON file that keeps the rows. The runs extend it.
        rounds: Rounds to show.
    """
    known = earlier(data) if data is not None and data.exists() else {}
    for folder in runs:
        run = FolderRun.read(folder)
        with schema_errors(folder):
            key, found = entry(run)
        known[key] = found
    if not known:
        raise UserError("no runs; give run folders such as out/<timestamp>_<name>, or --data with earlier ones")
    if data is not None:
        data.parent.mkdir(parents=True, exist_ok=True)
        lines = json.dumps(plain(known), separators=(",", ":")).replace('},"', '},\n"')
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
    """The entries of earlier runs in --data."""
    try:
        known = json.loads(read_file(data).text)
        if all({"arm", "rounds"} <= run.keys() for run in known.values()):
            return known
    except (ValueError, AttributeError):
        pass
    raise UserError(f"--data {data} was not written by this script; give another file, or delete it")


def interval(values: Sequence[float]) -> str:
    """95 percent interval of the mean of a few values. Empty for a single one."""
    if len(values) < 2:
        return ""
    low, high = stats.t.interval(0.95, len(values) - 1, loc=sum(values) / len(values), scale=stats.sem(values))
    return f"{low:.3f} to {high:.3f}"


if __name__ == "__main__":
    sys.exit(cli(main))
