"""The interface between long work and whatever shows its progress."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Something that shows progress, such as a bar."""

    def at(self, done: float, total: int, /) -> None:
        """`done` of `total` rows or steps are done. A row that is being written counts in part.

        A smaller `done`, or another `total`, means that new work has begun.
        """
        ...

    def part(self, number: int, n: int, /) -> None:
        """Part `number` of `n` begins, counted from 1, such as one eval of several."""
        ...


class Silent:
    """No-op progress."""

    def at(self, done: float, total: int, /) -> None: ...

    def part(self, number: int, n: int, /) -> None: ...


SILENT = Silent()
