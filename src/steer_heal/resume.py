"""Going on with a run that was stopped: its configuration, its past events, its lock, and the signals that stop it.

A resumed run walks through the same steps. A step whose event is there takes its result from the event; the first one
without is where work begins, from what its stage left in `partial/`.
"""

from __future__ import annotations

import fcntl
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from shutil import rmtree
from typing import IO, Any

import tyro

from steer_heal.config import RunConfig, from_dict, inputs, parse
from steer_heal.events import RESULTS, heal_steps, jsonable, of_stage, read_events, read_results, reading
from steer_heal.files import beside
from steer_heal.records import Trait, UserError

Event = dict[str, Any]
CHANGES_NOTHING = ("quiet", "out", "resume", "arm", "export", "eval.cache", "gen.batch_size", "eval.batch_size", "heal.tokens_per_pass")
"""Fields of the configuration that may differ from the run that is resumed: what is computed, up to rounding, does not depend on them."""


# --- what is asked for -----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Resume:
    """Goes on with a run that was stopped, with its own settings."""

    resume: Path
    """Folder of the run."""
    quiet: bool = False
    """Only warnings and errors on the console."""


def parse_or_resume(argv: list[str] | None = None) -> tuple[str, RunConfig]:
    """(preset name, configuration); with --resume, those of the run, once what was asked for agrees with them."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0].split("=")[0] == "--resume":
        asked = tyro.cli(Resume, args=argv, prog="python -m steer_heal.run")
        preset, cfg = recorded(asked.resume)
        return preset, replace(cfg, resume=asked.resume, out=asked.resume.resolve().parent, quiet=asked.quiet)
    preset, asked = parse(argv)
    if asked.resume is None:
        return preset, asked
    preset, cfg = recorded(asked.resume)
    refuse_differences(asdict(cfg), asdict(asked), asked.resume)
    return preset, replace(
        cfg, resume=asked.resume, out=asked.resume.resolve().parent, quiet=asked.quiet, arm=asked.arm or cfg.arm, export=asked.export or cfg.export,
        gen=asked.gen, eval=asked.eval, heal=asked.heal,  # equal, but for batch sizes and the cache
    )


def run_start(folder: Path) -> Event:
    path = folder / "events.jsonl"
    try:
        with path.open(encoding="utf-8") as lines:
            event = json.loads(lines.readline())
        if event["stage"] == "run_start":
            return event
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    raise UserError(f"resume is {str(folder)!r}: {path} does not begin with a run_start; give the folder of a run, or start a new one")


def recorded(folder: Path) -> tuple[str, RunConfig]:
    """(preset name, configuration) that the run was started with."""
    start = run_start(folder)
    with reading(folder):
        return start["preset"], from_dict(RunConfig, start["config"])


def same_inputs(folder: Path, cfg: RunConfig, trait: Trait) -> None:
    """UserError naming the setting whose file, or the part of the trait that, was changed since the run began."""
    now = inputs(cfg)
    with reading(folder):
        start = run_start(folder)
        then, trait_then = start.get("inputs", now), start["trait"]
    for name, digest in then.items():
        if digest != now.get(name):
            raise UserError(
                f"resume is {str(folder)!r}: the file of {name} was changed since the run began (SHA-256 {digest[:12]} then, {str(now.get(name))[:12]} now); "
                "put it back, or start a new run"
            )
    refuse_differences({"trait": trait_then}, {"trait": asdict(trait)}, folder, "put the trait's file back")


def refuse_differences(
    before: Any, now: Any, folder: Path, mend: str = "give the run's own settings (`--resume` alone takes them)"
) -> None:
    before, now = _flat(jsonable(before)[0]), _flat(jsonable(now)[0])
    names = [name for name in sorted(before | now) if name not in CHANGES_NOTHING and before.get(name) != now.get(name)]
    if names:
        told = "; ".join(f"{name} was {_short(before.get(name))} and is now {_short(now.get(name))}" for name in names)
        raise UserError(f"resume is {str(folder)!r}: {told}; {mend}, or start a new run")


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    return {key: leaf for k, item in value.items() for key, leaf in _flat(item, f"{name}.{k}" if name else k).items()}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."


def finished(folder: Path) -> bool:
    """Whether nothing is left to do: the last thing that a run writes is its row of results.tsv."""
    return folder.resolve().name in {row.get("run") for row in read_results(folder.resolve().parent / RESULTS)}


# --- what has happened -----------------------------------------------------------------------------------------
class Past:
    """The events of a run that was stopped, asked for in the order in which a run writes them."""

    def __init__(self, events: list[Event]) -> None:
        self.before_s = events[-1]["wall_s"] if events else 0.0
        self.last_heal = max((e["round"] for e in of_stage(events, "heal")), default=-1)
        self._events = [e for e in events if e["stage"] != "heal_step"]
        self.last = f"{events[-1]['stage']} of round {events[-1]['round']}" if events else "nothing"
        self._next = 0

    def holds(self, stage: str, round_: int | None) -> bool:
        return any((e["stage"], e["round"]) == (stage, round_) for e in self._events)

    def take(self, stage: str, round_: int | None) -> Event | None:
        """The event of this step, or None where the step is still to be done."""
        if self._next == len(self._events):
            return None
        event = self._events[self._next]
        if (event["stage"], event["round"]) != (stage, round_):
            raise UserError(
                f"events.jsonl has {event['stage']!r} of round {event['round']} where a run writes {stage!r} of round {round_}: the file was changed, "
                "or written by another version; start a new run"
            )
        self._next += 1
        return event


def reopen(folder: Path, steps_saved: Any) -> Past:
    """The past of a run; events.jsonl is cut back to where the run can go on exactly as it would have.

    `steps_saved` tells how many steps of a heal its file in `partial/` holds.
    """
    path = folder / "events.jsonl"
    events = read_events(folder)
    with reading(folder):
        cut_back(events, folder, steps_saved)
        past, text = Past(events), "".join(json.dumps(event, allow_nan=False) + "\n" for event in events).encode()
    if text != path.read_bytes():
        with beside(path) as part:
            part.write_bytes(text)
    return past


def cut_back(events: list[Event], folder: Path, steps_saved: Any) -> None:
    """Drops the events from which a run cannot go on."""
    if events and events[-1].get("error"):  # a run_end that says why the run was stopped
        events.pop()
    heals = [i for i, e in enumerate(events) if e["stage"] == "heal"]
    while heals and not (folder / "ckpt" / f"r{events[heals[-1]]['round']}").exists():
        del events[heals.pop() :]
        rmtree(folder / "partial", ignore_errors=True)  # of rounds that are no more
    r = 1 + max((e["round"] for e in of_stage(events, "heal")), default=-1)
    saved, n_steps = partial(folder, "heal", r), sum(e["round"] == r for e in heal_steps(events))
    kept = steps_saved(saved)
    if kept > n_steps:  # the end of events.jsonl was lost: without its events a step is taken again
        saved.unlink()
        kept = 0
    del events[len(events) - max(0, n_steps - kept) :]
    if events and events[-1]["stage"] in ("dose", "adapter_gen"):  # written together with the event that follows
        events.pop()


def partial(folder: Path, stage: str, round_: int) -> Path:
    """Where a stage keeps what it has done so far."""
    suffix = "safetensors" if stage in ("heal", "control") else "jsonl"
    return folder / "partial" / f"{stage}-r{round_}.{suffix}"


# --- one process, and how it is stopped ------------------------------------------------------------------------
def hold(folder: Path) -> IO[str]:
    """The run folder's lock, held until the file is closed or the process is gone; a second process is a UserError."""
    lock = (folder / ".lock").open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise UserError(f"{folder} is in use: another process is running it; wait for it, or stop it") from None
    return lock


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
    """While inside, SIGINT and SIGTERM go to `handler`; signal.SIG_IGN lets a run that was stopped end in peace."""
    before = {each: signal.signal(each, handler) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
