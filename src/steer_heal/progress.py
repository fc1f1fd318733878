"""How long work reports how far it is. Everything that shows progress implements `Progress`."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives how far a piece of work is, such as a progress bar."""

    def at(self, done: float, total: int) -> None:
        """`done` of `total` rows or steps are done; a row that is being written counts in part.

        A smaller `done` or another `total` than before means that the next piece of work has begun.
        """
        ...

    def part(self, number: int, n: int) -> None:
        """Part `number` of `n` begins, counted from 1, such as one eval of several."""
        ...


class Silent:
    """Shows nothing."""

    def at(self, done: float, total: int) -> None: ...

    def part(self, number: int, n: int) -> None: ...


SILENT = Silent()
