"""Reading the project's data files: where they lie, and errors that name the file, the line and the fix."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from steer_heal.records import Problems, UserError

ROOT = Path(__file__).resolve().parents[2]
"""The checkout: relative data paths are looked up here when they do not exist in the working directory."""
HALF_PAIR = re.compile("[\ud800-\udfff]")


def resolve(path: Path | str, what: str) -> Path:
    """The file itself; UserError naming `what` (a flag) where there is none."""
    for candidate in (Path(path), ROOT / path):
        with suppress(OSError):  # a name that is too long, a folder that may not be entered
            if candidate.is_file():
                return candidate
    raise UserError(f"{what} is {str(path)!r}: there is no such file; give an existing path")


def read_text(path: Path) -> str:
    """A UTF-8 file, with or without a byte order mark; UserError naming the line that is not."""
    try:
        content = path.read_bytes()
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a file that can") from None
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path} line {number} is not UTF-8 (byte {content[error.start]:#04x}); save the file as UTF-8") from None


def read_jsonl(path: Path, required: Mapping[str, type]) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file, each with its `line` and `required` fields of the given types; blank lines are skipped.

    UserError naming every line that is none.
    """
    rows, problems = [], Problems()
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            with problems.noted():
                rows.append(_row(f"{path} line {number}", line, required) | {"line": number})
    problems.complain()
    if not rows:
        raise UserError(f"{path} holds no rows; it needs at least one")
    return rows


def _row(where: str, line: str, required: Mapping[str, type]) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}); mend or delete the line") from None
    if not isinstance(row, dict):
        raise UserError(f"{where} is {type(row).__name__}: it must be a JSON object")
    problems = Problems()
    for name, kind in required.items():
        value = row.get(name)
        if not isinstance(value, kind) or value == "":
            problems.found.append(f"{where}: field {name!r} is {value!r:.80}: it must be a {kind.__name__}{' with text' * (kind is str)}")
        elif kind is str and HALF_PAIR.search(value):
            problems.found.append(f"{where}: field {name!r} is {value!r:.80}: it holds half of a surrogate pair, which no tokenizer takes; delete it")
    problems.complain()
    return row


def read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not TOML: {error}") from None


def check_fields(where: str, table: Mapping[str, Any], fields: Mapping[str, type]) -> None:
    """UserError unless every field is there and of its kind (a list holds strings), and no other: a misspelt one would be ignored."""
    problems = Problems()
    for name in table:
        if name not in fields:
            near = get_close_matches(name, fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the fields are {', '.join(fields)}"
            problems.found.append(f"{where}: {name!r} is not a field here; {hint}")
    for name, kind in fields.items():
        value = table.get(name)
        if type(value) is not kind or (kind is list and not all(isinstance(item, str) for item in value)):
            problems.found.append(f"{where}: {name!r} is {value!r:.80}: it must be a {'list of strings' if kind is list else kind.__name__}")
    problems.complain()


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
