"""Prints the states of finished runs as one Markdown table, a line per run's verdict below: what docs/ is filled from."""

import sys
from pathlib import Path
from typing import Annotated

import tyro

from steer_heal.events import of_stage, read_events, reading
from steer_heal.lab import cli
from steer_heal.readings import table, verdict
from steer_heal.records import UserError
from steer_heal.terminal import say


def main(runs: Annotated[list[Path], tyro.conf.Positional], rounds: int | None = None) -> None:
    """Markdown of the run folders given; `rounds` shows only so many of each."""
    rows, lines = [], []
    for run in runs:
        events = [e for e in read_events(run) if rounds is None or e["round"] is None or e["round"] < rounds]
        ends = of_stage(events, "round")
        if not ends:
            raise UserError(f"{run} has no finished round; give a run that has one")
        with reading(run):
            start = of_stage(events, "run_start")[0]
            rows += [{"seed": start["seed"], **row} for row in table(events)]
            lines.append(f"- seed {start['seed']}, {ends[-1]['wall_s']:.0f} s: {verdict(events)}")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cell = lambda value: "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
    say("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    say("\n".join("| " + " | ".join(cell(row.get(c)) for c in columns) + " |" for row in rows))
    say("\n" + "\n".join(lines))


if __name__ == "__main__":
    sys.exit(cli(main))
