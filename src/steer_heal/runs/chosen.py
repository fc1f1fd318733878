"""The round that a command takes, chosen before torch is imported."""

from __future__ import annotations

from pathlib import Path

from steer_heal.events import Run
from steer_heal.runs.log import read_events, read_start, schema_errors
from steer_heal.settings import RoundName
from steer_heal.verdict import chosen_round


def run_and_round(folder: Path, which: RoundName, *, allow_broken: bool) -> tuple[Run, int]:
    """(the events of a run, the round of it that was asked for). UserError as in `chosen_round`."""
    read_start(folder)
    with schema_errors(folder):
        run = Run(read_events(folder))
        return run, chosen_round(run, which, allow_broken=allow_broken)
