"""Reading and parsing of data files. Errors name the file, the line and the fix."""

from __future__ import annotations

import hashlib
import json
import tomllib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field

from steer_heal.errors import Problems, UserError, validated_json

PACKAGE = Path(__file__).resolve().parents[1]
"""The folder of this package."""
DATA = PACKAGE / "data" if (PACKAGE / "data").is_dir() else PACKAGE.parents[1] / "data"
"""The shipped data files: inside an installed package, at the top of a checkout (setup.py maps one to the other)."""
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
    """The content of a text file. It is parsed and hashed from the same bytes."""

    path: Path
    text: str
    sha256: str


@dataclass(frozen=True)
class TextRow:
    """A row of a file of prompts or contexts."""

    text: Text


def candidates(path: Path | str, folder: Path = Path()) -> list[Path]:
    """Where a path from the settings may lie, best first: in `folder`, and `data/...` also among the shipped files."""
    shipped = [DATA.parent / path] if Path(path).parts[:1] == ("data",) else []
    return [folder / path, *shipped]


def is_path(model: str) -> bool:
    """Whether the name of a model can only be a path on this machine. Any other name may be on the hub."""
    return model.startswith((".", "/", "~")) or model.endswith(".gguf") or model.count("/") > 1


def adapter_folder(model: str) -> Path | None:
    """The folder of a model that holds an adapter alone. None: it holds none. UserError if it also holds a model, to
    whose weights transformers would add an adapter that they may contain already."""
    for folder in candidates(model):
        with suppress(OSError, ValueError):  # as in `resolve`
            if any((folder / name).is_file() for name in ADAPTER_CONFIG_FILES):
                if not (folder / "config.json").is_file():
                    return folder
                raise UserError(
                    f"model is {model!r}: that folder holds a model and an adapter, which would act on top of the "
                    "weights; move the adapter's files to a folder of their own, and give one of the two"
                )
    return None


def adapter_base(folder: Path) -> str:
    """The model that an adapter names as its base. UserError if it names none."""
    for name in ADAPTER_CONFIG_FILES:
        with suppress(OSError, ValueError, AttributeError):
            found = json.loads((folder / name).read_text(encoding="utf-8"))
            base = found.get("base_model_name_or_path") or found.get("base_model")
            if isinstance(base, str) and base and Path(base).absolute() != folder.absolute():
                return base
    raise UserError(
        f"the adapter in {str(folder)!r} names no base model; add base_model_name_or_path to its settings file"
    )


def resolve(path: Path | str, setting: str, folder: Path = Path()) -> Path:
    """The first candidate that is a file. Raises a UserError that names the setting if there is none."""
    for candidate in candidates(path, folder):
        with suppress(OSError, ValueError):  # the name is too long or holds a zero byte, or its folder is closed to us
            if candidate.is_file():
                return candidate
    raise UserError(f"{setting} is {str(path)!r}: there is no such file; give an existing path")


def read_file(path: Path) -> DataFile:
    """Reads a UTF-8 file, with or without a byte order mark. UserError that names the line if it is not UTF-8."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a readable file") from None
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path} line {number} is not UTF-8 (byte {content[error.start]:#04x}); save it as UTF-8"
        ) from None
    return DataFile(path, text, hashlib.sha256(content).hexdigest())


def parse_jsonl(file: DataFile, kind: type[Row]) -> list[tuple[int, Row]]:
    """(line number, row) for each line of a JSON-lines file that is not blank. UserError that names each invalid
    line."""
    rows = []
    problems = Problems()
    for number, line in enumerate(file.text.split("\n"), start=1):
        if line.strip():
            with problems.noted():
                rows.append((number, validated_json(kind, line, f"{file.path} line {number}")))
    problems.raise_if_any()
    if not rows:
        raise UserError(f"{file.path} has no rows; it needs at least one")
    return rows


def parse_texts(file: DataFile) -> tuple[str, ...]:
    """The field `text` of each JSON line."""
    return tuple(row.text for _, row in parse_jsonl(file, TextRow))


DEEPEST = 20
"""Tables and lists within each other in a TOML file."""


def parse_toml(file: DataFile) -> dict[str, Any]:
    """The content of a TOML file. UserError if it is not valid, or its tables are nested deeper than DEEPEST."""
    try:
        table = tomllib.loads(file.text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file.path} is not valid TOML: {error}") from None
    level: list[Any] = [table]
    for _ in range(DEEPEST):
        level = [item for holder in level for item in (holder.values() if isinstance(holder, dict) else holder)]
        level = [item for item in level if isinstance(item, dict | list)]
    if level:
        raise UserError(f"{file.path} holds tables nested more than {DEEPEST} deep; write them flat")
    return table
