"""Draws finished or running runs again: steer-heal report out/<run> ... [--compare FILE]"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from steer_heal.errors import UserError, print_error, print_safe
from steer_heal.report import draw, side_by_side
from steer_heal.runs.events import run_folder, schema_errors
from steer_heal.share.card import write_cards


def report(runs: tyro.conf.Positional[list[Path]], compare: Path | None = None) -> tuple[list[Path], Path | None]:
    """Draws pictures, page, diary and model cards of each run folder again, from its events.jsonl alone.

    Args:
        runs: Folders of runs.
        compare: Write instead one page of all of them side by side, into this file.
    """
    return runs, compare


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 drawn, 1 stopped by a user error."""
    try:
        folders, file = tyro.cli(report, args=argv, prog="steer-heal report")
        folders = [run_folder(folder) for folder in folders]  # matplotlib is not imported yet
        if file is not None:
            print_safe(side_by_side(folders, file))
            return 0
        for folder in folders:
            with schema_errors(folder):
                print_safe(draw(folder) or f"{folder}: the run did not start yet, nothing to draw")
                write_cards(folder)
    except (UserError, OSError) as error:
        print_error(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
