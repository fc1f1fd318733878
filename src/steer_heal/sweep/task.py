"""One run in a process of its own, and what a Ray worker does with it. Importing this needs no torch."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from steer_heal.runs.storage import in_use

WAIT_S = 0.2


class Killed(Exception):
    """A signal ended the process of a run, for instance because memory ran out."""


def start(arguments: Sequence[str], log: Path, cwd: Path | None = None) -> subprocess.Popen[bytes]:
    """Starts `steer-heal` with these arguments, with its output at the end of the log. The process has a group of its
    own: Ctrl-C reaches the sweep alone, which stops its runs one by one."""
    command = [sys.executable, "-m", "steer_heal", *arguments]
    with log.open("ab") as out:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, cwd=cwd, process_group=0
        )


def make(arguments: Sequence[str], folder: Path, log: Path, cwd: Path) -> int:
    """Exit status of `steer-heal` with these arguments, which make or resume the run in `folder`.

    If an earlier worker was killed, its process may still work on the run; then this waits for its end. Raises Killed
    if a signal ended the process.
    """
    # Ray cancels a task by SIGINT, which its workers ignore if Ray was started in the background of a shell
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder.mkdir(parents=True, exist_ok=True)
    log.touch()  # tells the sweep that the run no longer waits
    while in_use(folder):
        time.sleep(WAIT_S)
    process = start(arguments, log, cwd if cwd.is_dir() else None)
    try:
        while (status := process.poll()) is None:
            time.sleep(WAIT_S)  # a cancelled task is interrupted here
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if status < 0:
        raise Killed(f"{folder}: the process was ended by signal {-status}")
    return status
