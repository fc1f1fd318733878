"""steer-heal verify RUN: whether a run's folder is still what the run wrote."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from steer_heal.errors import UserError, plural, print_safe
from steer_heal.events import AnyEvent, Run, RunEnd
from steer_heal.flags import parsed
from steer_heal.report import console
from steer_heal.report.view import event_words
from steer_heal.runs.log import line_hash, lines_of, read_events
from steer_heal.runs.resume import finished
from steer_heal.runs.verify import unchecked, violations
from steer_heal.settings import Plugins, RunFolder, settings

HASH = re.compile("[0-9a-f]{64}")


@settings("")
class Verify:
    """Check a run's events, vectors, checkpoints, plugins and base model against their recorded hashes. No plugin runs.
    Print the hash of the last event, and what was not checked. The exit status is 1 if something differs."""

    run: RunFolder
    """Folder of the run."""
    hash: str | None = None
    """The hash that the last event should have: 64 hex digits, as a model card or an earlier `verify` shows them.
    results.tsv is stored beside the run, so whoever changes the run can change it too. Use a hash that was kept
    elsewhere."""
    plugin: Plugins = ()
    """Plugins of the run that were moved: Python files, whose names end in .py, or names of installed plugins. A file
    is only hashed."""


def main(argv: Sequence[str]) -> int:
    given, _ = parsed(Verify, argv, "verify")
    wanted = None if given.hash is None else given.hash.strip().lower()
    if wanted is not None and not HASH.fullmatch(wanted):
        raise UserError(f"hash is {given.hash!r}: it must be the 64 hex digits of a SHA-256")
    console.lines()
    found = violations(given.run, wanted, given.plugin)
    for line in found:
        print_safe(f"BROKEN: {line}")
    events = read_events(given.run)
    if not found:
        print_safe(f"as recorded: {plural(len(events), 'event')}, all files that events name, and the base model")
    if not finished(given.run):
        run = Run(events)
        command = ["steer-heal", "resume", str(given.run)]
        command += ["--plugin", *run.start.config.plugin] if run.start.config.plugin else []
        go_on = "it cannot go on" if run.dead_end else f"continue it: {shlex.join(command)}"
        print_safe(f"the run is not finished: {_last_words(events)}; {go_on}")
    print_safe(f"hash of the last event: {line_hash(lines_of(given.run)[len(events) - 1])}")
    print_safe(f"not checked: {'; '.join(unchecked(given.run, wanted))}")
    return 1 if found else 0


def _last_words(events: Sequence[AnyEvent]) -> str:
    """Where the events of a run end, and the error that stopped it, if one is recorded."""
    *past, last = events
    if isinstance(last, RunEnd):
        return f"its events end after {event_words(past[-1])}, where it stopped ({last.error})"
    return f"its events end after {event_words(last)}"
