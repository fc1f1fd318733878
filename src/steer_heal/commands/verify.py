"""steer-heal verify RUN: whether a run's folder is still what the run wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tyro

from steer_heal.errors import print_safe
from steer_heal.flags import parsed
from steer_heal.runs.log import read_events
from steer_heal.runs.verify import violations
from steer_heal.settings import settings


@settings("")
class Verify:
    """Check a run's events, vectors, checkpoints and base weights against their recorded hashes. The exit status is 1
    if one of them differs."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""


def main(argv: Sequence[str]) -> int:
    given, _ = parsed(Verify, argv, "verify")
    found = violations(given.run)
    for line in found:
        print_safe(f"BROKEN: {line}")
    if not found:
        print_safe(f"{len(read_events(given.run))} events, their files and the base weights are as recorded")
    return 1 if found else 0
