"""How a run is stopped from outside: SIGINT and SIGTERM become an exception."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stopped(KeyboardInterrupt):
    """Ctrl-C, or SIGTERM."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.status = 128 + signum


@contextmanager
def stoppable() -> Iterator[None]:
    """While inside, SIGINT and SIGTERM raise Stopped. Native code that calls Python may put an error of its own in its
    place, which is then raised as Stopped all the same."""
    received: list[Stopped] = []

    def stop(signum: int, _frame: Any) -> None:
        received.append(Stopped(signum))
        raise received[0]

    with handled(stop):
        try:
            yield
        except Exception as error:
            if received:
                raise received[0] from error
            raise


@contextmanager
def handled(handler: Any) -> Iterator[None]:
    """While inside, SIGINT and SIGTERM go to `handler`; signal.SIG_IGN ignores them."""
    before = {each: signal.signal(each, handler) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler_before in before.items():
            signal.signal(each, handler_before)
