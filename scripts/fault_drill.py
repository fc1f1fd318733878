"""What does a run survive? Processes are killed, starved of disk and damaged, resumed, and compared with a whole run.

Every case is a process of the fast-dev preset with the settings below (two rounds and the control, 3 vignettes, texts
of 6 tokens). A fault comes at a moment of the untouched run, found again by the number of events, so that a slow
machine shifts nothing. Three things differ from `steer-heal run`: nothing is drawn, a heal is saved every
0.05 s instead of every 60, and a process is forked from one that has torch loaded.
"""

import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from common import cli
from compare import differences

from steer_heal.__main__ import main as program
from steer_heal.commands import run as run_command
from steer_heal.diag.lab import show
from steer_heal.errors import print_safe
from steer_heal.events import Trained
from steer_heal.inputs.files import DATA
from steer_heal.runs import stored
from steer_heal.runs.log import EVENTS, read_events

Fault = Literal["kill", "kill twice", "ctrl-c", "sigterm", "full disk", "torn events", "flipped byte", "second process"]
SETTINGS = (
    "--quiet --n-threads 1 --n-rounds 2 --steer.n-contexts 4 --gen.max-new-tokens 6 "
    "--eval.think-tokens 1 --eval.n-texts 2 --eval.n-prompts 2 --eval.max-new-tokens 6 --eval.n-bootstrap 10"
)
BATCHES = {
    "float32": "--gen.batch-size 4",
    "bfloat16": "--gen.batch-size 0 --filter.n-keep 40 --filter.max-attempts 80 --dose.mode fixed",
}
"""Settings of the text by dtype. In bfloat16 the bytes of a text depend on its batch: the size is the default one, and
there are more texts than one batch holds."""
HOW_TO_RESUME = "continue with: steer-heal resume"
LIMIT_S = 600.0
"""A process that takes longer counts as lost."""


class Lost(Exception):
    """Why a run did not survive."""


class Late(Exception):
    """The run had ended before the fault came, so the case does not count."""


@dataclass
class Process:
    """The process of a run, its stderr, and its folder."""

    child: BaseProcess
    errors: Path
    run: Path

    def wait(self, status: int, words: Sequence[str] = ()) -> None:
        """Waits for the end. Raises Lost unless it has this exit status, and stderr these words."""
        self.child.join(LIMIT_S)
        if (got := self.child.exitcode) is None:
            self.child.kill()
            raise Lost(f"still running after {LIMIT_S:.0f} s")
        said = self.errors.read_text()
        if got == 0 and status != 0:
            raise Late
        if got != status or not all(word in said for word in words):
            raise Lost(f"exit status {got}, should be {status} with {list(words)}: {said[-500:]}")

    def stop(self, moment: tuple[int, float], signum: int = signal.SIGKILL, words: Sequence[str] = ()) -> Path:
        """Sends a signal at a moment and waits for the end. Returns the folder of the run."""
        self.at(moment)
        self.signal(signum)
        self.wait(-signum if signum == signal.SIGKILL else 128 + signum, words)
        return self.run

    def signal(self, signum: int) -> None:
        if self.child.is_alive():
            os.kill(self.child.pid or 0, signum)

    def at(self, moment: tuple[int, float]) -> None:
        """Returns when the run has so many events, and so many seconds have passed since."""
        n_events, after_s = moment
        while self.child.is_alive() and (self.run / EVENTS).read_bytes().count(b"\n") < n_events:
            time.sleep(0.002)
        time.sleep(after_s)


class Drill:
    """The untouched run, and new ones to be compared with it."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self.folder = folder
        vignettes = folder / "vignettes.jsonl"
        lines = (DATA / "toylm/vignettes.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        vignettes.write_text("".join(lines[:3]), encoding="utf-8")
        own = f"{BATCHES[dtype]} --dtype {dtype} --eval.vignettes"
        self.settings = [*SETTINGS.split(), *own.split(), str(vignettes)]
        first = self.start("untouched")
        first.wait(0)
        self.whole = first.run
        self.events = read_events(self.whole)
        self.times = [event.wall_s for event in self.events]

    def start(self, name: str, n_bytes: int | None = None) -> Process:
        """A new run, once it has its first event. It cannot write files of more than `n_bytes`, as on a full disk."""
        out = self.folder / name
        out.mkdir()
        child = self._fork(["run", "fast-dev", "--out", str(out), *self.settings], out, n_bytes)
        while (events := next(out.glob(f"*/{EVENTS}"), None)) is None or b"\n" not in events.read_bytes():
            if not child.is_alive():
                raise Lost(f"no run began: {(out / 'errors.txt').read_text()[-500:]}")
            time.sleep(0.002)
        return Process(child, out / "errors.txt", events.parent)

    def resume(self, run: Path) -> Process:
        return Process(self._fork(["resume", str(run), "--quiet"], run.parent, None), run.parent / "errors.txt", run)

    def _fork(self, flags: Sequence[str], out: Path, n_bytes: int | None) -> BaseProcess:
        def child() -> None:
            for stream, name in ((sys.stdout, os.devnull), (sys.stderr, out / "errors.txt")):
                with open(name, "w") as file:
                    os.dup2(file.fileno(), stream.fileno())
            if n_bytes is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))
            stored.SAVE_EVERY_S = 0.05
            run_command.draw = lambda folder: None
            sys.exit(program(list(flags)))

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        return process

    def moment(self, share: float, after: int = 0) -> tuple[int, float]:
        """(events, seconds after the last of them) at a share of the untouched run's time after event `after`."""
        began = self.times[after]
        at = began + share * (self.times[-1] - began)
        n_events = bisect_right(self.times, at)
        return n_events, at - self.times[n_events - 1]

    def finish(self, run: Path) -> None:
        """Resumes to the end. Lost if anything differs from the untouched run."""
        self.resume(run).wait(0)
        if lost := differences(run, self.whole):
            raise Lost("; ".join(lost))


def kill(drill: Drill, name: str, share: float, rng: random.Random) -> Path:
    return drill.start(name).stop(drill.moment(share))


def kill_twice(drill: Drill, name: str, share: float, rng: random.Random) -> Path:
    return drill.resume(kill(drill, name, share, rng)).stop(drill.moment(rng.uniform(share, 1.0)))


def ctrl_c(drill: Drill, name: str, share: float, rng: random.Random) -> Path:
    return drill.start(name).stop(drill.moment(share), signal.SIGINT, [HOW_TO_RESUME])


def sigterm(drill: Drill, name: str, share: float, rng: random.Random) -> Path:
    return drill.start(name).stop(drill.moment(share), signal.SIGTERM, [HOW_TO_RESUME])


def full_disk(drill: Drill, name: str, share: float, rng: random.Random) -> Path:
    """No file can grow beyond a share of the final size of events.jsonl."""
    sizes = [len(line) for line in (drill.whole / EVENTS).read_bytes().splitlines(keepends=True)]
    process = drill.start(name, n_bytes=int(sizes[0] * 1.2 + share * (sum(sizes[1:]) - 0.2 * sizes[0])))
    process.wait(1, ["could not write to", "free some space"])
    if not (process.run / EVENTS).read_bytes().endswith(b"\n"):
        raise Lost("half an event was left in events.jsonl")
    return process.run


def torn_events(drill: Drill, name: str, share: float, rng: random.Random) -> Path:
    """The end of events.jsonl is lost in the middle of its last line, as in a power cut."""
    run = drill.start(name).stop(drill.moment(share, after=1))
    content = (run / EVENTS).read_bytes()
    (run / EVENTS).write_bytes(content[: -rng.randrange(1, len(content.splitlines()[-1]))])
    return run


def flipped_byte(drill: Drill, name: str, share: float, rng: random.Random) -> Path:
    """One bit of the last checkpoint is flipped. It is refused by name, and made again once its folder is deleted."""
    first = next(i for i, event in enumerate(drill.events) if isinstance(event, Trained))
    run = drill.start(name).stop(drill.moment(share, after=first))
    trained = stored.FolderRun.read(run).each(Trained)[-1]
    path = run / rng.choice(sorted(trained.files))
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    drill.resume(run).wait(1, [str(path), "checksum", f"delete {path.parent}"])
    shutil.rmtree(path.parent)
    return run


def second_process(drill: Drill, name: str, share: float, rng: random.Random) -> Path:
    """It is refused. The first process, which is halted meanwhile, is unharmed."""
    process = drill.start(name)
    process.at(drill.moment(share))
    process.signal(signal.SIGSTOP)
    try:
        if not process.child.is_alive():
            raise Late
        drill.resume(process.run).wait(2, ["another process is running it"])
    finally:
        process.signal(signal.SIGCONT)
    process.wait(0)
    return process.run


CASES: dict[Fault, Callable[[Drill, str, float, random.Random], Path]] = {
    "kill": kill,
    "kill twice": kill_twice,
    "ctrl-c": ctrl_c,
    "sigterm": sigterm,
    "full disk": full_disk,
    "torn events": torn_events,
    "flipped byte": flipped_byte,
    "second process": second_process,
}
"""Each starts a run, damages it at a share of its time, and returns its folder."""


def tried(n: int, fault: Fault) -> int:
    """Number of cases of a fault. A third of n kills comes twice in a row. Any other fault has a tenth of n cases, at
    least one."""
    return {"kill": n - n // 3, "kill twice": n // 3}.get(fault, max(1, n // 10))


def main(
    n: int = 100,
    seed: int = 0,
    faults: tuple[Fault, ...] = get_args(Fault),
    dtype: Literal["float32", "bfloat16"] = "float32",
    out: Path = Path("out/diag"),
) -> int:
    """Exit status 1 if anything was lost. The lost runs are kept beside the table.

    Args:
        n: Kills, a third of them twice in a row. Each other fault is tried a tenth as often.
        seed: Seed of the moments, which are spread evenly over the untouched run.
        faults: Faults to try.
        dtype: Of the weights. With bfloat16 the batch size of the texts is the default one.
        out: Folder of the table as JSON.
    """
    rows: list[dict[str, Any]] = []
    why: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        torch.set_num_threads(1)  # a process that has started threads must not be forked
        drill = Drill(Path(folder), dtype)

        def case(fault: Fault, i: int) -> str:
            name = f"{fault.replace(' ', '_')}_{i}"
            rng = random.Random(f"{seed}/{fault}/{i}")
            try:
                drill.finish(CASES[fault](drill, name, (i + rng.random()) / tried(n, fault), rng))
                end = "survived"
            except Late:
                end = "late"
            except Lost as lost:
                end = str(lost)
                shutil.copytree(drill.folder / name, out / "lost" / name, dirs_exist_ok=True)
            print(f"{name}: {end}", file=sys.stderr)
            return end

        for fault in faults:
            began = time.monotonic()
            ends = [case(fault, i) for i in range(tried(n, fault))]
            seconds = (time.monotonic() - began) / max(1, len(ends))
            why[fault] = [end for end in ends if end not in ("survived", "late")]
            late = ends.count("late")
            counts = {"tried": len(ends) - late, "survived": ends.count("survived"), "lost": len(why[fault])}
            rows.append({"fault": fault, **counts, "too late": late, "seconds per case": seconds})
    should = (
        "lost be 0 in every row: the run ended with the events, adapters, vectors and hash chain of one that was never "
        "touched.",
    )
    show(__doc__, rows, should, out, "fault_drill", seed=seed, n=n, why=why)
    n_lost = sum(row["lost"] for row in rows)
    if n_lost:
        print_safe(f"error: {n_lost} runs were lost; they are in {out / 'lost'}", sys.stderr)
    return 1 if n_lost else 0


if __name__ == "__main__":
    sys.exit(cli(main))
