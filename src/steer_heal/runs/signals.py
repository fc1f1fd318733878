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
    """While inside, SIGINT and SIGTERM raise Stopped."""

    def stop(signum: int, _frame: Any) -> None:
        raise Stopped(signum)

    with handled(stop):
        yield


@contextmanager
def handled(handler: Any) -> Iterator[None]:
    """While inside, SIGINT and SIGTERM go to `handler`; signal.SIG_IGN ignores them."""
    before = {each: signal.signal(each, handler) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler_before in before.items():
            signal.signal(each, handler_before)
