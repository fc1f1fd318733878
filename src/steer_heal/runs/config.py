"""The settings of a run as a file: TOML that `--print-config` writes, or the recorded settings of an earlier run."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path

import tomli_w

from steer_heal.errors import validated
from steer_heal.events import plain
from steer_heal.inputs.files import parse_toml, read_file, resolve
from steer_heal.runs.log import read_start
from steer_heal.settings import RunConfig

HEADING = "# steer-heal run --config FILE; a setting that is left out has its default, which for some is none\n"


def as_toml(cfg: RunConfig) -> str:
    """Every setting. TOML has no null: what is None is left out, and None is the default of all that can be it."""
    return HEADING + tomli_w.dumps(_without_none(plain(cfg)))


def read_config(path: Path) -> tuple[str, RunConfig]:
    """(name, settings) of a TOML file, named by its stem, or of the folder of an earlier run, named by its preset.

    UserError with a line for each field that is not a setting, or has no valid value.
    """
    if path.is_dir():
        start = read_start(path)
        return start.preset, start.config
    file = read_file(resolve(path, "config"))
    sections = (getattr(RunConfig(), each.name) for each in fields(RunConfig))
    known = [each.name for section in sections if is_dataclass(section) for each in fields(section)]
    return path.stem, validated(RunConfig, parse_toml(file), str(path), known)


def _without_none(values: object) -> dict[str, object]:
    assert isinstance(values, dict)
    nested = {key: _without_none(value) if isinstance(value, dict) else value for key, value in values.items()}
    return {key: value for key, value in nested.items() if value is not None}
