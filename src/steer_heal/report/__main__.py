"""Draws finished or running runs again: python -m steer_heal.report out/<run> ..."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import tyro

from steer_heal.errors import UserError, print_error, print_safe
from steer_heal.report import draw
from steer_heal.runs.events import schema_errors


def main(runs: Annotated[list[Path], tyro.conf.Positional]) -> int:
    """Draws the pictures, the page and the diary of each run folder again, from its events.jsonl alone."""
    try:
        for folder in runs:
            with schema_errors(folder):
                print_safe(draw(folder) or f"{folder}: the run did not start yet, nothing to draw")
    except (UserError, OSError) as error:
        print_error(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main, prog="python -m steer_heal.report"))
