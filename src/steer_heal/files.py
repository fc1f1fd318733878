"""Reading the project's data files: where they lie, and errors that name the file, the line and the fix."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from steer_heal.records import UserError

ROOT = Path(__file__).resolve().parents[2]
"""The checkout: relative data paths are looked up here when they do not exist in the working directory."""


def resolve(path: Path | str, what: str) -> Path:
    """The file itself; UserError naming `what` (a flag) where there is none."""
    for candidate in (Path(path), ROOT / path):
        if candidate.is_file():
            return candidate
    raise UserError(f"{what} is {str(path)!r}: there is no such file; give an existing path")


def read_jsonl(path: Path, required: Mapping[str, type]) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file, each with its `line` and `required` fields of the given types; blank lines are skipped."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path} line {number} is not JSON ({error}); mend or delete the line") from None
        if not isinstance(row, dict):
            raise UserError(f"{path} line {number} is {type(row).__name__}: it must be a JSON object")
        for name, kind in required.items():
            if not isinstance(row.get(name), kind) or row[name] == "":
                raise UserError(f"{path} line {number}: field {name!r} is {row.get(name)!r}: it must be a {kind.__name__}")
        rows.append({"line": number, **row})
    if not rows:
        raise UserError(f"{path} holds no rows; it needs at least one")
    return rows


def read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not TOML: {error}") from None


def append_line(file: io.FileIO, value: Any) -> None:
    """One JSON line to the end of an unbuffered file, on disk when this returns.

    It is a single write, which no signal cuts in two; what a full disk cut is taken back.
    """
    end, line = os.fstat(file.fileno()).st_size, json.dumps(value, allow_nan=False).encode() + b"\n"
    try:
        if file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file.fileno())
    except OSError:
        file.truncate(end)
        raise


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A name to write to; the file is flushed and renamed to `path` when it is whole, so that nobody ever meets half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    yield part
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Names that were made, changed or removed in a folder are on disk when this returns, where the platform can do it."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def checksums(folder: Path, *paths: Path) -> dict[str, str]:
    """SHA-256 of files by their name within `folder`."""
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(paths)}


def sha256(path: Path) -> str:
    """Of a file, read a piece at a time."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(folder: Path, expected: Mapping[str, str], mend: str) -> None:
    """UserError naming the first file that is not what `checksums` saw, and how to mend it."""
    for name, digest in expected.items():
        path = folder / name
        if not path.is_file() or checksums(folder, path)[name] != digest:
            raise UserError(f"{path} is {'damaged: its checksum is not the recorded one' if path.is_file() else 'missing'}; {mend}")
