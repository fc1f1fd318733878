"""One run: the loop of loop.py with its events and files on disk, or the rest of a run that was stopped."""

from __future__ import annotations

import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from shutil import rmtree
from typing import IO, Any

import torch
from loguru import logger
from safetensors import SafetensorError

from steer_heal import report
from steer_heal import round as steps
from steer_heal.backends.track import Tracking
from steer_heal.check import holds_files
from steer_heal.errors import UserError, print_safe
from steer_heal.inputs import Inputs
from steer_heal.loop import Loop, OnBatch, OnPart
from steer_heal.model.device import device_name
from steer_heal.model.lm import LM, unwatched, weights_digest
from steer_heal.model.memory import ran_out
from steer_heal.model.steering import Vector
from steer_heal.model.student import Factors, Student
from steer_heal.records import Collected, HealReport, NotFinite
from steer_heal.report import console, measurements
from steer_heal.runs import events
from steer_heal.runs.checkpoint import WrittenTexts, checkpoint_name, load_heal, save_heal
from steer_heal.runs.resume import (
    in_recorded_dtype,
    lock_new_run,
    partial_path,
    run_start,
    same_weights,
    truncate_events,
)
from steer_heal.runs.signals import handled, stoppable
from steer_heal.runs.storage import atomic_folder, atomic_write, checksums, damaged_file, lock_run, sync_folder
from steer_heal.settings import HealCfg, RunConfig
from steer_heal.share.card import write_cards, write_export_card
from steer_heal.stages.generate import Known
from steer_heal.stages.heal import HealState


def open_session(cfg: RunConfig, preset: str, inputs: Inputs, folder: Path | None = None) -> Session:
    """Loads the model; makes a run folder and writes run_start, or opens the `folder` of a run that was stopped."""
    if cfg.n_threads:
        torch.set_num_threads(cfg.n_threads)
    console.start(cfg.quiet)
    lock = None if folder is None else lock_run(folder)
    if folder is None and cfg.folder is not None:
        lock = lock_new_run(cfg.folder)
    logger.info(f"loading {cfg.model}")
    lm = steps.load_model(cfg if folder is None else in_recorded_dtype(cfg, folder))
    weights = weights_digest(lm.model)
    past: list[events.Event] = []
    if folder is not None:
        same_weights(run_start(folder), weights, folder)
        past = truncate_events(folder)
    else:
        folder = cfg.folder or events.new_run_folder(cfg.out, f"{preset}-{inputs.trait.name}-s{cfg.seed}")
    lock = lock or lock_run(folder)
    console.start(cfg.quiet, folder / "run.log")
    session = Session(cfg, inputs, lm, folder, past, lock)
    if past:
        logger.info(f"continues {folder} after {console.step_name(past[-1])}")
    else:
        logger.info(f"{cfg.model} is in {weights['dtype']} on {lm.device}: {lm.why_dtype}")
        facts = {"versions": events.versions(), "git_commit": events.git_commit(), "device": device_name(lm.device)}
        facts |= {"unadapted": session.student.adapter.unadapted(), "inputs": dict(inputs.sha256)}
        facts |= {"settings": cfg.fingerprint(), "base_model": lm.base, "weights": weights}
        own = {"folder": str(folder), "preset": preset, "command": ["steer-heal", "run", *sys.argv[1:]]}
        session.write("run_start", None, **own, **session.facts(), **facts)
    return session


class Session(Loop):
    """A loop whose events, texts, vectors and students are on disk, so that a run that was killed can go on."""

    save_every_s = 60.0
    """Seconds between checkpoints of a running heal."""

    def __init__(
        self, cfg: RunConfig, inputs: Inputs, lm: LM, folder: Path, past: Sequence[events.Event], lock: IO[str]
    ) -> None:
        super().__init__(cfg, inputs, Student(lm, cfg.adapter))
        self.folder, self.lock = folder, lock
        self.tracking = Tracking(cfg.track, folder, events.jsonable(cfg)[0], past)
        self.log = events.EventLog(folder, past[-1]["wall_s"] if past else 0.0, self.tracking.see)
        self.events = events.current([event for event in past if event["stage"] != "heal_step"])

    def write(self, stage: str, r: int | None, **fields: Any) -> events.Event:
        event = self.log.write(stage, r, **fields)
        if r is not None:  # what was done in parts is in the event now
            partial_path(self.folder, stage, r).unlink(missing_ok=True)
        self.events.append(event)
        console.show(event, self.events)
        return event

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        began = time.monotonic()
        with super().timed(stage):
            yield
        logger.debug(f"{stage}: {time.monotonic() - began:.1f} s")

    @contextmanager
    def watched(self, stage: str, r: int, doing: str) -> Iterator[OnPart]:
        """Times a stage behind a bar that the model's batches advance."""
        what, lm = f"{console.place(stage, r, self.events)}: {doing}", self.student.lm
        with super().watched(stage, r, doing), console.progress(what, self.cfg.quiet) as self.bar:
            lm.progress = self.bar.at
            try:
                yield self.bar.part
            finally:
                lm.progress = unwatched

    def _vector_path(self, r: int) -> Path:
        return self.folder / "vectors" / f"r{r}.safetensors"

    def _keep_vector(self, r: int, vector: Vector) -> dict[str, Any]:
        with atomic_write(self._vector_path(r)) as part:
            vector.save(part)
        return {"files": checksums(self.folder, self._vector_path(r))}

    def _read_vector(self, r: int, event: events.Event) -> Vector:
        self._require_intact(event, "restore the file, or start a new run")
        return Vector.load(self._vector_path(r))

    @contextmanager
    def _writing(self, stage: str, r: int) -> Iterator[tuple[Known, OnBatch]]:
        """Every finished batch is on disk before the next one begins."""
        with closing(WrittenTexts(partial_path(self.folder, stage, r))) as written:
            yield written.known, written.add

    def _checkpoint(self, r: int) -> Path:
        return self.folder / checkpoint_name(r)

    def _keep_student(self, r: int, own: Factors) -> dict[str, Any]:
        path = self._checkpoint(r)
        with atomic_folder(path) as part:
            self.student.save(part, own)
        return {"checkpoint": checkpoint_name(r), "files": checksums(self.folder, *path.iterdir())}

    def _restore_student(self, r: int, event: events.Event) -> None:
        path = self._checkpoint(r)
        self._require_intact(event, f"restore the file, or delete {path} to have that heal done again")
        self.student.restore(path, max(1, r + 1))

    def _attempt(self, r: int, collected: Collected, heal_cfg: HealCfg) -> HealReport:
        path, saved_at = partial_path(self.folder, "heal", r), time.monotonic()
        cfg, saved = replace(self.cfg, heal=heal_cfg), load_heal(path)

        def on_step(state: HealState) -> None:
            nonlocal saved_at
            self.student.lm.progress = unwatched  # from here on the bar counts steps, not the rows that they read
            self.bar.at(len(state.steps), state.n_steps)
            self.log.write("heal_step", r, **asdict(state.steps[-1]))
            due = time.monotonic() - saved_at >= self.save_every_s
            between = r < 0 or not heal_cfg.refresh_every or len(state.steps) % heal_cfg.refresh_every == 0
            if due and between:  # the text of the steps since then cannot be written again
                save_heal(path, state.saved())
                saved_at = time.monotonic()

        vector = self.vectors[r] if r >= 0 else None
        try:
            return steps.heal(self.student, collected, self.inputs, cfg, r, vector, on_step, saved)
        except NotFinite:
            path.unlink(missing_ok=True)
            sync_folder(self.folder / "partial")  # the second attempt must not find the file of the first
            self.student.discard_round()
            raise

    def _forget_round(self, r: int) -> None:
        if r == 0:
            self.student.reset()
        else:
            self.student.restore(self._checkpoint(r - 1), r)

    def finish(self) -> None:
        """Verdict, pictures, the row of results.tsv and, where one was asked for, the merged model."""
        if self.recorded("run_end", None) is None:
            verdict, table = measurements.verdict(self.events), measurements.table(self.events)
            self.write("run_end", None, verdict=verdict, table=table)
        complete(self.folder, self.cfg)
        self.tracking.pictures([self.folder / "trajectory.png", self.folder / "map.png"])
        if self.cfg.export is not None and not holds_files(self.cfg.export):
            with atomic_folder(self.cfg.export) as part:
                self.student.export(part)
            with _not_ending(self.folder):
                write_export_card(self.folder, self.cfg.export)
        console.print_table(self.events)
        print_safe(f"read {self.folder / 'report.html'} first; everything of this run is in {self.folder}")

    def draw(self) -> None:
        with self.timed("draw"):
            draw(self.folder)

    def _require_intact(self, event: events.Event, fix: str) -> None:
        if (damage := damaged_file(self.folder, event["files"])) is not None:
            raise UserError(f"{damage}; {fix}")


@contextmanager
def _not_ending(folder: Path) -> Iterator[None]:
    """What is drawn and told of a run must not end it."""
    try:
        yield
    except Exception as error:
        logger.warning(f"nothing was drawn ({error}); `steer-heal report {folder}` tries again")


def draw(folder: Path) -> None:
    """The pictures, the page and the model cards so far."""
    with _not_ending(folder):
        report.draw(folder)
        write_cards(folder)


def complete(folder: Path, cfg: RunConfig) -> None:
    """What follows from the events of a finished run: its pictures and its row of results.tsv. It can be repeated."""
    draw(folder)
    past = events.current(events.read_events(folder))
    healed = {event["checkpoint"] for event in events.of_stage(past, "heal")}
    for path in (folder / "ckpt").glob("r*"):
        if f"ckpt/{path.name}" not in healed:
            rmtree(path)  # of a round that was dropped
    own = {"run": folder.resolve().name, "arm": cfg.arm or past[0]["preset"], "settings": cfg.fingerprint()}
    row = {**own, **measurements.result_row(past), "last_hash": events.last_hash(folder)}
    events.append_result(folder.resolve().parent, row)
    rmtree(folder / "partial", ignore_errors=True)


def guard(session: Session, loop: Callable[[Session], None]) -> int:
    """Run the loop; return the exit status.

    On a user error, interrupt, out-of-memory or full disk: log why, and print how to resume.
    """
    try:
        with stoppable():
            loop(session)
        return 0
    except UserError as error:
        return _stop(session, 1, f"error: {error}", str(error), resumable=error.resumable)
    except KeyboardInterrupt as stopped:
        return _stop(session, getattr(stopped, "status", 130), "stopped", "interrupted")
    except RuntimeError as error:
        if not ran_out(error):
            raise
        fix = "lower --gen.batch-size, --eval.batch-size or --heal.tokens-per-pass"
        return _stop(session, 1, f"error: out of memory; {fix} ({str(error).splitlines()[0]})", "out of memory")
    except (OSError, SafetensorError) as error:
        return _stop(session, 1, f"error: could not write to {session.folder}: {error}; free some space", None)
    finally:
        session.log.close()
        session.tracking.close()
        session.lock.close()


def _stop(session: Session, status: int, message: str, error: str | None, *, resumable: bool = True) -> int:
    """Prints why the run ends and how to continue, and records why. A disk that is full must not hide the message."""
    command = f"\ncontinue with: steer-heal resume {shlex.quote(str(session.folder))}"
    with handled(signal.SIG_IGN), suppress(OSError):
        print_safe(message + command * resumable, sys.stderr)
        if error is not None and session.recorded("run_end", None) is None:
            session.log.last_hash = events.last_hash(session.folder)  # the write of an event may have been interrupted
            session.log.write("run_end", None, error=error)
    return status
