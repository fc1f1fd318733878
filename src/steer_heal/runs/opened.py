"""A run opened to be used: its settings, its data and its model, and the checkpoint of any of its rounds."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from loguru import logger

from steer_heal import round as steps
from steer_heal.check import check_inputs
from steer_heal.errors import UserError
from steer_heal.inputs import Inputs
from steer_heal.model.lm import weights_digest
from steer_heal.model.steering import Condition, Vector
from steer_heal.model.student import Student
from steer_heal.runs.events import Event, current, of_stage, read_events, schema_errors
from steer_heal.runs.resume import in_recorded_dtype, recorded, same_inputs, same_weights
from steer_heal.runs.storage import damaged_file
from steer_heal.settings import RunConfig


@dataclass(frozen=True)
class OpenedRun:
    """A run as its folder records it. No model is loaded yet."""

    folder: Path
    cfg: RunConfig
    """Its settings, with the dtype that its weights were in. It has no export."""
    inputs: Inputs
    events: list[Event]
    """Without those of attempts that were dropped, and without the steps of heals."""
    dropped: dict[int, str]
    """By round: why an attempt at it was dropped."""

    @cached_property
    def rounds(self) -> list[int]:
        """The healed rounds that were kept."""
        return [event["round"] for event in of_stage(self.events, "round")]

    def healed(self, r: int | None = None) -> int:
        """The round itself; without one, the last that was healed and kept. UserError naming those that there are."""
        if not self.rounds:
            raise UserError(f"{self.folder} has no healed round; continue it: steer-heal resume {self.folder}")
        if r is None or r in self.rounds:
            return self.rounds[-1] if r is None else r
        why = f"was dropped ({self.dropped[r]})" if r in self.dropped else "is not there"
        raise UserError(f"round {r} of {self.folder} {why}; its rounds are {', '.join(map(str, self.rounds))}")

    def event(self, stage: str, r: int) -> Event:
        """UserError where the run has none."""
        for event in reversed(self.events):
            if (event["stage"], event["round"]) == (stage, r):
                return event
        of_round = f" of round {r}" if r >= 0 else ""
        raise UserError(f"{self.folder} has no {stage}{of_round}; ask for another round or state")

    def file(self, event: Event, name: str) -> Path:
        """A file or a folder that the event recorded. UserError where it is gone or was changed."""
        with schema_errors(self.folder):
            damage = damaged_file(self.folder, event["files"])
        if damage is not None:
            raise UserError(f"{damage}; restore it, or give another --round")
        return self.folder / name

    def checkpoint(self, r: int) -> Path:
        """The folder of the student after round r; -1 is the control."""
        return self.file(self.event("heal", r), f"ckpt/r{r}" if r >= 0 else "ckpt/control")

    def vector(self, r: int) -> Vector:
        """The steering vector of round r. UserError where its file is gone or was changed."""
        return Vector.load(self.file(self.event("vector", r), f"vectors/r{r}.safetensors"))

    def teacher(self, r: int) -> Condition:
        """What makes the teacher of round r out of the student before it. UserError as of `vector`."""
        dose = self.event("dose", r)
        with schema_errors(self.folder):
            return steps.teacher(self.vector(r), float(dose["dose"]), self.inputs, self.cfg)

    def load(self) -> Student:
        """The untouched model. UserError where it is not the one that the run began with."""
        began = time.monotonic()
        if self.cfg.n_threads:
            torch.set_num_threads(self.cfg.n_threads)
        lm = steps.load_model(self.cfg)
        with schema_errors(self.folder):
            same_weights(self.events[0], weights_digest(lm.model), self.folder)
        dtype = str(next(lm.model.parameters()).dtype).removeprefix("torch.")
        logger.info(f"{self.cfg.model} is loaded, in {dtype} on {lm.device}: {time.monotonic() - began:.1f} s")
        return Student(lm, self.cfg.adapter)


def open_run(folder: Path, **changed: object) -> OpenedRun:
    """The run in a folder, with settings without effect on its readings `changed` (device, n_threads, ...).

    UserError where the folder holds no run, or a file that the run read is not as it was.
    """
    _, cfg = recorded(folder)
    cfg = replace(in_recorded_dtype(cfg, folder), export=None, **changed)
    inputs = check_inputs(cfg)
    same_inputs(folder, inputs)
    with schema_errors(folder):
        everything = [event for event in read_events(folder) if event["stage"] != "heal_step"]
        dropped = {event["round"]: "; ".join(event["past"]) for event in of_stage(everything, "backtrack")}
        return OpenedRun(folder, cfg, inputs, current(everything), dropped)
