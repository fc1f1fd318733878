"""Runs the jobs of a sweep, several at a time. Each runs in a process of its own that can be repeated."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

from steer_heal.runs.signals import stoppable
from steer_heal.sweep.plan import Job
from steer_heal.sweep.progress import run_status
from steer_heal.sweep.task import start
from steer_heal.sweep.watch import Watch

POLL_S = 0.2
End = Literal["done", "failed", "in use"]
"""How a job ends. in use: another process works on its run."""


class Engine(Protocol):
    """Where runs are made. A handle stands for a started run."""

    slots: int
    """Maximum number of runs at a time."""

    def start(self, job: Job) -> Any:
        """Starts or resumes the run of a job. Its output goes to `log_of(job)`."""

    def poll(self, handle: Any) -> int | None:
        """Exit status of a run. None while it has not ended."""

    def runs(self, handle: Any) -> bool:
        """Whether a run that was started and has not ended is at work. Otherwise it waits for room."""
        ...

    def stop(self, handles: Iterable[Any]) -> None:
        """Stops runs so that they can be resumed, and returns once they have ended."""


def log_of(job: Job) -> Path:
    """The file with the output of a run, beside its folder."""
    return job.folder.with_name(f"{job.folder.name}.log")


def drive(
    source: Iterator[Job], engine: Engine, watch: Watch, ended: Callable[[Job, End], object] = lambda job, end: None
) -> None:
    """Makes every run of `source`, which is asked for the next job whenever a slot is free.

    Skips a finished run, and leaves a run alone that another process works on. A run that fails does not stop the
    others. `ended` is called at the end of each job. On Ctrl-C or SIGTERM, stops the runs and raises Stopped.
    """
    running: dict[str, tuple[Job, Any]] = {}

    def end(job: Job, how: End, message: str = "") -> None:
        watch.ended(job, how, message)
        ended(job, how)

    try:
        with stoppable():
            while True:
                while len(running) < engine.slots and (job := next(source, None)) is not None:
                    status = "in use" if job.folder.name in running else run_status(job.folder)
                    if status == "done" or status == "in use":
                        end(job, status)
                    else:
                        running[job.folder.name] = (job, engine.start(job))
                if not running:
                    return
                for name, (job, handle) in list(running.items()):
                    exit_status = engine.poll(handle)
                    if exit_status is None:
                        watch.going(job, "running" if engine.runs(handle) else "waiting")
                    else:
                        del running[name]
                        end(job, "done" if exit_status == 0 else "failed", last_line(log_of(job)))
                watch.show()
                if running:
                    time.sleep(POLL_S)
    finally:
        engine.stop(handle for _, handle in running.values())


def last_line(log: Path) -> str:
    """The last line of a log that does not say how to continue."""
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
        return start(job.command(self.n_threads), log_of(job))

    def poll(self, handle: subprocess.Popen[bytes]) -> int | None:
        return handle.poll()

    def runs(self, handle: subprocess.Popen[bytes]) -> bool:
        return True

    def stop(self, handles: Iterable[subprocess.Popen[bytes]]) -> None:
        """On a second Ctrl-C, kills the runs that have not ended yet. They can be resumed too."""
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
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
