"""Which folder is meant: the checkpoint of a round of a run."""

from __future__ import annotations

from pathlib import Path

from steer_heal.errors import UserError
from steer_heal.runs.checkpoint import checkpoint_name
from steer_heal.runs.events import current, of_stage, read_events, schema_errors


def chosen(folder: Path, r: int | None = None) -> Path:
    """The checkpoint of round r of a run, by default the last; any other folder is the one that is meant itself."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give that of a run or of a checkpoint")
    if not (folder / "events.jsonl").is_file():
        if r is not None:
            raise UserError(f"{folder} has no events.jsonl, so it has no round {r}; give the folder of the run")
        return folder
    return folder / checkpoint_name(chosen_round(folder, r))


def chosen_round(run: Path, r: int | None = None) -> int:
    """Round r of a run, by default the last. UserError where it is not healed or its checkpoint is gone."""
    with schema_errors(run):
        healed = [e["round"] for e in of_stage(current(read_events(run)), "heal") if e["round"] >= 0]
        there = [k for k in healed if (run / checkpoint_name(k)).is_dir()]
    if not there:
        raise UserError(f"{run} has no checkpoint of a round; let the run heal one")
    if r is not None and r not in there:
        raise UserError(f"round is {r}: {run} has checkpoints of {', '.join(map(str, there))}")
    return there[-1] if r is None else r
