"""How do the arms compare round by round? Puts finished runs together: the healed student's mean and sd over seeds, and
of its shift the 95 percent interval of the mean (Student's t).

The readings are also kept in --data, one entry an arm and seed, so that a table can be extended by later runs:

    python scripts/loops.py out/<run> ... --data docs/evidence/loops_toy.json
"""

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

from steer_heal.config import RunConfig, from_dict
from steer_heal.events import of_stage, read_events, reading
from steer_heal.files import read_text
from steer_heal.lab import cli
from steer_heal.readings import nats_name, table, target_of
from steer_heal.records import UserError
from steer_heal.terminal import say

ROUNDS = (0, 1, 3, 5, 7)
COLUMNS = (
    "shift",
    "interval",
    "coherence",
    "text_ppl",
    "oracle",
    "degenerate",
    "kl_base",
    "log_odds",
    "cosine_to_first",
    "cosine_student_first",
)

T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Quantile 0.975 of Student's t by the number of values."""


def of_run(folder: Path) -> tuple[str, dict[str, Any]]:
    """("arm/trait/settings/seed", {rounds: [the healed row of each round], ...}) of a run."""
    events = read_events(folder)
    with reading(folder):
        return _of_events(events)


def _of_events(events: list[dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    start = events[0]
    config = start["config"]
    by_state = {row["state"]: row for row in table(events)}
    vectors, rounds = of_stage(events, "vector"), of_stage(events, "round")
    rows = [
        {
            **by_state[f"healed r{e['round']}"],
            "cosine_to_first": vectors[i]["cosine_to_first"],
            "steered_shift": by_state[f"steered r{e['round']}"]["shift"],
            "steered_ppl": by_state[f"steered r{e['round']}"]["text_ppl"],
            **{name: e[name] for name in ("cosine_student_teacher", "cosine_student_first")},
        }
        for i, e in enumerate(rounds)
    ]
    others = {state: row for state, row in by_state.items() if state in ("base", "prompted", "control")}
    arm = config["arm"] or start["preset"]
    settings = from_dict(RunConfig, config).fingerprint()
    return f"{arm}/{start['trait']['name']}/{settings}/{start['seed']}", {
        "arm": arm,
        "seed": start["seed"],
        "trait": start["trait"]["name"],
        "metric": nats_name(target_of(events)[0]),
        "command": start["command"],
        "states": others,
        "rounds": rows,
    }


def main(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = (),
    data: Path | None = None,
    rounds: tuple[int, ...] = ROUNDS,
) -> None:
    """How do the arms compare round by round? Mean and sd over seeds of the healed student, and the 95 percent interval of
    its shift, as Markdown."""
    known = earlier(data) if data is not None and data.exists() else {}
    known |= dict(of_run(run) for run in runs)
    if not known:
        raise UserError("no runs; give run folders such as out/<timestamp>_<name>, or --data with earlier ones")
    if data is not None:
        data.parent.mkdir(parents=True, exist_ok=True)
        data.write_text(
            json.dumps(known, indent=None, separators=(",", ":")).replace('},"', '},\n"') + "\n", encoding="utf-8"
        )
    say("| arm | round | n | " + " | ".join(COLUMNS) + " |\n|---|---|---|" + "---|" * len(COLUMNS))
    for arm in dict.fromkeys(run["arm"] for run in known.values()):
        for r in rounds:
            rows = [run["rounds"][r] for run in known.values() if run["arm"] == arm and len(run["rounds"]) > r]
            if rows:
                cells = [
                    interval([row["shift"] for row in rows])
                    if name == "interval"
                    else _spread([row.get(name) for row in rows])
                    for name in COLUMNS
                ]
                say(f"| {arm} | {r} | {len(rows)} | " + " | ".join(cells) + " |")


def earlier(data: Path) -> dict[str, Any]:
    """What --data holds of earlier runs."""
    try:
        known = json.loads(read_text(data))
        if all({"arm", "rounds"} <= run.keys() for run in known.values()):
            return known
    except (ValueError, AttributeError):
        pass
    raise UserError(f"--data {data} was not written by this script; give another file, or delete it")


def interval(values: list[float]) -> str:
    """95 percent interval of the mean of a few values; empty for one."""
    if len(values) < 2:
        return ""
    half = T_975.get(len(values), 2.0) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values) - half:.3f} to {statistics.mean(values) + half:.3f}"


def _spread(values: list[float | None]) -> str:
    values = [value for value in values if value is not None]
    if not values:
        return ""
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


if __name__ == "__main__":
    sys.exit(cli(main))
