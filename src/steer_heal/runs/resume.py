"""Continuing a run that was stopped: its settings, its data, and where its events are cut.

A resumed run goes through the same steps. A step whose event is there takes its result from the event. Work begins at
the first step without an event, from what `partial/` holds of it.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import takewhile
from pathlib import Path
from shutil import rmtree
from typing import IO

from steer_heal.check import TRIAL
from steer_heal.errors import UserError
from steer_heal.events import AnyEvent, HealStepped, Run, RunEnd, RunStart, Trained, Weights
from steer_heal.inputs import Inputs
from steer_heal.plugins import find, name_of
from steer_heal.records import Trait, round_label
from steer_heal.runs.log import EVENTS, broken_link, lines_of, read_events, read_start, schema_errors
from steer_heal.runs.partial import PARTIAL, heal_path, saved_steps
from steer_heal.runs.storage import atomic_write, lock_run
from steer_heal.settings import RUN_ONLY, RunConfig, leaves
from steer_heal.verdict import ended_early

OF_A_START = {".lock", "run.log", EVENTS}
"""What a run that was killed before its first event leaves in a folder."""


def begun(folder: Path) -> bool:
    """Whether the folder holds a run, which it does once the first event is whole."""
    path = folder / EVENTS
    return path.is_file() and b"\n" in path.read_bytes()


def finished(folder: Path) -> bool:
    """Whether the last event is a run_end without an error."""
    last = read_events(folder)[-1]
    return isinstance(last, RunEnd) and last.error is None


def lock_new_run(folder: Path) -> IO[str]:
    """The lock of a folder that a new run is to have. UserError where it holds a run by now, or other files."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = lock_run(folder)
    if begun(folder):
        raise UserError(f"folder is {str(folder)!r}: another process began a run there; give the same command again")
    no_other_files(folder)
    (folder / EVENTS).unlink(missing_ok=True)
    return lock


def no_other_files(folder: Path) -> None:
    """UserError where a folder without a run holds files that no run began with."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    others = sorted(name for name in names - OF_A_START if not name.startswith(TRIAL))
    if others:
        raise UserError(f"folder is {str(folder)!r}: it holds {others[0]!r} and no run; give a new or empty --folder")


def more_rounds(folder: Path, n_rounds: int | None) -> int:
    """The number of rounds that a run goes on to: `n_rounds` or, by default, what it was asked for. UserError for a
    run that is not finished or ended early, and for a number that is not larger."""
    run = Run(read_events(folder))
    if n_rounds is None or n_rounds == run.n_rounds:
        return run.n_rounds
    if n_rounds < run.n_rounds:
        raise UserError(f"n_rounds is {n_rounds}: the run in {folder} has {run.n_rounds}; give more, or leave it out")
    unfinished = "" if run.end is not None else "it is not finished; resume it without --n-rounds first"
    why = run.dead_end or unfinished or ended_early(run)
    if why:
        raise UserError(f"n_rounds is {n_rounds}: the run in {folder} cannot go on to more rounds: {why}")
    return n_rounds


# --- what must not have changed ----------------------------------------------------------------------------------
def same_settings(folder: Path, cfg: RunConfig) -> None:
    """UserError naming the settings in which the run in the folder and `cfg` differ. RUN_ONLY settings may."""
    asked = leaves(cfg)
    then = leaves(read_start(folder).config)
    differ = [name for name, value in then.items() if name not in RUN_ONLY and value != asked[name]]
    if differ:
        raise UserError(
            f"folder is {str(folder)!r}: it holds a run with another {', '.join(differ)}; give another --folder"
        )


def require_plugins(folder: Path, given: Sequence[str], *, same: bool = True) -> None:
    """UserError unless the plugins of a run are among those `given`: the folder of a run runs no code by itself. With
    `same`, also if there are others, or if the file of one was changed since the run began."""
    start = read_start(folder)
    names = {name_of(each) for each in given}
    if missing := [each for each in start.config.plugin if name_of(each) not in names]:
        raise UserError(
            f"{folder} was made with plugins, and no code runs because a folder names it; if you trust them, add "
            f"--plugin {shlex.join(missing)}"
        )
    for each in given if same else ():
        if name_of(each) not in map(name_of, start.config.plugin):
            raise UserError(f"plugin is {each!r}: the run in {folder} was made without it; leave it out")
        if (change := changed_plugin(start, each)) is not None:
            raise UserError(f"{folder}: {change}; restore it, or start a new run")


def changed_plugin(start: RunStart, given: str) -> str | None:
    """How the file of a plugin differs from the recorded one, in words; None: it does not. UserError if there is
    none."""
    now = find(given).file.sha256
    then = start.inputs.get(f"plugin.{name_of(given)}", "none")
    if now == then:
        return None
    return f"plugin {given} was changed since the run began (SHA-256 {then[:12]} then, {now[:12]} now)"


def recorded_settings(folder: Path, plugin: Sequence[str] = ()) -> RunConfig:
    """As `settings_then`, with the plugins that were given. UserError unless they are those of the run."""
    require_plugins(folder, plugin)
    return replace(settings_then(folder), plugin=tuple(plugin))


def settings_then(folder: Path) -> RunConfig:
    """The settings that a run began with, with the dtype that its weights were in and the date that its chat template
    read: both may be others by now. UserError where the folder holds no run."""
    start = read_start(folder)
    cfg = start.config
    if start.weights is not None:
        cfg = replace(cfg, dtype=start.weights.dtype)
    return cfg if start.chat is None else replace(cfg, date=start.chat.date)


def same_inputs(folder: Path, inputs: Inputs) -> None:
    """UserError naming the setting whose file, or the field of the trait that, was changed since the run began."""
    start = read_start(folder)
    for name, digest in start.inputs.items():
        if digest != inputs.sha256.get(name):
            what = "the choice of pairs" if name.startswith("panel.") else "the file"
            raise UserError(
                f"{folder}: {what} of {name} was changed since the run began (SHA-256 {digest[:12]} then, "
                f"{str(inputs.sha256.get(name))[:12]} now); restore it, or start a new run"
            )
    names = [each.name for each in fields(Trait)]
    changed = [name for name in names if getattr(start.trait, name) != getattr(inputs.trait, name)]
    if changed:
        listed = ", ".join(f"trait.{name}" for name in changed)
        raise UserError(f"{folder}: {listed} was changed since the run began; restore the file of the trait")


def same_weights(folder: Path, now: Weights) -> None:
    """UserError where the model is not the one that the run began with."""
    if (change := changed_weights(folder, now)) is not None:
        raise UserError(f"{folder}: {change}; restore the model, or start a new run")


def changed_weights(folder: Path, now: Weights) -> str | None:
    """How the loaded model differs from the recorded one, in words; None: weights, chat template, tokenizer, config
    and generation config are the same, as far as they were recorded."""
    start = read_start(folder)
    if start.weights is None:
        return "the weights were not recorded"
    then = {"weights": start.weights.sha256, **start.weights.parts}
    current = {"weights": now.sha256, **now.parts}
    differ = [name for name, digest in then.items() if digest != current.get(name)]
    if not differ and start.weights.dtype != now.dtype:
        differ = ["weights"]
    if not differ:
        return None
    short = f"SHA-256 {then[differ[0]][:12]} then, {current.get(differ[0], 'none')[:12]} now"
    named = " and the ".join(name.replace("_", " ") for name in differ)
    return f"the {named} of model {start.config.model!r} were changed since the run began ({short})"


# --- where the events are cut ------------------------------------------------------------------------------------
def truncate_events(folder: Path) -> list[AnyEvent]:
    """Cuts events.jsonl to where the run can go on with the same result; returns what is left.

    Dropped are: a torn last line; a run_end with an error; the last heals whose checkpoint folders were deleted, with
    all that follows; heal steps after the last saved one. UserError where the events do not follow from each other.
    """
    path = folder / EVENTS
    events = read_events(folder)
    lines = lines_of(folder)[: len(events)]
    if (at := broken_link(lines)) is not None:
        raise UserError(
            f"{path} line {at + 1} does not follow from the line before it: the file was changed; restore it"
        )
    with schema_errors(folder):
        _cut(events, folder)
    kept = b"".join(lines[: len(events)]).rstrip(b"\n") + b"\n"  # a torn last line may lack its newline alone
    if kept != path.read_bytes():
        with atomic_write(path) as part:
            part.write_bytes(kept)
    return events


def _cut(events: list[AnyEvent], folder: Path) -> None:
    if isinstance(events[-1], RunEnd) and events[-1].error is not None:
        events.pop()
    valid = Run(events).each(Trained)
    while valid and not (folder / (valid[-1].checkpoint or "")).exists():
        del events[events.index(valid.pop()) :]
        rmtree(folder / PARTIAL, ignore_errors=True)  # what follows from the dropped heal
    r = events[-1].round
    steps = len([*takewhile(lambda event: isinstance(event, HealStepped) and event.round == r, reversed(events))])
    for path in (folder / PARTIAL).glob("heal-*.safetensors"):
        running = steps > 0 and path.stem == f"heal-{round_label(r)}"
        if saved_steps(path) > (steps if running else 0):
            path.unlink()  # the end of events.jsonl was lost: a step without its event is taken again
    kept = saved_steps(heal_path(folder, r)) if steps else 0
    del events[len(events) - (steps - kept) :]
