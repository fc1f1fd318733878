"""Whether two runs came to the same end: one that was disturbed, and one that was not."""

from __future__ import annotations

import json
from itertools import zip_longest
from pathlib import Path
from typing import Any

from steer_heal.runs.log import lines_of
from steer_heal.runs.partial import PARTIAL
from steer_heal.runs.results import RESULTS, read_results
from steer_heal.runs.verify import violations
from steer_heal.share.card import CARD

VARIES = {"t", "wall_s", "seconds", "git_commit", "command", "folder", "prev"}
"""Fields of an event in which two runs of the same settings may differ."""


def comparable(run: Path) -> list[dict[str, Any]]:
    """A run's events without what may differ."""
    events = [json.loads(line) for line in lines_of(run)]
    for name in ("out", "folder"):
        events[0]["config"].pop(name)
    return [{key: value for key, value in event.items() if key not in VARIES} for event in events]


def weights(run: Path) -> dict[str, bytes]:
    """The files of every checkpoint and vector but the cards, which name times, by their name in the run's folder."""
    files = [path for part in ("ckpt", "vectors") for path in (run / part).rglob("*") if path.is_file()]
    paths = [path for path in files if CARD not in path.name]
    return {str(path.relative_to(run)): path.read_bytes() for path in paths}


def differences(run: Path, whole: Path) -> list[str]:
    """What a finished run lost against `whole`, in words: the first event that differs, checkpoints and vectors byte
    for byte, what `steer-heal verify` finds, and its row of results.tsv."""
    out = []
    for i, (got, want) in enumerate(zip_longest(comparable(run), comparable(whole), fillvalue={})):
        if got != want:
            fields = ", ".join(sorted(key for key in got | want if got.get(key) != want.get(key)))
            names = [f"{event.get('event')!r} of round {event.get('round')}" for event in (got, want)]
            out.append(f"event {i} is {names[0]}, should be {names[1]}: {fields} differ")
            break
    got, want = weights(run), weights(whole)
    out += [f"{name} differs" for name in sorted(got | want) if got.get(name) != want.get(name)]
    out += violations(run)
    if (run / PARTIAL).exists():
        out.append(f"{PARTIAL}/ was left behind")
    if (rows := [row["run"] for row in read_results(run.parent / RESULTS)]) != [run.name]:
        out.append(f"{RESULTS} has rows {rows}, should have one")
    return out
