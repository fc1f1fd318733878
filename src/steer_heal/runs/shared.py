"""What the untouched model was measured as, taken from another run of the same model, trait, evals and seed."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from steer_heal.errors import UserError
from steer_heal.events import AnyEvent, Measured, Preflight, RunStart
from steer_heal.runs.log import EVENTS, read_events, read_start
from steer_heal.settings import RUN_ONLY, leaves

OF_THE_STUDENT = ("heal.", "rehearsal.", "dose.", "backtrack.", "adapter.", "steer.")
"""How the names of those settings and files begin that only the student depends on."""
OF_THE_RUN = {*RUN_ONLY, "n_rounds", "control"}


def with_base(start: RunStart, folder: Path) -> tuple[RunStart, list[AnyEvent]]:
    """(the start of a run, named after the run that these are from; the pre-flight and the states base and prompted of
    a run beside its folder that reads the untouched model alike). No events if there is no such run."""
    for path in sorted(folder.parent.glob(f"*/{EVENTS}")):
        with suppress(UserError):  # a run of another version, or one that is about to begin
            if path.parent != folder and _read(read_start(path.parent)) == _read(start):
                taken = [event for event in read_events(path.parent) if _of_the_base(event)]
                if taken:
                    return replace(start, base_from=path.parent.name), taken
    return start, []


def _of_the_base(event: AnyEvent) -> bool:
    return isinstance(event, Preflight) or (isinstance(event, Measured) and event.state in ("base", "prompted"))


def _read(start: RunStart) -> RunStart:
    """What the readings of the untouched model depend on: the start of a run without all else."""
    settings = {name: value for name, value in leaves(start.config).items() if name not in OF_THE_RUN}
    kept = {name: value for name, value in settings.items() if not name.startswith(OF_THE_STUDENT)}
    inputs = {name: digest for name, digest in start.inputs.items() if not name.startswith(OF_THE_STUDENT)}
    same = {"folder": "", "preset": "", "command": (), "adapter": "", "unadapted": (), "t": "", "wall_s": 0.0}
    return replace(start, config=type(start.config)(), settings=repr(kept), inputs=inputs, base_from="", **same)
