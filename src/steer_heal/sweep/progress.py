"""How far a run is that another process works on, read from its folder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from steer_heal.errors import UserError
from steer_heal.events import AnyEvent, Dropped, Measured, Run, RunStart, decode
from steer_heal.runs.log import EVENTS
from steer_heal.runs.results import row_of
from steer_heal.runs.resume import begun, finished
from steer_heal.runs.storage import in_use
from steer_heal.verdict import shift

Status = Literal["new", "stopped", "done", "in use"]


def run_status(folder: Path) -> Status:
    """new: no run began here; in use: another process holds its lock; done: finished, with its row of results."""
    if not folder.is_dir():
        return "new"
    if in_use(folder):
        return "in use"
    if not begun(folder):
        return "new"
    try:
        return "done" if row_of(folder) is not None and finished(folder) else "stopped"
    except UserError:  # damaged events: the run itself names the damage
        return "stopped"


@dataclass(frozen=True, kw_only=True)
class Seen:
    """How far a run is."""

    began: bool = False
    round: int | None = None
    """The round in progress. None: before the loop."""
    shift: float | None = None
    """Shift of the trait's metric from base in the last healed state."""
    broken_texts: float | None = None
    """Share of broken texts there."""
    wall_s: float = 0.0


class Follower:
    """Reads the events of a run as they are appended."""

    def __init__(self, folder: Path, broken_texts: str | None) -> None:
        """`broken_texts`: name of the metric."""
        self.path = folder / EVENTS
        self.broken_texts = broken_texts
        self._restart(0)

    def _restart(self, inode: int) -> None:
        self.inode = inode
        self.offset = 0
        self.run = Run()
        self.last: AnyEvent | None = None
        self.round: int | None = None

    def read(self) -> Seen:
        """What the events say now. Nothing if they cannot be read yet, or are not as a run writes them."""
        try:
            if (inode := self.path.stat().st_ino) != self.inode:  # a resumed run may have cut its file
                self._restart(inode)
            with self.path.open("rb") as file:
                file.seek(self.offset)
                lines = file.read().split(b"\n")
            for line in lines[:-1]:
                self._take(decode(line))
            self.offset += sum(len(line) + 1 for line in lines[:-1])
            return self._seen()
        except (OSError, ValueError, UserError):
            return Seen()

    def _take(self, event: AnyEvent) -> None:
        """Keeps what the table shows: of measured states no texts, and only the items of the trait's metric."""
        self.last = event
        self.round = self.round if event.round is None else event.round
        if isinstance(event, Measured):
            item = self.run.trait_metric.item
            items = {name: values for name, values in event.items.items() if name == item}
            self.run.take(replace(event, items=items, texts=()))
        elif isinstance(event, RunStart | Dropped):
            self.run.take(event)

    def _seen(self) -> Seen:
        if self.last is None:
            return Seen()
        seen = Seen(began=True, round=self.round, wall_s=self.last.wall_s)
        base = self.run.measured("base")
        healed = [state for state in self.run.each(Measured) if state.state == "healed"]
        if base is None or not healed:
            return seen
        moved = shift(healed[-1], base, self.run.trait_metric)
        return replace(seen, shift=moved, broken_texts=healed[-1][self.broken_texts or ""])
