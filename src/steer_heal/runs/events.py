"""The run folder and its events.jsonl: the one record that tables, pictures and readers are made from."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from loguru import logger

from steer_heal.errors import UserError, printable
from steer_heal.inputs.files import PACKAGE
from steer_heal.runs.storage import append_line, atomic_write, sync_folder

Event = dict[str, Any]
AnyEvent = TypeVar("AnyEvent", bound=Mapping[str, Any])
SCHEMA = 4
RESULTS = "results.tsv"
FIRST = "0" * 64
"""`prev` of the first event."""


def new_run_folder(out: Path, slug: str) -> Path:
    """out/<UTC timestamp>_<slug>. A second run in the same second gets a numbered folder of its own."""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    safe = "".join(c if c.isalnum() or c in "-_" else "-" for c in slug)
    out.mkdir(parents=True, exist_ok=True)
    for attempt in range(1, 1000):
        folder = out / (f"{stamp}_{safe}" if attempt == 1 else f"{stamp}_{safe}-{attempt}")
        try:
            folder.mkdir()
            sync_folder(out)
            return folder
        except FileExistsError:
            continue
    raise FileExistsError(f"{out} already holds 999 runs of this second")


class EventLog:
    """Appends one JSON object a line, on disk before the call returns. Each names the hash of the line before it."""

    def __init__(
        self, folder: Path, before_s: float = 0.0, on_event: Callable[[Event], object] = lambda event: None
    ) -> None:
        """`before_s`: seconds that the run had already taken when it was stopped. `on_event` gets every event that was
        written."""
        path = folder / "events.jsonl"
        self.last_hash, self.on_event = last_hash(folder), on_event
        self._file = path.open("ab", buffering=0)
        sync_folder(folder)
        self._start = time.monotonic() - before_s

    def write(self, stage: str, round_: int | None, **fields: Any) -> Event:
        """The event as written: numbers that are not finite become null, and `n_nonfinite` counts them."""
        body, n_nonfinite = jsonable(fields)
        event = {
            "schema": SCHEMA,
            "stage": stage,
            "round": round_,
            "t": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "wall_s": round(time.monotonic() - self._start, 3),
            "prev": self.last_hash,
            **body,
        }
        if n_nonfinite:
            event["n_nonfinite"] = n_nonfinite
        self.last_hash = line_hash(append_line(self._file, event))
        self.on_event(event)
        return event

    def close(self) -> None:
        with suppress(OSError):  # a full disk was reported by the write that met it
            self._file.close()


def line_hash(line: bytes) -> str:
    """SHA-256 of a line of events.jsonl, without its newline."""
    return hashlib.sha256(line.rstrip(b"\n")).hexdigest()


def last_hash(folder: Path) -> str:
    """Hash of the last line of a run's events, or FIRST."""
    path = folder / "events.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    return line_hash(lines[-1]) if lines else FIRST


def broken_link(lines: Sequence[bytes]) -> int | None:
    """Index of the first line whose `prev` is not the hash of the line before it; None: the chain holds."""
    before = FIRST
    for i, line in enumerate(lines):
        if json.loads(line).get("prev") != before:
            return i
        before = line_hash(line)
    return None


def jsonable(value: Any) -> tuple[Any, int]:
    """(value made of JSON types, how many numbers in it were not finite and became None)."""
    if is_dataclass(value) and not isinstance(value, type):
        return jsonable(asdict(value))
    if isinstance(value, dict):
        pairs = {str(key): jsonable(item) for key, item in value.items()}
        return {key: item for key, (item, _) in pairs.items()}, sum(n for _, n in pairs.values())
    if isinstance(value, list | tuple | set | frozenset):
        parts = [jsonable(item) for item in value]
        return [item for item, _ in parts], sum(n for _, n in parts)
    if isinstance(value, float) and not math.isfinite(value):
        return None, 1
    if value is None or isinstance(value, str | bool | int | float):
        return value, 0
    return str(value), 0


def run_folder(folder: Path) -> Path:
    """The folder itself. UserError where it holds no events."""
    with suppress(OSError):
        if (folder / "events.jsonl").is_file():
            return folder
    raise UserError(f"{folder} has no events.jsonl; give a run folder such as out/<timestamp>_<name>")


def read_events(folder: Path) -> list[Event]:
    """Every whole event of a run. A torn last line (the run died while writing it) is left out with a warning.

    UserError naming the line where the file is not as a run writes it.
    """
    path = run_folder(folder) / "events.jsonl"
    lines = path.read_bytes().split(b"\n")
    events = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            events.append(_event(json.loads(line)))
        except (ValueError, RecursionError) as error:
            if number < len(lines):
                raise UserError(
                    f"{path} line {number} is not an event ({error}); restore the file, or delete the line"
                ) from None
            logger.warning(f"{path}: the last line is torn (the run died while writing it) and is left out")
    return events


def _event(value: Any) -> Event:
    """The value itself, if it is an object with its stage and round."""
    if not isinstance(value, dict):
        raise ValueError(f"it is a JSON {type(value).__name__}, not an object")
    if not isinstance(value.get("stage"), str):
        raise ValueError(f"its stage is {value.get('stage')!r:.80}, not a name")
    if "round" not in value or type(value["round"]) not in (int, type(None)):
        raise ValueError(f"its round is {value.get('round')!r:.80}, neither a whole number nor null")
    return value


@contextmanager
def schema_errors(folder: Path) -> Iterator[None]:
    """While inside, an event that lacks a field is one UserError: the file was changed, or another version wrote it."""
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:
        raise UserError(
            f"{folder / 'events.jsonl'} is not as this version of steer-heal writes it ({type(error).__name__}: "
            f"{error}); use the version that wrote it, or restore the file"
        ) from error


def of_stage(events: Iterable[AnyEvent], stage: str) -> list[AnyEvent]:
    return [event for event in events if event["stage"] == stage]


def current(events: Sequence[AnyEvent]) -> list[AnyEvent]:
    """The events without those of attempts at a round that were dropped."""
    dropped = {event["round"]: i for i, event in enumerate(events) if event["stage"] == "backtrack"}
    return [e for i, e in enumerate(events) if e["stage"] == "backtrack" or i > dropped.get(e["round"], -1)]


def heal_steps(events: Iterable[AnyEvent]) -> list[AnyEvent]:
    """Steps of the heals that succeeded or still run. The steps of a round before its heal_retry were given up."""
    steps: dict[int, list[AnyEvent]] = {}
    for event in events:
        if event["stage"] == "heal_step":
            steps.setdefault(event["round"], []).append(event)
        elif event["stage"] == "heal_retry":
            steps.pop(event["round"], None)
    return [step for of_round in steps.values() for step in of_round]


# --- results.tsv -------------------------------------------------------------------------------------------------
def append_result(out: Path, row: dict[str, Any]) -> None:
    """One row of results.tsv, unless the run has one. A new column rewrites the header; older rows stay empty there.

    A lock file keeps runs that finish together from losing each other's rows.
    """
    with (out / f".{RESULTS}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _append_row(out / RESULTS, row)


def read_results(path: Path) -> list[dict[str, str]]:
    """Rows of results.tsv as text; none where there is no file."""
    lines = path.read_text(encoding="utf-8", errors="surrogateescape").split("\n") if path.exists() else [""]
    return [dict(zip(lines[0].split("\t"), line.split("\t"), strict=False)) for line in lines[1:] if line]


def _append_row(path: Path, row: dict[str, Any]) -> None:
    rows = read_results(path)
    if row["run"] in {old.get("run") for old in rows}:
        return
    rows.append({key: "" if value is None else " ".join(printable(str(value)).split()) for key, value in row.items()})
    columns: list[str] = list(dict.fromkeys([*(rows[0] if len(rows) > 1 else row), *row]))
    lines = ["\t".join(columns), *("\t".join(r.get(c, "") for c in columns) for r in rows)]
    with atomic_write(path) as part:
        part.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogateescape", newline="\n")


def versions() -> dict[str, str]:
    """Of Python and the packages that the numbers depend on; this one's where it is installed."""
    found = {"python": platform.python_version()}
    for name in ("steer-heal", "torch", "transformers", "peft", "tokenizers"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def git_commit() -> str | None:
    """Of the checkout that this package is run from; None where git does not track it."""
    try:
        command = ["git", "-C", str(PACKAGE), "log", "-1", "--format=%H", "--", "__init__.py"]
        tracked = subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip()
        command = ["git", "-C", str(PACKAGE), "rev-parse", "HEAD"]
        return tracked and subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
