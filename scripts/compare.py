"""Whether two runs came to the same end: the one that was disturbed, and the one that was not."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path
from typing import Any

from steer_heal.events import RESULTS, read_events, read_results
from steer_heal.provenance import check

VARIES = {"t", "wall_s", "seconds", "git_commit", "command", "folder"}
"""Fields of an event in which two runs of the same settings may differ."""


def story(run: Path) -> list[dict[str, Any]]:
    """A run's events without what may differ."""
    events = read_events(run)
    events[0]["config"].pop("out")
    return [{key: value for key, value in event.items() if key not in VARIES} for event in events]


def weights(run: Path) -> dict[str, bytes]:
    """The files of every checkpoint and vector, by their name in the run's folder."""
    return {
        str(path.relative_to(run)): path.read_bytes()
        for part in ("ckpt", "vectors")
        for path in sorted((run / part).rglob("*"))
        if path.is_file()
    }


def differences(run: Path, whole: Path) -> list[str]:
    """What a finished run lost against `whole`, in words: events, checkpoints and vectors byte for byte, the chain of digests, its row of results.tsv."""
    out = []
    for i, (got, want) in enumerate(zip_longest(story(run), story(whole), fillvalue={})):
        if got != want:
            fields = sorted(key for key in got | want if got.get(key) != want.get(key))
            out.append(
                f"event {i} is {got.get('stage')!r} of round {got.get('round')}, should be {want.get('stage')!r} of round {want.get('round')}: {', '.join(fields)} differ"
            )
            break
    got, want = weights(run), weights(whole)
    out += [f"{name} differs" for name in sorted(got | want) if got.get(name) != want.get(name)]
    out += [f"the {link.name} of round {link.round} does not hold: {link.broken}" for link in check(run) if link.broken]
    if (run / "partial").exists():
        out.append("partial/ was left behind")
    if (rows := [row["run"] for row in read_results(run.parent / RESULTS)]) != [run.name]:
        out.append(f"{RESULTS} has rows {rows}, should have one")
    return out
