"""The settings of a run as a file: TOML that `--print-config` writes, or the recorded settings of an earlier run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import tomli_w

from steer_heal.errors import validated
from steer_heal.inputs.files import parse_toml, read_file, resolve
from steer_heal.runs.events import jsonable
from steer_heal.settings import RunConfig

HEADING = "# steer-heal run --config FILE; a setting that is left out has its default, which for some is none\n"


def as_toml(cfg: RunConfig) -> str:
    """Every setting. TOML has no null: what is None is left out, and None is the default of all that can be it."""
    return HEADING + tomli_w.dumps(_without_none(jsonable(asdict(cfg))[0]))


def read_config(path: Path) -> tuple[str, RunConfig]:
    """(name, settings) of a TOML file, named by its stem, or of the folder of an earlier run, named by its preset.

    UserError with a line for each field that is not a setting, or has no valid value.
    """
    if path.is_dir():
        from steer_heal.runs.resume import run_start  # torch: a file can do without

        start = run_start(path)
        name, found, where = start["preset"], start["config"], f"{path}/events.jsonl config"
    else:
        file = read_file(resolve(path, "config"))
        name, found, where = path.stem, parse_toml(file), str(path)
    return name, validated(RunConfig, found, where)


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    nested = {key: _without_none(value) if isinstance(value, dict) else value for key, value in values.items()}
    return {key: value for key, value in nested.items() if value is not None}
