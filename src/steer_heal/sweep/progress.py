"""What the folder of a run says while another process works in it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from steer_heal.errors import UserError
from steer_heal.report.measurements import MEASURED, measurements, shift, target_of
from steer_heal.runs.events import RESULTS, Event, current, read_results
from steer_heal.runs.resume import begun, finished
from steer_heal.runs.storage import in_use

State = Literal["new", "stopped", "done", "in use"]
KEPT = {"run_start", "backtrack", "round", *MEASURED}
"""Stages whose events are kept, without their texts and items."""


def state(folder: Path) -> State:
    """new: no run began here; in use: another process has its lock; done: it is finished and has its row of results."""
    if not folder.is_dir():
        return "new"
    if in_use(folder):
        return "in use"
    if not begun(folder):
        return "new"
    try:
        has_row = any(row.get("run") == folder.name for row in read_results(folder.parent / RESULTS))
        return "done" if has_row and finished(folder) else "stopped"
    except UserError:  # damaged events: the run itself says which
        return "stopped"


@dataclass(frozen=True)
class Seen:
    """How far a run is."""

    round: int | None = None
    """The round in progress; -1 before the loop."""
    shift: float | None = None
    """Of the target, from base, in the last healed state."""
    broken: float | None = None
    """Share of broken texts there."""
    wall_s: float = 0.0


class Progress:
    """Reads the events of a run as they are appended."""

    def __init__(self, folder: Path, broken: str | None) -> None:
        """`broken`: name of the metric of broken texts."""
        self.path, self.broken = folder / "events.jsonl", broken
        self._restart(0)

    def _restart(self, inode: int) -> None:
        self.inode, self.offset, self.events = inode, 0, list[Event]()
        self.last: dict[str, Any] = {}
        self.round: int | None = None

    def read(self) -> Seen:
        """What the events say now. What cannot be read yet, or is not as a run writes it, is left out."""
        try:
            if (inode := self.path.stat().st_ino) != self.inode:  # a resumed run may have cut its file
                self._restart(inode)
            with self.path.open("rb") as file:
                file.seek(self.offset)
                lines = file.read().split(b"\n")
            for line in lines[:-1]:
                self.last = json.loads(line)
                self.round = self.round if self.last["round"] is None else self.last["round"]
                if self.last["stage"] in KEPT:
                    self.events.append({k: v for k, v in self.last.items() if k not in ("items", "texts")})
            self.offset += sum(len(line) + 1 for line in lines[:-1])
            return self._seen()
        except (OSError, ValueError, KeyError, TypeError):
            return Seen()

    def _seen(self) -> Seen:
        if not self.last:
            return Seen()
        events = current(self.events)
        states = measurements(events)
        base, healed = ([m for m in states if m.stage == stage] for stage in ("base", "healed"))
        moved = shift(healed[-1], base[0], target_of(events)[0]) if base and healed else None
        return Seen(self.round, moved, healed[-1][self.broken or ""] if healed else None, self.last["wall_s"])
