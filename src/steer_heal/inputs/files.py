"""Reads data files, each once: errors name the file, the line and the fix."""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field

from steer_heal.errors import Problems, UserError, validated_json

PACKAGE = Path(__file__).resolve().parents[1]
"""The installed package, whose `data` is part of it: relative paths are looked up here when they do not exist in the
working directory."""
ADAPTER_FILE = "adapter_model.safetensors"
"""The weights in the folder of a saved adapter."""
PEFT_CONFIG_FILE = "adapter_config.json"
OWN_CONFIG_FILE = "steer_heal_adapter.json"
"""The settings of an adapter of a kind that PEFT does not know. It names the `kind`."""
ADAPTER_CONFIG_FILES = (PEFT_CONFIG_FILE, OWN_CONFIG_FILE)
"""One of them lies beside the weights."""
Text = Annotated[str, Field(min_length=1)]
Row = TypeVar("Row")


@dataclass(frozen=True)
class DataFile:
    """A text file as it was read: what is parsed and what is hashed are the same bytes."""

    path: Path
    text: str
    sha256: str


@dataclass(frozen=True)
class TextRow:
    """A row of prompts or contexts."""

    text: Text


def resolve(path: Path | str, what: str, folders: Sequence[Path] = (Path(), PACKAGE)) -> Path:
    """The file in the first of the folders that has it. UserError naming `what` (a setting) where none has."""
    for folder in folders:
        with suppress(OSError, ValueError):  # a name that is too long, a zero byte, a folder that may not be entered
            if (candidate := folder / path).is_file():
                return candidate
    raise UserError(f"{what} is {str(path)!r}: there is no such file; give an existing path")


def read_file(path: Path) -> DataFile:
    """A UTF-8 file, with or without a byte order mark. UserError naming the line that is not UTF-8."""
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a file that can") from None
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path} line {number} is not UTF-8 (byte {content[error.start]:#04x}); save it as UTF-8"
        ) from None
    return DataFile(path, text, hashlib.sha256(content).hexdigest())


def parse_jsonl(file: DataFile, kind: type[Row]) -> list[tuple[int, Row]]:
    """(line number, row) of a JSON-lines file; blank lines are skipped. UserError naming every bad line."""
    rows, problems = [], Problems()
    for number, line in enumerate(file.text.split("\n"), start=1):
        if line.strip():
            with problems.noted():
                rows.append((number, validated_json(kind, line, f"{file.path} line {number}")))
    problems.raise_if_any()
    if not rows:
        raise UserError(f"{file.path} holds no rows; it needs at least one")
    return rows


def parse_texts(file: DataFile) -> tuple[str, ...]:
    """The texts of JSON lines with `text`."""
    return tuple(row.text for _, row in parse_jsonl(file, TextRow))


def parse_toml(file: DataFile) -> dict[str, Any]:
    try:
        return tomllib.loads(file.text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file.path} is not TOML: {error}") from None
