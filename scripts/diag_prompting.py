"""Does the adapter beat a prompt? Base, prompted, steered at the knee and healed of finished runs, and what is left of each in a bare conversation."""

import statistics
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

from steer_heal.events import of_stage, read_events
from steer_heal.lab import cli, replay, show
from steer_heal.readings import COHERENCE_GOOD, DEGENERATE_GOOD

MEANS = ("shift", "shift_bare", "coherence", "text_ppl", "degenerate", "oracle", "kl_base", "log_odds", "dose", "round")


def whole(row: dict[str, Any]) -> bool:
    return row["coherence"] >= COHERENCE_GOOD and row["degenerate"] <= DEGENERATE_GOOD


def of_run(run: Path, doses: tuple[float, ...]) -> list[dict[str, Any]]:
    """Every state of one run on the run's own items; `shift_bare` is what remains without system prompt and hook."""
    bench = replay(run, 0).lab
    furthest = lambda rows: max(
        [row for row in rows if whole(row)] or rows[:1], key=lambda row: bench.trait.sign * row["shift"]
    )
    steered = [bench.row("", bench.read(vector=bench.vector, dose=dose)) | {"dose": dose} for dose in doses]
    rows = [
        {**bench.row("", bench.base), "state": "base", "needs": "nothing", "shift_bare": 0.0},
        {
            **bench.row("", bench.read(system=bench.trait.positive)),
            "state": "prompted",
            "needs": "a system prompt",
            "shift_bare": 0.0,
        },
        {**furthest(steered), "state": "steered, furthest whole dose", "needs": "a hook", "shift_bare": 0.0},
    ]
    healed = []
    for r in [event["round"] for event in of_stage(read_events(run), "heal")]:
        bench.student.restore(run / "ckpt" / f"r{r}", r + 1)
        healed.append({**bench.row("", bench.read()), "round": r})
    both = bench.row("", bench.read(system=bench.trait.positive))
    for state, row in (("healed, furthest whole round", furthest(healed)), ("healed, last round", healed[-1])):
        rows.append({**row, "state": state, "needs": "nothing", "shift_bare": row["shift"]})
    return [
        *rows,
        {
            **both,
            "state": "healed, last round, and prompted",
            "needs": "a system prompt",
            "shift_bare": healed[-1]["shift"],
        },
    ]


def main(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional],
    doses: tuple[float, ...] = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75),
    name: str = "prompting",
    out: Path = Path("out/diag"),
) -> None:
    """Does the adapter beat a prompt? Base, prompted, steered at the knee and healed of finished runs of one trait, and
    what is left of each in a bare conversation."""
    per_run = [{"run": run.name, "rows": of_run(run, doses)} for run in runs]
    rows = []
    for same in zip(*(each["rows"] for each in per_run), strict=True):
        means = {
            column: statistics.mean(row[column] for row in same)
            for column in MEANS
            if all(column in row for row in same)
        }
        spread = statistics.stdev(row["shift"] for row in same) if len(same) > 1 else None
        rows.append({"state": same[0]["state"], "needs": same[0]["needs"], "shift_sd": spread, **means})
    should = (
        f"every row but base be whole (coherence >= {COHERENCE_GOOD}, degenerate <= {DEGENERATE_GOOD:.0%}) before its shift is compared.",
        "shift_bare be 0 for prompted and steered: neither leaves anything behind; only the healed rows keep theirs.",
        "healed and prompted move further than prompted: else the adapter adds nothing that a prompt does not do.",
    )
    show(f"Does the adapter beat a prompt? (means over {len(per_run)} runs)", rows, should, out, name, per_run=per_run)


if __name__ == "__main__":
    sys.exit(cli(main))
