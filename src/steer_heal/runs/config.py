"""The settings of a run as a file: TOML that `--print-config` writes, or the recorded settings of an earlier run."""

from __future__ import annotations

import textwrap
from dataclasses import replace
from pathlib import Path

import tomli_w

from steer_heal.errors import validated
from steer_heal.inputs.files import parse_toml, read_file, resolve
from steer_heal.runs.log import read_start
from steer_heal.settings import SECTIONS, RunConfig, as_json

HEADING = "# steer-heal run --config FILE; settings that are left out have their defaults\n"


def as_toml(cfg: RunConfig) -> str:
    """Every setting below its text. TOML has no null, so a setting that is None is left out; None is then also its
    default."""
    section, lines = "", []
    for line in tomli_w.dumps(as_json(cfg, none=False)).splitlines():
        name = line.partition(" = ")[0]
        if line.startswith("["):
            section = line.strip("[]")
        home = getattr(cfg, section) if section in SECTIONS else cfg
        field = home.__dataclass_fields__.get(name) if section in ("", *SECTIONS) else None
        if field is not None:
            lines += [f"# {part}" for part in textwrap.wrap(field.metadata["help"], 110)]
        lines.append(line)
    return HEADING + "\n".join(lines) + "\n"


def read_config(path: Path) -> tuple[str, RunConfig]:
    """(name, settings) of a TOML file, named by its stem, or of the folder of an earlier run, named by its preset,
    without its plugins, which no folder may choose, and without its folder and its place in a sweep.

    UserError with a line for each field that is not a setting, or has no valid value.
    """
    if path.is_dir():
        start = read_start(path)
        return start.preset, replace(start.config, plugin=(), folder=None, arm="", share_base=False)
    file = read_file(resolve(path, "config"))
    return path.stem, validated(RunConfig, parse_toml(file), str(path))
