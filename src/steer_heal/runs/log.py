"""events.jsonl: a line for each event, linked by hashes, on disk before the run goes on."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from loguru import logger

from steer_heal.errors import UserError
from steer_heal.events import SCHEMA, AnyEvent, RunStart, decode, encode
from steer_heal.runs.storage import append_line, sync_folder

EVENTS = "events.jsonl"
FIRST = "0" * 64
"""`prev` of the first event."""


class EventLog:
    """Appends events. Each line names the hash of the line before it."""

    def __init__(self, folder: Path, before_s: float = 0.0) -> None:
        """`before_s`: seconds that the run had taken when it was stopped."""
        self.folder = folder
        self.last_hash = last_hash(folder)
        self._file = (folder / EVENTS).open("ab", buffering=0)
        sync_folder(folder)
        self._start = time.monotonic() - before_s

    def require_in_place(self) -> None:
        """UserError where the file is no longer where it was opened."""
        with suppress(OSError):
            if os.path.samestat(os.stat(self.folder / EVENTS), os.fstat(self._file.fileno())):
                return
        raise UserError(
            f"{self.folder} was moved or deleted while the run was going on, and nothing more is written; continue "
            "the run where it is now: steer-heal resume NEW_PLACE",
            resumable=False,
        )

    def write(self, event: AnyEvent) -> AnyEvent:
        """The event as written, with its time."""
        self.require_in_place()
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        event = replace(event, t=now, wall_s=round(time.monotonic() - self._start, 3))
        self.last_hash = line_hash(append_line(self._file, encode(event, self.last_hash)))
        return event

    def close(self) -> None:
        with suppress(OSError):  # a full disk was reported by the write that met it
            self._file.close()


def line_hash(line: bytes) -> str:
    """SHA-256 of a line, without its newline."""
    return hashlib.sha256(line.rstrip(b"\n")).hexdigest()


def lines_of(folder: Path) -> list[bytes]:
    """The lines of a run's events that are not blank, each with a newline."""
    path = folder / EVENTS
    return [line + b"\n" for line in path.read_bytes().split(b"\n") if line.strip()] if path.exists() else []


def last_hash(folder: Path) -> str:
    """Hash of the last line of a run's events, or FIRST."""
    lines = lines_of(folder)
    return line_hash(lines[-1]) if lines else FIRST


def broken_link(lines: Sequence[bytes]) -> int | None:
    """Index of the first line whose `prev` is not the hash of the line before it; None: the chain holds."""
    before = FIRST
    for i, line in enumerate(lines):
        if json.loads(line).get("prev") != before:
            return i
        before = line_hash(line)
    return None


def run_folder(folder: Path) -> Path:
    """The folder itself. UserError where it holds no events."""
    with suppress(OSError):
        if (folder / EVENTS).is_file():
            return folder
    raise UserError(f"{folder} has no {EVENTS}; give a run folder such as out/<timestamp>_<name>")


def read_events(folder: Path) -> list[AnyEvent]:
    """Every whole event of a run. A torn last line (the run died while writing it) is left out with a warning.

    UserError naming the line where the file is not as this version writes it.
    """
    path = run_folder(folder) / EVENTS
    lines = path.read_bytes().split(b"\n")
    events = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            events.append(decode(line))
        except (ValueError, RecursionError) as error:
            if number < len(lines):
                raise UserError(
                    f"{path} line {number} is not an event of this version ({error}); restore the file, or use the "
                    "version that wrote it"
                ) from None
            _warn_of_torn(path)
        else:
            if b"\r" in line:
                raise UserError(
                    f"{path} line {number} has a carriage return, which no run writes: an editor or a transfer changed "
                    "the line ends, and with them every hash; restore the file"
                )
    return events


@functools.cache  # a command may read the events several times
def _warn_of_torn(path: Path) -> None:
    logger.warning(f"{path}: the last line is torn (the run died while writing it) and is left out")


def read_start(folder: Path) -> RunStart:
    """The first event. UserError where no run began, or another version wrote it."""
    path = run_folder(folder) / EVENTS
    try:
        with path.open("rb") as file:
            line = file.readline()
        schema = json.loads(line).get("schema")
        start = decode(line) if schema == SCHEMA else None
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} does not begin with the start of a run ({error!s:.300}); give the folder of a run"
        ) from None
    if isinstance(start, RunStart):
        return start
    if schema == SCHEMA:
        raise UserError(f"{path} does not begin with a run_start; give the folder of a run")
    raise UserError(f"{path} has schema {schema!r:.20}: this version reads {SCHEMA}; use the version that wrote it")


@contextmanager
def schema_errors(folder: Path) -> Iterator[None]:
    """While inside, events that contradict each other are one UserError: the file was changed."""
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:
        raise UserError(
            f"{folder / EVENTS} is not as this version of steer-heal writes it ({type(error).__name__}: {error}); use "
            "the version that wrote it, or restore the file"
        ) from error
