"""How far the work at hand is: one interface for the console's bar, a notebook's bar, and silence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Progress:
    """Shows nothing. A subclass shows what it is told."""

    @contextmanager
    def stage(self, stage: str, r: int | None, doing: str) -> Iterator[None]:
        """A stage of round r runs inside. Round None is before the loop."""
        yield

    def part(self, n: int, n_parts: int, kind: str = "eval") -> None:
        """Part n of the stage begins, counted from 1. `kind` says what its parts are."""

    def at(self, done: int | float, total: int) -> None:
        """`done` of `total` rows or steps are finished."""


SILENT = Progress()
