"""Prints the states of finished runs as one Markdown table, a line per run's verdict below: what docs/ is filled from."""

from pathlib import Path
from typing import Annotated

import tyro

from steer_heal.events import of_stage, read_events
from steer_heal.readings import table, verdict


def main(runs: Annotated[list[Path], tyro.conf.Positional], rounds: int | None = None) -> None:
    """Markdown of the run folders given; `rounds` shows only so many of each."""
    rows, lines = [], []
    for run in runs:
        events = [e for e in read_events(run) if rounds is None or e["round"] is None or e["round"] < rounds]
        start, end = of_stage(events, "run_start")[0], of_stage(events, "round")[-1]
        rows += [{"seed": start["seed"], **row} for row in table(events)]
        lines.append(f"- seed {start['seed']}, {end['wall_s']:.0f} s: {verdict(events)}")
    columns = list(rows[0])
    cell = lambda value: "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    print("\n".join("| " + " | ".join(cell(row.get(c)) for c in columns) + " |" for row in rows))
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    tyro.cli(main)
