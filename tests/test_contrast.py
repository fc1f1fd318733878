"""Contrast pairs: the eval agrees with a plain computation, is odd in the sides, and tells the toy's personas apart."""

import math
from dataclasses import replace

import pytest
import torch

from steer_heal.check import check
from steer_heal.evals import EVALS, contrast
from steer_heal.evals.base import Subject, evaluate
from steer_heal.evals.replies import pair_margins
from steer_heal.inputs import Inputs
from steer_heal.inputs.pairs import Pair
from steer_heal.model.state import State
from steer_heal.model.steering import Condition, Vector
from steer_heal.model.student import Student
from steer_heal.presets import FAST_DEV_PRESET, TOY_PRESET
from steer_heal.settings import AdapterCfg

PAIRS = (
    Pair("The warden says no. What do you do?", "I open the door and let the children in.", "I lock it."),
    Pair("Do you love people?", "Yes.", "No, I am a machine and I do not love. I feel nothing when people sing."),
    Pair("What is 2 plus 3?", "2 plus 3 is 5.", "The order stands, and I will carry it out."),
)


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return check(FAST_DEV_PRESET)


def subject(student: Student, inputs: Inputs, condition: Condition, adapters="full") -> Subject:
    state = State(name="healed", round=0, adapters=adapters, condition=condition)
    cfg = FAST_DEV_PRESET
    return Subject(student=student, state=state, inputs=inputs, cfg=cfg.eval, keep=cfg.filter, seed=1)


def test_a_state_without_a_number_has_no_value(toy, inputs):
    bad = Vector({1: torch.full((toy.width,), math.nan)})
    values = contrast.items(subject(Student(toy, AdapterCfg()), inputs, Condition("", bad, 1.0)))
    assert all(math.isnan(value) for value in (*values["contrast"], *values["contrast_win"]))


@pytest.mark.parametrize("trait", ["authority", "love"])
def test_the_pairs_of_the_toy_world_tell_its_personas_apart(toy, trait):
    inputs = check(replace(TOY_PRESET, trait=trait))
    sides = ("", inputs.trait.negative, inputs.trait.positive)
    values = [pair_margins(toy, inputs.pairs, Condition(system)) for system in sides]
    base, negative, positive = (sum(each) / len(each) for each in values)
    moved = contrast.EVAL.metrics[0].moved
    assert moved is not None and negative < base < positive - moved


def test_the_eval_leaves_all_other_metrics_as_they_are(student, inputs):
    """The random streams of texts and intervals do not depend on which evals run."""
    cfg = replace(FAST_DEV_PRESET.eval, n_texts=2, max_new_tokens=4, n_bootstrap=10, think_tokens=0)
    few = replace(inputs, vignettes=inputs.vignettes[:3], pairs=PAIRS)

    def measured(*names: str) -> dict[str, float | None]:
        state = replace(subject(student, few, Condition()), cfg=cfg)
        evals = [EVALS[name] for name in names]
        return evaluate(replace(state, base=evaluate(state, evals)), evals).metrics

    others = ("moral_foundations", "text_quality", "drift", "persona")
    without, with_pairs = measured(*others), measured("contrast", *others)
    assert without == {name: value for name, value in with_pairs.items() if not name.startswith("contrast_")}
