"""The table of a sweep: live in a terminal, otherwise a line for each run that starts or ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from steer_heal.errors import print_safe, printable
from steer_heal.report.tables import Terminal
from steer_heal.sweep.plan import Job
from steer_heal.sweep.progress import Follower, Seen
from steer_heal.verdict import number

Shown = Literal["running", "failed", "in use", "done", "waiting"]
ORDER: tuple[Shown, ...] = ("running", "failed", "in use", "done", "waiting")
"""From the top of the table."""
COLUMNS = ("run", "state", "round", "shift", "broken texts", "time")
MARGIN = 7
"""Lines of a terminal that the rows of the table leave free."""


class Row:
    """One run."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.state = ORDER[-1]
        self.message = ""
        self.follower = Follower(job.folder, job.arm.broken_texts)
        self.seen = Seen()

    def cells(self) -> tuple[str, ...]:
        seen = self.seen
        where = "base" if seen.began else ""
        if seen.round is not None:
            where = f"{seen.round + 1}/{self.job.cfg.n_rounds}"
        values = ["", ""]
        if seen.shift is not None:
            values = [number(seen.shift, "+.3f"), number(seen.broken_texts, ".0%")]
        return (self.job.folder.name, self.state, where, *values, f"{seen.wall_s:.0f} s" if seen.wall_s else "")


class Watch:
    """Shows the runs of a sweep. Nothing else may print inside it."""

    def __init__(self, jobs: Sequence[Job], console: Console | None = None) -> None:
        """`jobs` are those that are known before the first one starts."""
        self.console = console or Terminal(highlight=False)
        self.rows = {job.folder.name: Row(job) for job in jobs}
        self.live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None

    def __enter__(self) -> Watch:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live is not None:
            self.show()
            self.live.stop()

    def going(self, job: Job, state: Literal["running", "waiting"]) -> None:
        """A run was started and has not ended. It can be called again for the same run and state."""
        if self.rows.setdefault(job.folder.name, Row(job)).state != state:
            self._set(job, state, "")

    def ended(self, job: Job, state: Literal["done", "failed", "in use"], message: str = "") -> None:
        self._set(job, state, message)

    def _set(self, job: Job, state: Shown, message: str) -> None:
        row = self.rows.setdefault(job.folder.name, Row(job))
        row.state = state
        row.message = message
        if state != "running":
            row.seen = row.follower.read()
        if self.live is None:
            name, *cells = row.cells()
            print_safe("  ".join(cell for cell in (f"{state:<7}", name, *cells[1:]) if cell))

    def show(self) -> None:
        """Draws the table again if there is a terminal."""
        if self.live is None:
            return
        for row in self.having("running"):
            row.seen = row.follower.read()
        rows = [row for state in ORDER for row in self.having(state)]
        counts = Counter(row.state for row in rows)
        title = ", ".join(f"{counts[state]} {state}" for state in ORDER if counts[state])
        table = Table(*COLUMNS, title=title, box=None, title_justify="left")
        for row in rows[: max(1, self.console.height - MARGIN)]:
            table.add_row(*(Text(printable(cell)) for cell in row.cells()))
        self.live.update(table, refresh=True)

    def having(self, state: Shown) -> list[Row]:
        return [row for row in self.rows.values() if row.state == state]
