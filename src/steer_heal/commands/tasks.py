"""steer-heal tasks RUN --tasks NAME ...: what a trait costs on standard tasks."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from pydantic import Field

from steer_heal.errors import UserError, print_safe
from steer_heal.flags import parsed
from steer_heal.report import console, tables
from steer_heal.runs.chosen import run_and_round
from steer_heal.settings import AllowBroken, Count, Names, RoundName, RunFolder, settings
from steer_heal.share.readings import Reading, add_readings, with_stderr
from steer_heal.verdict import round_words


@settings("")
class Tasks:
    """Measure the base and a healed checkpoint of a run on tasks of lm-evaluation-harness, and show what the trait
    costs. The results are kept in tasks.json in the folder of the run. The model card of the checkpoint shows them, and
    so do those of later exports."""

    run: RunFolder
    """Folder of the run."""
    tasks: Annotated[Names, Field(min_length=1)]
    """Names of tasks, such as arc_easy. Most tasks download their data."""
    round: RoundName = "best"
    allow_broken: AllowBroken = False
    limit: Count | None = None
    """Number of items per task. Default: all."""
    include_path: Path | None = None
    """Folder with task files of your own."""
    chat: bool = False
    """Apply the chat template of the model."""
    batch_size: Count = 8
    """Sequences per batch."""
    json: bool = False
    """Print one JSON list and nothing else."""


def main(argv: Sequence[str]) -> int:
    given, own = parsed(Tasks, argv, "tasks", ["device", "plugin"])
    if not find_spec("lm_eval"):
        raise UserError("lm-evaluation-harness is not installed; pip install 'steer-heal[tasks]'")
    console.lines()
    run, r = run_and_round(given.run, given.round, allow_broken=given.allow_broken)
    print_safe(round_words(run, r), sys.stderr)
    found = measure(given, r, own)
    if given.json:
        print(json.dumps([asdict(reading) for reading in found], allow_nan=False))
        return 0
    tables.show(table(found))
    print_safe("\u00b1 is one standard error; for the change it is paired by item. A cost below 0 is a gain.")
    return 0


def measure(given: Tasks, r: int, own: dict[str, object]) -> list[Reading]:
    """The readings of the checkpoint of round r, which are also added to tasks.json and to the model cards. `own`:
    settings that replace the run's."""
    from steer_heal.runs.log import schema_errors
    from steer_heal.runs.opened import settings_of, student_of
    from steer_heal.runs.stored import FolderRun, checkpoint_name
    from steer_heal.share import tasks
    from steer_heal.share.card import write_cards

    manager = tasks.task_manager(given.tasks, given.include_path)
    run = FolderRun.read(given.run)
    cfg = settings_of(run, **own)
    student = student_of(run, cfg, r)
    results = []
    for state in ("base", "full"):
        with student.using(state) as lm:
            results.append(
                tasks.evaluate(
                    lm, given.tasks, manager, limit=given.limit, chat=given.chat, batch_size=given.batch_size
                )
            )
    found = tasks.compare(*results)
    add_readings(given.run, checkpoint_name(r), found)
    with schema_errors(given.run):
        write_cards(given.run)
    return found


def table(found: Sequence[Reading]) -> list[dict[str, object]]:
    """The readings as the rows of a table."""
    return [
        {
            "task": each.task,
            "metric": each.metric,
            "items": each.n,
            "base": with_stderr(each.base, each.base_stderr),
            "healed": with_stderr(each.healed, each.healed_stderr),
            "change": with_stderr(each.change, each.change_stderr, "+.4f"),
            "cost of the trait": "unknown" if each.cost is None else f"{each.cost:+.4f}",
        }
        for each in found
    ]
