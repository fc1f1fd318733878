"""steer-heal report RUN ... [--compare FILE]: draws finished or running runs again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from steer_heal.errors import UserError, print_safe
from steer_heal.flags import parsed
from steer_heal.report import console, draw
from steer_heal.runs.log import run_folder, schema_errors
from steer_heal.settings import RunFolders, settings


@settings("")
class Report:
    """Redraw the pictures and rewrite the page, the diary and the model cards of each run, from its events alone."""

    runs: RunFolders = ()
    """Folders of one or more runs."""
    compare: Path | None = None
    """Write only one page, to this file. It shows all runs side by side."""


def main(argv: Sequence[str]) -> int:
    given, _ = parsed(Report, argv, "report")
    if not given.runs:
        raise UserError("no run was given; usage: steer-heal report RUN [RUN ...] [--compare FILE]")
    folders = [run_folder(folder) for folder in given.runs]  # before matplotlib is imported
    console.lines()
    if given.compare is not None:
        from steer_heal.report.compare import compare

        print_safe(compare(folders, given.compare))
        return 0
    from steer_heal.share.card import write_cards

    for folder in folders:
        with schema_errors(folder):
            print_safe(draw(folder) or f"{folder}: the run has not started yet, so there is nothing to draw")
            write_cards(folder)
    return 0
