"""Continuing a run that was stopped: its settings, its finished steps, and where its events are cut.

A resumed run goes through the same steps. A step whose event is there takes its result from the event; the first one
without an event is where work begins, from what `partial/` holds of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from shutil import rmtree
from typing import IO, Annotated, Any, Literal

import tyro

from steer_heal.check import TRIAL
from steer_heal.errors import UserError, validated
from steer_heal.inputs import Inputs
from steer_heal.records import Trait
from steer_heal.runs.checkpoint import saved_steps
from steer_heal.runs.events import SCHEMA, Event, broken_link, current, jsonable, read_events, run_folder, schema_errors
from steer_heal.runs.storage import atomic_write, lock_run
from steer_heal.settings import RUN_ONLY, Names, RunConfig, leaves

OF_A_START = {".lock", "run.log", "events.jsonl"}
"""What is left in a folder by a run that was killed before its first event."""
FIRST_OF_TWO = ("dose", "adapter_gen")
"""Events that are written together with the one that follows: without it, their step is done again."""


@dataclass(frozen=True, kw_only=True)
class Resume:
    """Continue a run that was stopped, with its own settings. Only settings without effect on the result can differ."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    quiet: bool = False
    """Only warnings and errors on the console."""
    chat: bool = True
    """At the end, in a terminal, ask whether to talk to the run."""
    arm: str | None = None
    """Label for `just results`, in place of the run's."""
    export: Path | None = None
    """Also write the final student, merged, as a plain transformers model to this empty or new folder."""
    track: Names | None = None
    """Trackers, in place of the run's."""
    n_threads: int | None = None
    """CPU threads, in place of the run's."""
    gen_batch_size: Annotated[int | None, tyro.conf.arg(name="gen.batch-size")] = None
    eval_batch_size: Annotated[int | None, tyro.conf.arg(name="eval.batch-size")] = None
    heal_tokens_per_pass: Annotated[int | None, tyro.conf.arg(name="heal.tokens-per-pass")] = None
    heal_checkpoint: Annotated[Literal["auto", "on", "off"] | None, tyro.conf.arg(name="heal.checkpoint")] = None
    """These four change memory and speed only."""

    def config(self) -> tuple[str, RunConfig]:
        """(preset name, settings) of the run, with what was asked for here. UserError where the folder holds no run."""
        preset, cfg = recorded(self.run)
        cfg = replace(cfg, out=self.run.resolve().parent, quiet=self.quiet)
        for name in RUN_ONLY:
            section, _, key = name.rpartition(".")
            value = getattr(self, name.replace(".", "_"), None)
            if value is not None and section:
                cfg = replace(cfg, **{section: replace(getattr(cfg, section), **{key: value})})
            elif value is not None:
                cfg = replace(cfg, **{key: value})
        return preset, cfg


def run_start(folder: Path) -> Event:
    """The first event. UserError where there is none, or it is no run_start."""
    path = run_folder(folder) / "events.jsonl"
    try:
        with path.open(encoding="utf-8") as lines:
            event = json.loads(lines.readline())
        if event["stage"] != "run_start":
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path} does not begin with a run_start; give the folder of a run") from None
    if event.get("schema") != SCHEMA:
        raise UserError(
            f"{path} has schema {event.get('schema')!r:.20}: this version reads {SCHEMA}; use the version that wrote it"
        )
    return event


def begun(folder: Path) -> bool:
    """Whether the folder holds a run: one whose first event is whole."""
    path = folder / "events.jsonl"
    return path.is_file() and b"\n" in path.read_bytes()


def lock_new_run(folder: Path) -> IO[str]:
    """The lock of a folder that a new run is to have. UserError where it holds a run by now, or other files."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = lock_run(folder)
    if begun(folder):
        raise UserError(f"folder is {str(folder)!r}: another process began a run there; give the same command again")
    no_other_files(folder)
    (folder / "events.jsonl").unlink(missing_ok=True)
    return lock


def no_other_files(folder: Path) -> None:
    """UserError where a folder without a run holds files that no run began with."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    others = sorted(name for name in names - OF_A_START if not name.startswith(TRIAL))
    if others:
        raise UserError(f"folder is {str(folder)!r}: it holds {others[0]!r} and no run; give a new or empty --folder")


def same_settings(folder: Path, cfg: RunConfig) -> str:
    """The preset's name that the run recorded. UserError naming the settings in which the run and `cfg` differ, other
    than those that do not change the result."""
    preset, then = recorded(folder)
    asked = leaves(cfg)
    differ = [name for name, value in leaves(then).items() if name not in RUN_ONLY and value != asked[name]]
    if differ:
        raise UserError(
            f"folder is {str(folder)!r}: it holds a run with another {', '.join(differ)}; give another --folder"
        )
    return preset


def recorded(folder: Path) -> tuple[str, RunConfig]:
    """(preset name, settings) that a run began with. UserError where the folder holds no run."""
    start = run_start(folder)
    with schema_errors(folder):
        return start["preset"], validated(RunConfig, start["config"], f"{folder}/events.jsonl config")


def finished(folder: Path) -> bool:
    """Whether the last event is a run_end without an error."""
    last = read_events(folder)[-1]
    return last["stage"] == "run_end" and not last.get("error")


def same_inputs(folder: Path, inputs: Inputs) -> None:
    """UserError naming the setting whose file, or the field of the trait that, was changed since the run began."""
    start = run_start(folder)
    with schema_errors(folder):
        then, trait_then = start["inputs"], start["trait"]
        for name, digest in then.items():
            if digest != inputs.sha256.get(name):
                raise UserError(
                    f"{folder}: the file of {name} was changed since the run began (SHA-256 {digest[:12]} then, "
                    f"{str(inputs.sha256.get(name))[:12]} now); restore it, or start a new run"
                )
        changed = [name for name, value in _fields(inputs.trait).items() if trait_then.get(name) != value]
    if changed:
        names = ", ".join(f"trait.{name}" for name in changed)
        raise UserError(f"{folder}: {names} was changed since the run began; restore the file of the trait")


def _fields(trait: Trait) -> dict[str, Any]:
    return jsonable(asdict(trait))[0]


def in_recorded_dtype(cfg: RunConfig, folder: Path) -> RunConfig:
    """The settings, with the dtype that the run's weights were in: `auto` may be another one by now."""
    with schema_errors(folder):
        return replace(cfg, dtype=run_start(folder)["weights"]["dtype"])


def same_weights(start: Event, now: Mapping[str, str], folder: Path) -> None:
    """UserError where the model is not the one that the run began with."""
    if start["weights"] != now:
        raise UserError(f"{folder}: {changed_weights(start, now)}; restore the model, or start a new run")


def changed_weights(start: Event, now: Mapping[str, str]) -> str:
    """How the loaded base weights differ from the recorded ones, in words."""
    then, model = start["weights"], start["config"]["model"]
    short = f"SHA-256 {then['sha256'][:12]} then, {now['sha256'][:12]} now"
    return f"the weights of model {model!r} were changed since the run began ({short})"


def partial_path(folder: Path, stage: str, round_: int) -> Path:
    """Where an unfinished stage keeps what it has done so far."""
    suffix = "safetensors" if stage == "heal" else "jsonl"
    return folder / "partial" / f"{stage}-r{round_}.{suffix}"


def truncate_events(folder: Path) -> list[Event]:
    """Cuts events.jsonl to where the run can go on with the same result; returns what is left.

    Dropped are: a torn last line; a run_end with an error; a heal whose checkpoint folder was deleted, with all that
    follows; heal_steps after the last saved one; the first of two events that belong together. UserError where the
    events do not follow from each other.
    """
    path = folder / "events.jsonl"
    events = read_events(folder)
    lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.strip()][: len(events)]
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


def _cut(events: list[Event], folder: Path) -> None:
    if events[-1]["stage"] == "run_end" and events[-1].get("error"):
        events.pop()
    valid = {id(event) for event in current(events)}
    heals = [i for i, e in enumerate(events) if e["stage"] == "heal" and id(e) in valid]
    while heals and not (folder / events[heals[-1]]["checkpoint"]).exists():
        del events[heals.pop() :]
        rmtree(folder / "partial", ignore_errors=True)  # they follow from the dropped heal
    last = events[-1]
    steps = 0
    while events[-1 - steps]["stage"] == "heal_step" and events[-1 - steps]["round"] == last["round"]:
        steps += 1
    for path in (folder / "partial").glob("heal-r*.safetensors"):
        r = int(re.findall(r"-r(-?\d+)", path.name)[0])
        if saved_steps(path) > (steps if r == last["round"] else 0):
            path.unlink()  # the end of events.jsonl was lost: a step without its event is taken again
    kept = saved_steps(partial_path(folder, "heal", last["round"])) if steps else 0
    del events[len(events) - (steps - kept) :]
    if events[-1]["stage"] in FIRST_OF_TWO:
        events.pop()
