"""Whether a run's folder is still what the run wrote: events, vectors, checkpoints and base weights.

Every event names the SHA-256 of the line before it; the events of vectors and checkpoints name the SHA-256 of their
files; run_start names the base weights; results.tsv names the hash of the last line. This proves that the parts belong
together. It is no signature: who rewrites all of it can make it consistent again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tyro

from steer_heal.errors import UserError, print_error, print_safe
from steer_heal.runs.events import RESULTS, Event, broken_link, current, line_hash, read_events, read_results
from steer_heal.runs.resume import changed_weights, run_start
from steer_heal.runs.storage import damaged_file


def broken(folder: Path) -> list[str]:
    """What does not hold, in words: the first broken event, every changed file, the weights. UserError: not a run."""
    start = run_start(folder)
    events = read_events(folder)
    lines = [line for line in (folder / "events.jsonl").read_bytes().splitlines() if line.strip()][: len(events)]
    problems = []
    if (at := broken_link(lines)) is not None:
        changed = max(0, at - 1)
        problems.append(
            f"events.jsonl line {at + 1} does not follow from the line before it: {_name(events[changed])} (line "
            f"{changed + 1}) was changed, or lines were removed or added here"
        )
    recorded = [
        row for row in read_results(folder.resolve().parent / RESULTS) if row.get("run") == folder.resolve().name
    ]
    if recorded and recorded[0].get("last_hash") != line_hash(lines[-1]):
        problems.append(
            f"events.jsonl does not end in the line that {RESULTS} names: {_name(events[-1])} was changed, or the end "
            "was removed"
        )
    for event in current(events):
        files = event.get("files", {})
        damage = damaged_file(folder, files) if isinstance(files, dict) else "its files are no names and checksums"
        if damage is not None:
            problems.append(f"{_name(event)}: {damage}")
    if (damage := _weights(start)) is not None:
        problems.append(f"base weights: {damage}")
    return problems


def _name(event: Event) -> str:
    r = event["round"]
    return f"{event['stage']!r}" + ("" if r is None else " before the loop" if r < 0 else f" of round {r}")


def _weights(start: Event) -> str | None:
    from steer_heal.model.lm import load, weights_digest  # transformers: seconds

    try:
        recorded, config = start["weights"], start["config"]
        lm = load(config["model"], device="cpu", dtype=recorded["dtype"], quantize=config["quantize"])
        now = weights_digest(lm.model)
    except UserError as error:
        return f"they cannot be checked: {error}"
    except (KeyError, TypeError):
        return "they were not recorded"
    return None if now == recorded else changed_weights(start, now)


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 all as recorded, 1 something was changed, 2 the folder is not a run."""
    folder = tyro.cli(verify, args=argv, prog="steer-heal verify")
    try:
        problems = broken(folder)
    except UserError as error:
        print_error(error)
        return 2
    for problem in problems:
        print_safe(f"BROKEN: {problem}")
    if not problems:
        print_safe(f"{len(read_events(folder))} events, their files and the base weights are as recorded")
    return 1 if problems else 0


def verify(run: tyro.conf.Positional[Path]) -> Path:
    """Check that a run's events, vectors, checkpoints and base weights are the ones that it recorded.

    Args:
        run: Folder of the run.
    """
    return run
