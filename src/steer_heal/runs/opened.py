"""A run opened to be used: the model that it began with, its data, and the student of any of its states."""

from __future__ import annotations

from typing import Any

import torch
from loguru import logger

from steer_heal.bench import Bench, load_model, weights_of
from steer_heal.check import check_inputs
from steer_heal.events import Contrasted, Gathered
from steer_heal.inputs import Inputs
from steer_heal.model.state import State, base_state, control_state, healed_state, prompted_state, steered_state
from steer_heal.model.student import Student
from steer_heal.plugins import load
from steer_heal.recipe import Recipe
from steer_heal.records import StateName
from steer_heal.runs.resume import recorded_settings, same_inputs, same_weights
from steer_heal.runs.stored import FolderRun
from steer_heal.settings import RunConfig, changed


def settings_of(run: FolderRun, **given: Any) -> RunConfig:
    """The settings of a run, with the dtype that its weights were in; settings that are `given` replace the run's.
    Loads the plugins of the run, which must be among those."""
    cfg = changed(recorded_settings(run.folder, given.get("plugin", ())), given)
    load(cfg)
    return cfg


def state_of(run: FolderRun, name: StateName, r: int | None = None) -> State:
    """A state of a run. `steered` and `healed` need a round. UserError where the vector of the round is gone or was
    changed."""
    trait = run.start.trait
    before_the_loop = {"base": base_state, "prompted": prompted_state, "control": control_state}
    if name in before_the_loop:
        return before_the_loop[name](trait)
    assert r is not None
    if name == "healed":
        return healed_state(r, trait)
    recipe = Recipe.of(run.start.config)
    dose = run.require(Gathered, r).collected.dose
    event = run.at(Contrasted, r)
    strength = run.start.config.heal.contrast if event is None else event.found.strength
    return steered_state(r, recipe.teacher_condition(trait, run.vector(r), dose, strength))


def open_bench(run: FolderRun, cfg: RunConfig) -> Bench:
    """The untouched model of a run with its data. UserError where a file that the run read, or the model, is not as it
    was."""
    inputs = check_inputs(cfg)
    same_inputs(run.folder, inputs)
    bench = loaded_bench(cfg, inputs)
    bench.cache = run.cache
    same_weights(run.folder, weights_of(bench.student.lm))
    return bench


def loaded_bench(cfg: RunConfig, inputs: Inputs) -> Bench:
    """The model of the settings, on their number of threads, with its data."""
    if cfg.n_threads:
        torch.set_num_threads(cfg.n_threads)
    logger.info(f"loading {cfg.model}")
    lm = load_model(cfg)
    logger.info(f"{cfg.model} is in {str(lm.head.weight.dtype).removeprefix('torch.')} on {lm.device}: {lm.why_dtype}")
    return Bench(cfg, inputs, Student(lm, cfg.adapter))


def put_in(run: FolderRun, student: Student, state: State) -> None:
    """Gives an untouched student the rounds that a state needs. UserError where a checkpoint is gone or was changed."""
    if state.name == "control":
        run.restore_student(None, student)
    elif state.name == "healed":
        run.restore_student(state.round, student)
    elif state.name == "steered" and state.round:
        run.restore_student(state.round - 1, student)


def student_of(run: FolderRun, cfg: RunConfig, r: int) -> Student:
    """The student after round r, without the data of the run. UserError where its checkpoint is gone or was changed, or
    the weights of the model are not as they were."""
    run.checkpoint(r)  # checks its files before the model is loaded
    lm = load_model(cfg)
    same_weights(run.folder, weights_of(lm))
    student = Student(lm, cfg.adapter)
    run.restore_student(r, student)
    return student
