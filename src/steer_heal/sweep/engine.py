"""Runs the jobs of a sweep, some at a time, each in a process of its own that can be repeated."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from steer_heal.runs.signals import stoppable
from steer_heal.sweep.plan import Job
from steer_heal.sweep.progress import state
from steer_heal.sweep.watch import Watch

POLL_S = 0.2
ENDED: tuple[Literal["done", "in use"], ...] = ("done", "in use")
"""States in which a run is not started."""
End = Literal["done", "failed", "in use"]
"""Of a run: in use, another process works on it."""


@runtime_checkable
class Engine(Protocol):
    """Where runs are made. A handle stands for a started run."""

    slots: int
    """Runs at a time."""

    def start(self, job: Job) -> Any:
        """Starts or continues the run of a job; its output goes to `log_of` it."""

    def poll(self, handle: Any) -> int | None:
        """Exit status of a run; None: it is still going."""

    def runs(self, handle: Any) -> bool:
        """Whether a run that was started and has not ended is at work; else it waits for room."""
        ...

    def stop(self, handles: Iterable[Any]) -> None:
        """Stops runs so that they can be resumed, and returns when they have ended."""


def log_of(job: Job) -> Path:
    """The file of a run's output, beside its folder."""
    return job.folder.with_name(f"{job.folder.name}.log")


def drive(
    source: Iterator[Job], engine: Engine, watch: Watch, ended: Callable[[Job, End], object] = lambda job, end: None
) -> None:
    """Makes every run of `source`, which is asked for the next job when a slot is free.

    A finished run is skipped, one that another process works on is left alone, one that fails does not stop the
    others. `ended` is told of each. Stopped, by Ctrl-C or SIGTERM, after its runs were stopped.
    """
    running: dict[str, tuple[Job, Any]] = {}
    try:
        with stoppable():
            more = True
            while more or running:
                while more and len(running) < engine.slots:
                    if (job := next(source, None)) is None:
                        more = False
                    elif (before := "in use" if job.folder.name in running else state(job.folder)) in ENDED:
                        watch.ended(job, before)
                        ended(job, before)
                    else:
                        running[job.folder.name] = job, engine.start(job)
                for name, (job, handle) in list(running.items()):
                    if (status := engine.poll(handle)) is not None:
                        del running[name]
                        end: End = "done" if status == 0 else "failed"
                        watch.ended(job, end, last_line(log_of(job)))
                        ended(job, end)
                    else:
                        watch.going(job, "running" if engine.runs(handle) else "waiting")
                watch.show()
                if running:
                    time.sleep(POLL_S)
    finally:
        engine.stop(handle for _, handle in running.values())


def last_line(log: Path) -> str:
    """The last line of a log that is not advice on how to continue."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return ""
    return next((line for line in reversed(lines) if line.strip() and not line.startswith("continue with:")), "")


class Local:
    """Processes of this machine, which share its cores."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.n_threads = max(1, n_cores() // slots)

    def start(self, job: Job) -> subprocess.Popen[bytes]:
        job.folder.parent.mkdir(parents=True, exist_ok=True)
        with log_of(job).open("ab") as log:
            # a group of its own: Ctrl-C reaches the sweep alone, which stops its runs one by one
            return subprocess.Popen(
                [sys.executable, "-m", "steer_heal", *job.command(self.n_threads)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,
            )

    def poll(self, handle: subprocess.Popen[bytes]) -> int | None:
        return handle.poll()

    def runs(self, handle: subprocess.Popen[bytes]) -> bool:
        return True

    def stop(self, handles: Iterable[subprocess.Popen[bytes]]) -> None:
        """A second Ctrl-C kills what has not ended yet; it can be resumed too."""
        processes = list(handles)
        try:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait()
        except KeyboardInterrupt:
            for process in processes:
                process.kill()
            for process in processes:
                process.wait()


def n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
