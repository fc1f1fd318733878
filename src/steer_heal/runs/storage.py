"""Files that are whole or not there: atomic writes, appended lines, checksums, and the lock of a run folder."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import rmtree
from typing import IO, Any

from steer_heal.errors import UserError


def part_of(path: Path) -> Path:
    """Where a file or folder is until it is whole."""
    return path.with_name(f".{path.name}.part")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A name to write a file to. It is flushed and renamed to `path` when the block ends, and removed by an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(path)
    try:
        yield part
        _finish(part)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A new folder to write files to. It is flushed and renamed to `path` at the end, in place of an old one, and
    removed by an error."""
    part = part_of(path)
    rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        for entry in part.rglob("*"):
            (sync_folder if entry.is_dir() else _finish)(entry)
        sync_folder(part)
    except BaseException:
        rmtree(part, ignore_errors=True)
        raise
    rmtree(path, ignore_errors=True)  # from here on the new folder is the only one, and stays
    part.rename(path)
    sync_folder(path.parent)


def _finish(path: Path) -> None:
    """Flushes a file and gives it the mode of a new one: safetensors writes its own as readable by their owner only."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """New, renamed and removed names of a folder are on disk when this returns, where the platform can do it."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def append_line(file: io.FileIO, value: Any) -> bytes:
    """Appends one JSON line to an unbuffered file and returns it. It is on disk when this returns.

    One write, which no signal can cut; where the disk is full, the part that was written is removed.
    """
    end = os.fstat(file.fileno()).st_size
    line = json.dumps(value, allow_nan=False).encode() + b"\n"
    try:
        if file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file.fileno())
    except OSError:
        file.truncate(end)
        raise
    return line


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums(folder: Path, *paths: Path) -> dict[str, str]:
    """SHA-256 of files by their name within `folder`."""
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(paths)}


def damaged_file(folder: Path, expected: Mapping[str, str]) -> str | None:
    """What is wrong with the first file that is not what `checksums` saw; None: all are as recorded."""
    for name, digest in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if sha256(path) != digest:
            return f"{path} is damaged: its checksum is not the recorded one"
    return None


def lock_run(folder: Path) -> IO[str]:
    """The lock of a run folder, held until the file is closed. UserError if another process has it."""
    lock = (folder / ".lock").open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise UserError(f"{folder} is in use: another process is running it; wait for it, or stop it") from None
    return lock


def in_use(folder: Path) -> bool:
    """Whether a process holds the lock of a run's folder."""
    try:
        lock_run(folder).close()
    except UserError:
        return True
    return False
