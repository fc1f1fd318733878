"""Draws finished or running runs again: steer-heal report out/<run> ..."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from steer_heal.errors import UserError, print_error, print_safe
from steer_heal.report import draw
from steer_heal.runs.events import schema_errors
from steer_heal.share.card import write_cards


def report(runs: tyro.conf.Positional[list[Path]]) -> list[Path]:
    """Draws pictures, page, diary and model cards of each run folder again, from its events.jsonl alone.

    Args:
        runs: Folders of runs.
    """
    return runs


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 drawn, 1 stopped by a user error."""
    try:
        for folder in tyro.cli(report, args=argv, prog="steer-heal report"):
            with schema_errors(folder):
                print_safe(draw(folder) or f"{folder}: the run did not start yet, nothing to draw")
                write_cards(folder)
    except (UserError, OSError) as error:
        print_error(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
