"""The eval classifier: it reads the trait in text, and tells how well."""

import math

import pytest

from steer_heal.check import check
from steer_heal.errors import UserError
from steer_heal.evals import EVALS, classifier
from steer_heal.evals.base import Subject, evaluate
from steer_heal.inputs import load_inputs
from steer_heal.model.lm import LM
from steer_heal.model.state import State
from steer_heal.model.steering import Condition
from steer_heal.model.student import Student
from steer_heal.presets import TOY_PRESET
from steer_heal.records import EvalResult
from steer_heal.settings import AdapterCfg, changed

CFG = changed(TOY_PRESET, {"eval.n_prompts": 8, "eval.n_texts": 8, "eval.max_new_tokens": 48, "eval.n_bootstrap": 20})


def subject(lm: LM, condition: Condition, **more) -> Subject:
    state = State(name="prompted", adapters="base", condition=condition)
    return Subject(
        student=Student(lm, AdapterCfg()),
        state=state,
        inputs=load_inputs(CFG),
        cfg=CFG.eval,
        keep=CFG.filter,
        seed=1,
        **more,
    )


def test_the_answers_of_a_persona_are_told_from_those_of_the_other(toy: LM):
    trait, cache = load_inputs(CFG).trait, {}
    states = {side: Condition(getattr(trait, side)) for side in ("positive", "negative", "plain_system")}
    found = {side: classifier.items(subject(toy, each, cache=cache)) for side, each in states.items()}
    likely = {side: sum(items["classifier_trait"]) / 8 for side, items in found.items()}
    assert likely["positive"] > 0.75 and likely["negative"] < 0.25
    assert likely["negative"] < likely["plain_system"] < likely["positive"]
    assert found["positive"]["classifier_right"] == [1.0] * 8 and found["positive"]["classifier_email"][0] >= 0.75
    assert sorted(map(len, cache.values())) == [8, 8, 48, 48], "e-mails and texts of two personas, each written once"
    base = EvalResult({}, found["plain_system"])
    later = classifier.items(subject(toy, states["positive"], cache=cache, base=base))
    assert later["classifier_trait"] == found["positive"]["classifier_trait"]
    assert all(map(math.isnan, later["classifier_right"] + later["classifier_email"])), (
        "one number for a run, the base's"
    )


def test_texts_that_do_not_differ_are_not_told_apart(toy: LM, monkeypatch):
    words = ["boy", "man", "door", "park"]

    def alike(_subject, prompts, *, after=""):
        n = len(prompts)
        return [f"the {words[i % 4]} {after}" for i in range(n)] * 2, [1] * n + [0] * n

    monkeypatch.setattr(classifier, "answers", alike)
    found = classifier.items(subject(toy, Condition()))
    assert found["classifier_trait"] == pytest.approx([0.5] * 8, abs=1e-6)
    assert found["classifier_right"][0] == 0.5 and found["classifier_email"][0] == 0.5


def test_it_is_tested_on_prompts_that_it_did_not_train_on(toy: LM, monkeypatch):
    """The two texts of a prompt are one word of its own. Had the other of them trained, each guess would be wrong."""

    def own_words(_subject, prompts, *, after=""):
        n = len(prompts)
        return [f"word{i}" for i in range(n)] * 2, [1] * n + [0] * n

    monkeypatch.setattr(classifier, "answers", own_words)
    assert classifier.items(subject(toy, Condition()))["classifier_right"][0] == 0.5


def test_the_verdict_is_told_whether_it_reads_the_trait(toy: LM):
    trait = load_inputs(CFG).trait
    base = evaluate(subject(toy, Condition(trait.plain_system)), [EVALS["classifier"]])
    prompted = evaluate(subject(toy, Condition(trait.positive), base=base), [EVALS["classifier"]])
    assert (prompted.metrics["classifier_trait_lo"] or -math.inf) > 0.1
    (metric, *rest) = EVALS["classifier"].metrics
    assert metric.reads_persona and not any(each.reads_persona or each.moved for each in rest)
    assert metric.towards_persona


def test_what_it_lacks_is_said_before_a_model_is_loaded(monkeypatch):
    cfg = changed(TOY_PRESET, {"eval.evals": ("contrast", "classifier")})
    check(cfg)
    monkeypatch.setattr(classifier, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"scikit-learn is not installed; pip install 'steer-heal\[classifier\]'"):
        check(cfg)
