"""The sweep file, checked as a whole before the first run starts, and the list of runs that it asks for."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass as checked_dataclass

from steer_heal.check import check
from steer_heal.errors import Problems, UserError, validated
from steer_heal.inputs.files import parse_toml, read_file
from steer_heal.inputs.traits import TraitFile
from steer_heal.presets import PRESETS, require_preset
from steer_heal.records import Metric
from steer_heal.settings import Finite, RunConfig, UserPath, changed, leaves
from steer_heal.verdict import health_of

DEFAULTS = leaves(RunConfig())
"""Every setting by its dotted name, with its default."""
OF_THE_SWEEP = {
    "seed": "list it in seeds",
    "out": "give out at the top of the file",
    "folder": "each run gets its own",
    "quiet": "the output of a run goes to its log",
    "chat": "a sweep asks no questions",
}
"""Settings that a file cannot give to its runs, and what to do instead."""
Given = Mapping[str, Any]
"""Values of settings by their dotted names."""
Sources = dict[str, Given]
"""Settings by the table of the file that gives them. A later one takes precedence."""
READABLE = 60
"""Maximum length of the readable part of a folder's name."""
MOST_ARMS = 1000
"""Arms of one file."""


@checked_dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class SweepFile:
    """What a sweep file may hold: `search`, or `runs`, `grid` or both. With both, every run is made at every point of
    the grid. Without any of them it is one arm."""

    preset: str
    seeds: Annotated[tuple[int, ...], Field(min_length=1)]
    out: UserPath | None = None
    """Folder of the runs. Default: out/<name of the file>."""
    fixed: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, Any] = field(default_factory=dict)
    runs: tuple[dict[str, Any], ...] = ()
    search: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Arm:
    """The settings of one run per seed, and how to read their results."""

    label: str
    cfg: RunConfig
    sign: int
    """Direction in which the trait's metric should go."""
    health: tuple[Metric, ...]
    """The metrics that say whether the model is intact."""
    inputs: str
    """Digest of the trait and the data files."""

    @property
    def broken_texts(self) -> str | None:
        """Name of the health metric that should be low: the share of broken texts. None if no eval measures one."""
        return next((metric.name for metric in self.health if metric.is_share and not metric.high_is_good), None)


@dataclass(frozen=True)
class Job:
    """One run of a sweep. Its folder is named by its settings and files, so that the same sweep finds it again."""

    arm: Arm
    preset: str
    cfg: RunConfig
    """The settings of the arm with the seed and the folder of the run, and without the question at its end."""

    @property
    def folder(self) -> Path:
        assert self.cfg.folder is not None
        return self.cfg.folder

    def command(self, n_threads: int = 0) -> list[str]:
        """The arguments of steer-heal that make or resume this run. `n_threads` is used if the settings give none."""
        preset = PRESETS[self.preset][1]
        cfg = replace(self.cfg, n_threads=self.cfg.n_threads or n_threads)
        own = ["--seed", str(cfg.seed), *_flag("folder", self.folder)]
        return ["run", self.preset, *own, *as_flags(cfg, replace(preset, seed=cfg.seed, folder=self.folder))]


@dataclass(frozen=True)
class Plan:
    """A checked sweep file."""

    path: Path
    preset: str
    seeds: tuple[int, ...]
    out: Path
    arms: tuple[Arm, ...]
    """A search has a single arm, without the settings of its trials."""
    search: Search | None
    inputs: str
    """Digest of the trait and data files of all arms and of the ends of a search's ranges."""

    @cached_property
    def jobs(self) -> list[Job]:
        """Every run, the first seed of all arms first. Empty for a search, which proposes its runs one by one."""
        return [] if self.search else [self.job(arm, seed) for seed in self.seeds for arm in self.arms]

    def job(self, arm: Arm, seed: int) -> Job:
        """The run of an arm and a seed. If a folder holds a run of these settings, these files and this seed, it takes
        that folder, whatever its label."""
        end = f"{arm.cfg.fingerprint()}_{arm.inputs}_s{seed}"
        folder = self.out / f"{readable(arm.label) or 'run'}_{end}"
        if not folder.exists():
            folder = next(iter(sorted(self.out.glob(f"*_{end}"))), folder)
        cfg = replace(arm.cfg, seed=seed, folder=folder, arm=arm.cfg.arm or arm.label, chat=False, share_base=True)
        return Job(arm, self.preset, cfg)


def readable(text: str) -> str:
    """The text as part of a file name."""
    return re.sub(r"[^\w.=-]+", "-", text)[:READABLE].strip("-.")


# --- settings as flags -------------------------------------------------------------------------------------------
def as_flags(cfg: RunConfig, preset: RunConfig) -> list[str]:
    """The flags that turn the preset into `cfg`."""
    before = leaves(preset)
    out = []
    for name, value in leaves(cfg).items():
        if value != before[name]:
            out += _flag(name.replace("_", "-"), value)
    return out


def _flag(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        section, dot, key = name.rpartition(".")
        return [f"--{name}" if value else f"--{section}{dot}no-{key}"]
    if isinstance(value, Mapping):
        value = [word for pair in value.items() for word in pair]
    if isinstance(value, list | tuple):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}={value}"] if str(value).startswith("-") else [f"--{name}", str(value)]


# --- the file ----------------------------------------------------------------------------------------------------
def load(path: Path) -> Plan:
    """The plan of a sweep file. UserError with every problem of the file or, if it has none, of the runs that it asks
    for."""
    where = str(path)
    problems = Problems()
    table = parse_toml(read_file(path))
    _require_sweep(table, where)
    file = validated(SweepFile, table, where)
    require_preset(file.preset, f"{where}: ")
    preset = PRESETS[file.preset][1]
    if len({*file.seeds}) < len(file.seeds):
        problems.found.append(f"{where}: seeds is {list(file.seeds)}: a seed is listed twice; list each once")
    for seed in file.seeds:
        problems.attempt(changed, preset, {"seed": seed}, f"{where}: seeds")
    if file.search and (file.grid or file.runs):
        problems.found.append(f"{where} holds search and {'grid' if file.grid else 'runs'}; a search proposes its runs")
    fixed = _named(file.fixed, f"{where}: fixed", problems)
    tables = _tables(file, where, problems)
    search = _search(file.search, where, problems) if file.search else None
    out = file.out or Path("out") / path.stem
    asked: dict[str, RunConfig] = {}
    for label, sources in [*tables, *_ends(search)]:
        if label in asked:
            problems.found.append(f"{where}: two arms are named {label!r}; give each a name of its own")
        sources = {"fixed": fixed, **sources}
        try:
            asked[label] = changed(preset, {name: value for given in sources.values() for name, value in given.items()})
        except UserError as error:
            problems.found += [_placed(line, where, sources) for line in error.problems]
    problems.found = list(dict.fromkeys(problems.found))  # arms share many of their mistakes
    problems.raise_if_any()
    made = {label: problems.attempt(arm_of, label, cfg, out) for label, cfg in asked.items()}  # imports torch
    arms = tuple(arm for label, _ in tables if (arm := made[label]) is not None)
    if not problems.found:
        problems.found += _same_settings(arms, where)
    if search and arms and arms[0].broken_texts is None:
        problems.found.append(f"{where}: no eval measures the share of broken texts; add text_quality to eval.evals")
    problems.found = list(dict.fromkeys(problems.found))
    problems.raise_if_any()
    digests = sorted({arm.inputs for arm in made.values() if arm is not None})
    inputs = hashlib.sha256(" ".join(digests).encode()).hexdigest()[:8]
    return Plan(path, file.preset, file.seeds, out, arms, search, inputs)


def _require_sweep(table: Given, where: str) -> None:
    """UserError for a file of another kind, told by its fields."""
    others = {
        "a trait": (TraitFile, f"steer-heal run PRESET --trait {where}"),
        "settings": (RunConfig, f"steer-heal run --config {where}"),
    }
    for kind, (of, command) in others.items():
        known = table.keys() & {each.name for each in fields(of)}
        if 2 * len(known) > len(table) and not table.keys() & {"preset", "seeds"}:
            raise UserError(f"{where} looks like a file of {kind}, not of a sweep: {command} takes it")


def _placed(line: str, where: str, sources: Sources) -> str:
    """The line of a problem with a setting, with the table of the file that gives this setting."""
    for source, given in reversed(sources.items()):
        for name in given:
            if re.match(rf"([a-z_]+: )?{re.escape(name)}\b", line):
                return f"{where}: {source}: {line}"
    return f"{where}: {line}"


def _same_settings(arms: tuple[Arm, ...], where: str) -> Iterator[str]:
    """A problem for each arm that has the settings of an earlier one."""
    first: dict[str, str] = {}
    for arm in arms:
        other = first.setdefault(arm.cfg.fingerprint(), arm.label)
        if other != arm.label:
            yield f"{where}: {other!r} and {arm.label!r} have the same settings; drop one of them"


def arm_of(label: str, cfg: RunConfig, out: Path) -> Arm:
    """The arm of settings whose runs could start now. UserError with everything that prevents it."""
    inputs = check(replace(cfg, folder=out))
    from steer_heal.evals import metrics_of  # torch: `check` has imported it

    health = tuple(health_of(metrics_of(cfg.eval.evals)))
    return Arm(label, cfg, inputs.trait.sign, health, inputs.digest[:8])


def _tables(file: SweepFile, where: str, problems: Problems) -> list[tuple[str, Sources]]:
    """(label, settings) of every arm, without the fixed settings."""
    runs = [_run(i, table, where, problems) for i, table in enumerate(file.runs, start=1)] or [("", {})]
    grid = _named(file.grid, f"{where}: grid", problems)
    for name, values in list(grid.items()):
        if not isinstance(values, list) or not values:
            problems.found.append(f"{where}: grid: {name} is {values!r}: it must be a list of one or more values")
            del grid[name]
    problems.found += [
        f"{where}: {label}: {name} is given twice, here and in grid; keep one"
        for label, table in runs
        for name in table
        if name in grid
    ]
    n_arms = len(runs) * math.prod(len(values) for values in grid.values())
    if n_arms > MOST_ARMS:
        problems.found.append(f"{where} holds {n_arms} arms, at most {MOST_ARMS} are made; list fewer values")
        return []
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    return [
        (" ".join(filter(None, (name, label_of(point)))) or file.preset, {"runs": table, "grid": point})
        for point in points
        for name, table in runs
    ]


def _run(i: int, table: dict[str, Any], where: str, problems: Problems) -> tuple[str, Given]:
    name = table.pop("name", None)
    if not isinstance(name, str) or not name.strip():
        problems.found.append(f"{where}: run {i} has the name {name!r}; give it a name in words")
        name = f"run {i}"
    return name, _named(table, f"{where}: {name}", problems)


def label_of(point: Given) -> str:
    """`lam=0.3 tau=0.1`: the settings that distinguish an arm."""
    words = []
    for name, value in point.items():
        shown = "+".join(map(str, value)) if isinstance(value, list) else value
        words.append(f"{name.rpartition('.')[2]}={shown}")
    return " ".join(words)


def _named(table: Given, where: str, problems: Problems) -> dict[str, Any]:
    """The table by dotted names. A section may be a table of its own, and names may be written with - as in flags."""
    out: dict[str, Any] = {}
    for key, value in [pair for top in table.items() for pair in leaves(dict([top])).items()]:
        name = key.replace("-", "_")
        if name in OF_THE_SWEEP:
            problems.found.append(f"{where}: {name} cannot be set here; {OF_THE_SWEEP[name]}")
        elif name not in DEFAULTS:
            close = get_close_matches(name, DEFAULTS, n=1)
            fix = f"did you mean {close[0]!r}?" if close else "`steer-heal run toy --help` lists the settings"
            problems.found.append(f"{where}: unknown setting {key!r}; {fix}")
        elif name in out:
            problems.found.append(f"{where}: {name} is given twice; keep one")
        else:
            out[name] = value
    return out


# --- search ------------------------------------------------------------------------------------------------------
@checked_dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Range:
    """The values of a setting that a search may take: low to high, or one of `choices`."""

    low: Finite | None = None
    high: Finite | None = None
    log: bool = False
    """Sample evenly over the logarithm."""
    choices: tuple[str | float | int | bool, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Range:
        bounded = self.low is not None and self.high is not None and self.low < self.high
        if bounded == bool(self.choices) or (self.choices and (self.low is not None or self.high is not None)):
            raise ValueError("it must hold low and high, low < high, or choices")
        if self.log and not (bounded and (self.low or 0) > 0):
            raise ValueError("log needs low > 0 and high")
        return self


@dataclass(frozen=True)
class Search:
    """How many trials are made, and over which settings."""

    n_trials: int
    space: Mapping[str, Range]


def _search(table: Given, where: str, problems: Problems) -> Search:
    n_trials = table.get("n_trials")
    if type(n_trials) is not int or n_trials < 1:
        problems.found.append(f"{where}: search: n_trials is {n_trials!r}: it must be a whole number >= 1")
    rest = {key: value for key, value in table.items() if key != "n_trials"}
    space = {}
    for name, value in _named(rest, f"{where}: search", problems).items():
        with problems.noted():
            space[name] = validated(Range, value, f"{where}: search: {name}")
    if not rest:
        problems.found.append(
            f'{where}: search holds no setting; give one, such as "heal.lam" = {{low = 0.01, high = 1}}'
        )
    return Search(n_trials or 0, space)


def _ends(search: Search | None) -> Iterator[tuple[str, Sources]]:
    """The ends of every range, which are checked before the first trial."""
    for name, each in search.space.items() if search else ():
        for value in each.choices or (each.low, each.high):
            if is_whole(name) and isinstance(value, float) and value.is_integer():
                value = int(value)
            yield f"{name} = {value}", {"search": {name: value}}


def is_whole(name: str) -> bool:
    """Whether the setting is a whole number."""
    return type(DEFAULTS[name]) is int
