"""Does the adapter beat a prompt? States of finished runs of one trait, and what is left of each without a prompt.

The states are base, prompted, steered at the furthest whole dose, and healed, each on its run's own items.
"""

import statistics
from pathlib import Path
from typing import Annotated, Any

import tyro

from steer_heal.diag.lab import replay, show
from steer_heal.model.steering import Condition
from steer_heal.runs.events import current, of_stage, read_events

NOT_AVERAGED = ("state", "needs", "lo", "hi")


def of_run(run: Path, doses: tuple[float, ...]) -> list[dict[str, Any]]:
    """Every state of one run. `shift_bare` is the shift that remains without system prompt and hook."""
    bench, _ = replay(run, 0)
    positive, sign = bench.trait.positive, bench.trait.sign
    furthest = lambda rows: max(filter(bench.is_whole, rows), key=lambda row: sign * row["shift"], default=rows[0])
    steered = [bench.row("", bench.read(Condition("", bench.vector, dose))) | {"dose": dose} for dose in doses]
    prompted, healed = bench.row("", bench.read(Condition(positive))), []
    for event in of_stage(current(read_events(run)), "heal"):
        if (r := event["round"]) >= 0:
            bench.student.restore(run / event["checkpoint"], r + 1)
            healed.append(bench.row("", bench.read()) | {"round": r})
    both, best, last = bench.row("", bench.read(Condition(positive))), furthest(healed), healed[-1]
    states = [
        ("base", "nothing", bench.row("", bench.base), 0.0),
        ("prompted", "a system prompt", prompted, 0.0),
        ("steered, furthest whole dose", "a hook", furthest(steered), 0.0),
        ("healed, furthest whole round", "nothing", best, best["shift"]),
        ("healed, last round", "nothing", last, last["shift"]),
        ("healed, last round, and prompted", "a system prompt", both, last["shift"]),
    ]
    return [row | {"state": state, "needs": needs, "shift_bare": bare} for state, needs, row, bare in states]


def main(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional],
    doses: tuple[float, ...] = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75),
    name: str = "prompting",
    out: Path = Path("out/diag"),
) -> None:
    per_run, rows = {run.name: of_run(run, doses) for run in runs}, []
    for states in zip(*per_run.values(), strict=True):
        same = list[dict[str, Any]](states)
        values = {column: [row[column] for row in same] for column in same[0] if column not in NOT_AVERAGED}
        means = {column: statistics.mean(mine) for column, mine in values.items() if None not in mine}
        spread = statistics.stdev(values["shift"]) if len(same) > 1 else None
        rows.append({"state": same[0]["state"], "needs": same[0]["needs"], "shift_sd": spread, **means})
    should = (
        "every row but base be whole (coherence and degenerate_frac) before its shift is compared.",
        "shift_bare be 0 for prompted and steered: neither leaves anything behind; only the healed rows keep theirs.",
        "healed and prompted move further than prompted: else the adapter adds nothing that a prompt does not do.",
    )
    show(__doc__, rows, should, out, name, per_run=[{"run": run, "rows": states} for run, states in per_run.items()])
