"""A run with what belongs to its events: vectors, students, and what an unfinished stage has done so far.

`FolderRun` keeps it on disk, so that a run that was killed can be resumed; `MemoryRun` keeps it in memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from functools import cached_property
from pathlib import Path
from shutil import rmtree

from steer_heal.errors import UserError
from steer_heal.events import AnyEvent, Dropped, Extracted, Files, Gathered, Run, RunEnd, Trained
from steer_heal.model.steering import Vector
from steer_heal.model.student import Factors, Student
from steer_heal.records import round_label
from steer_heal.runs.log import EventLog, last_hash, read_events
from steer_heal.runs.partial import (
    ASKED,
    PARTIAL,
    KeptAnswers,
    WrittenTexts,
    heal_path,
    load_heal,
    save_heal,
    texts_path,
)
from steer_heal.runs.storage import atomic_folder, atomic_write, checksums, damaged_file, part_of, sync_folder
from steer_heal.stages.generate import Known, OnBatch
from steer_heal.stages.heal import HealState, SavedHeal

SAVE_EVERY_S = 60.0
"""Seconds between two saves of a running heal."""


def checkpoint_name(r: int | None) -> str:
    """Folder of the student after round r, or of the control, within the run's."""
    return f"ckpt/{round_label(r)}"


def vector_name(r: int) -> str:
    """File of the steering vector of round r, within the run's folder."""
    return f"vectors/r{r}.safetensors"


class MemoryRun(Run):
    """Keeps everything in memory. It ends with the process."""

    def __init__(self, events: Iterable[AnyEvent] = ()) -> None:
        super().__init__(events)
        self._vectors: dict[int, Vector] = {}
        self._students: dict[int | None, tuple[Factors, Factors]] = {}

    def keep_vector(self, r: int, vector: Vector) -> Files:
        self._vectors[r] = vector
        return {}

    def vector(self, r: int) -> Vector:
        return self._vectors[r]

    def keep_student(self, r: int | None, student: Student, own: Factors) -> tuple[str | None, Files]:
        before = None if r is None else self._students.get(r - 1)
        self._students = {r: (student.history(), own)}
        if r is not None and before is not None:  # a dropped round goes back to it
            self._students[r - 1] = before
        return None, {}

    def restore_student(self, r: int | None, student: Student) -> None:
        history, _ = self._students[r]
        student.take(history, 1 if r is None else r + 1)

    def own_factors(self, r: int) -> Factors:
        """The factors that round r added."""
        return self._students[r][1]

    @contextmanager
    def writing(self, r: int | None) -> Iterator[tuple[Known, OnBatch]]:
        yield (), lambda batch: None

    def saved_heal(self, r: int | None) -> SavedHeal | None:
        return None

    def save_heal(self, r: int | None, state: HealState) -> None:
        """In memory, a heal that stops starts again."""

    def forget_heal(self, r: int | None) -> None:
        """Nothing was saved."""


class FolderRun(Run):
    """A run folder. `read` opens it; a run that goes on also has a `log`."""

    def __init__(self, folder: Path, events: Iterable[AnyEvent] = (), log: EventLog | None = None) -> None:
        super().__init__(events)
        self.folder = folder
        self.log = log
        self._saved_at = time.monotonic()

    @classmethod
    def read(cls, folder: Path) -> FolderRun:
        """UserError where the folder holds no run, or its events are not as this version writes them."""
        return cls(folder, read_events(folder))

    def add(self, event: AnyEvent) -> None:
        """Writes the event to disk before anyone is told."""
        assert self.log is not None, "this run was opened to be read"
        written = self.log.write(event)
        if isinstance(written, Gathered):  # what was done in parts is in the event now
            texts_path(self.folder, written.round).unlink(missing_ok=True)
        elif isinstance(written, Trained):
            self.forget_heal(written.round)
        super().add(written)

    def end_with(self, error: str, *, resumable: bool) -> None:
        """Records why the run stopped, and whether it can go on. The write of another event may have been
        interrupted."""
        assert self.log is not None
        self.log.last_hash = last_hash(self.folder)
        self.log.write(RunEnd(error=error, resumable=resumable))

    def require_in_place(self) -> None:
        """UserError where the folder was moved since the run began to write: its files would be split between two
        places."""
        if self.log is not None:
            self.log.require_in_place()

    def close(self) -> None:
        """Nothing more is written."""
        if self.log is not None:
            self.log.close()

    def intact(self, files: Files, fix: str) -> None:
        """UserError where a file is not as an event recorded it. `fix` says what to do."""
        if (damage := damaged_file(self.folder, files)) is not None:
            raise UserError(f"{damage}; {fix}")

    @cached_property
    def cache(self) -> KeptAnswers:
        """What evals keep between measurements."""
        return KeptAnswers(self.folder / ASKED)

    # --- vectors and students ------------------------------------------------------------------------------------
    def keep_vector(self, r: int, vector: Vector) -> Files:
        """Writes the vector of round r; returns the checksum of its file."""
        self.require_in_place()
        path = self.folder / vector_name(r)
        with atomic_write(path) as part:
            vector.save(part)
        return checksums(self.folder, path)

    def vector(self, r: int) -> Vector:
        """The vector of round r. UserError where its file is gone or was changed."""
        self.intact(self.require(Extracted, r).files, "restore the file, or start a new run")
        return Vector.load(self.folder / vector_name(r))

    def keep_student(self, r: int | None, student: Student, own: Factors) -> tuple[str | None, Files]:
        """Writes the student after round r, with the factors that the round added; returns its folder's name and the
        checksums of its files."""
        self.require_in_place()
        path = self.folder / checkpoint_name(r)
        with atomic_folder(path) as part:
            student.save(part, own)
        return checkpoint_name(r), checksums(self.folder, *path.iterdir())

    def checkpoint(self, r: int | None) -> Path:
        """Folder of the student after round r, or of the control. UserError where it is gone or was changed."""
        path = self.folder / checkpoint_name(r)
        repeated = self.end is None and not self.dead_end and self.each(Trained)[-1].round == r
        fix = "restore the file, or give another --round"
        fix += f", or delete {path} and resume the run: that heal is then repeated" if repeated else ""
        self.intact(self.require(Trained, r).files, fix)
        return path

    def restore_student(self, r: int | None, student: Student) -> None:
        student.restore(self.checkpoint(r), 1 if r is None else r + 1)

    # --- unfinished stages ---------------------------------------------------------------------------------------
    @contextmanager
    def writing(self, r: int | None) -> Iterator[tuple[Known, OnBatch]]:
        """(texts that are on disk already, what is called with each batch of new ones). Every finished batch is on disk
        before the next one begins."""
        self.require_in_place()
        with closing(WrittenTexts(texts_path(self.folder, r))) as written:
            yield written.known, written.add

    def saved_heal(self, r: int | None) -> SavedHeal | None:
        self._saved_at = time.monotonic()
        return load_heal(heal_path(self.folder, r))

    def save_heal(self, r: int | None, state: HealState) -> None:
        """Saves a running heal, at most once every SAVE_EVERY_S seconds."""
        if time.monotonic() - self._saved_at >= SAVE_EVERY_S:
            self.require_in_place()
            save_heal(heal_path(self.folder, r), state.saved())
            self._saved_at = time.monotonic()

    def forget_heal(self, r: int | None) -> None:
        """Removes what was saved of a heal."""
        path = heal_path(self.folder, r)
        if path.exists():
            path.unlink()
            sync_folder(path.parent)

    def clear(self) -> None:
        """Removes the checkpoints of dropped rounds, what is half written, and what was saved of unfinished stages.
        Other files in these folders are the user's."""
        kept = {event.checkpoint for event in self.each(Trained)}
        dropped = {checkpoint_name(event.round) for event in self.each(Dropped)}
        names = [checkpoint_name(r) for r in (None, *range(self.n_rounds))]
        for path in [self.folder / name for name in dropped - kept] + [part_of(self.folder / name) for name in names]:
            if not path.is_symlink():
                rmtree(path, ignore_errors=True)
        rmtree(self.folder / PARTIAL, ignore_errors=True)


StoredRun = MemoryRun | FolderRun
