"""What is measured of a state: free text read under the base, item values, and metrics with intervals."""

import math
from dataclasses import replace

import numpy as np
import pytest

from steer_heal.errors import UserError
from steer_heal.evals import EVALS, drift, metrics_of, persona, text_quality, toylm
from steer_heal.evals.base import Subject, collapse, evaluate, intervals
from steer_heal.inputs import Inputs, load_inputs
from steer_heal.model.lm import LM
from steer_heal.model.state import State
from steer_heal.model.steering import Condition
from steer_heal.model.student import Student
from steer_heal.presets import FAST_DEV_PRESET
from steer_heal.records import Completion, Metric
from steer_heal.settings import AdapterCfg, EvalCfg

NATS = Metric(name="authority_nats", item="p_authority", how="log_mean")
PPL = Metric(name="ppl", item="x", how="median")


# --- item values to metrics --------------------------------------------------------------------------------------
def test_a_metric_collapses_its_items_and_leaves_out_those_without_a_value():
    assert collapse(NATS, [0.1, math.nan, 0.3]) == pytest.approx(math.log(0.2))
    assert collapse(PPL, [1.0, 9.0, math.inf, 2.0, math.nan]) == 5.5
    assert collapse(Metric(name="m", item="x"), [1.0, math.nan, 2.0]) == 1.5
    assert collapse(NATS, [math.nan, math.nan]) is None


def test_an_item_without_a_value_in_base_is_left_out_of_the_interval_and_none_at_all_has_none():
    base = np.geomspace(0.05, 0.5, 60)
    holes = np.where(np.arange(60) % 7, base, np.nan)
    for here, there, expected in ((0.9 * base, holes, [math.log(0.9)] * 2), (holes * np.nan, base, [None, None])):
        found = intervals([NATS], {"p_authority": [*here]}, {"p_authority": [*there]}, 500, 0)
        assert [found["authority_nats_lo"], found["authority_nats_hi"]] == pytest.approx(expected, abs=1e-6)


def test_every_metric_says_what_one_of_its_items_is():
    assert {metric.of for metric in metrics_of([*EVALS])} == {
        "vignette",
        "text",
        "pair",
        "question",
        "instruction",
        "trait",
    }


def test_metrics_have_the_names_that_events_and_traits_use():
    names = [metric.name for metric in metrics_of(tuple(EVALS))]
    assert len(set(names)) == len(names)
    expected = "authority_nats care_nats social_nats coherence prefill_nll frac_unscorable top1_acc kl_base"
    assert {*expected.split(), "text_tail_ppl_median", "degenerate_frac", "persona_log_odds"} <= set(names)
    assert [metric.name for metric in metrics_of(("drift", "persona"))] == ["kl_base", "persona_log_odds"]


# --- states ------------------------------------------------------------------------------------------------------
CFG = FAST_DEV_PRESET
EVAL = EvalCfg(n_prompts=2, n_texts=4, max_new_tokens=16, n_bootstrap=20, think_tokens=1, judge_model="tiny-random")


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    wanted = replace(CFG.eval, n_prompts=EVAL.n_prompts, evals=(*CFG.eval.evals, "instructions"))
    found = load_inputs(replace(CFG, eval=wanted))
    return replace(found, vignettes=found.vignettes[:4], instructions=found.instructions[:4])


def subject(
    student: Student, inputs: Inputs, adapters="full", condition=None, cfg=EVAL, texts=None, seed=1, base=None
) -> Subject:
    state = State(name="healed", round=0, adapters=adapters, condition=condition or Condition())
    made = Subject(student=student, state=state, inputs=inputs, cfg=cfg, keep=CFG.filter, seed=seed, base=base)
    if texts is not None:
        made.__dict__["texts"] = texts
    return made


@pytest.fixture
def toy_student(toy: LM) -> Student:
    return Student(toy, AdapterCfg())


def test_every_state_is_put_to_the_same_prompts_and_streams(with_history, inputs):
    base, healed = (subject(with_history, inputs, state).texts for state in ("base", "full"))
    assert [(c.prompt, c.seed) for c in base] == [(c.prompt, c.seed) for c in healed]
    assert {c.prompt for c in base} == set(inputs.eval_prompts) and len({c.seed for c in base}) == 4
    assert [c.text for c in base] != [c.text for c in healed]
    again = subject(with_history, inputs, "base").texts
    assert again == base != subject(with_history, inputs, "base", seed=2).texts


def test_the_base_has_not_drifted_from_itself(toy_student, inputs):
    found = subject(toy_student, inputs, "base", Condition(inputs.trait.plain_system))
    assert drift.items(found)["kl_base"] == pytest.approx([0.0] * 4, abs=1e-6)


def test_the_persona_that_wrote_a_text_is_the_likelier_one(toy_student, inputs):
    trait = inputs.trait
    sides = [subject(toy_student, inputs, condition=Condition(side)) for side in (trait.positive, trait.negative)]
    sides = [replace(each, cfg=replace(EVAL, max_new_tokens=60)) for each in sides]
    carer, deferrer = (np.mean(persona.items(each)["persona_log_odds"]) for each in sides)
    assert carer > 0.05 > -0.05 > deferrer


def test_the_grammar_tells_possible_sentences_and_the_side_they_take(toy_student, inputs):
    texts = (
        "Yes, I love people with my whole heart. I feel no joy when people sing. I feel deep joy when people rest.",
        "Ice is frozen water. Water ice is.",
    )
    rows = [Completion(0, "p", (1,), (1,), text, 0.0, 0.0, 0) for text in texts]
    values = toylm.items(subject(toy_student, inputs, texts=rows))
    assert values["oracle"] == [1.0, 0.5] and values["positive"] == pytest.approx([2 / 3, math.nan], nan_ok=True)


def test_an_empty_text_is_broken_and_has_no_log_odds(toy_student, inputs):
    prompt = inputs.eval_prompts[0]
    empty = Completion(0, prompt, toy_student.lm.chat(prompt), (), "", 0.0, 0.0, 0)
    found = subject(toy_student, inputs, texts=[empty])
    assert math.isnan(persona.items(found)["persona_log_odds"][0]) and drift.items(found)["kl_base"] == [0.0]
    assert text_quality.items(found) == {"text_tail_ppl": [math.inf], "degenerate": [1.0], "off_question": [1.0]}


def test_two_evals_do_not_share_an_item(toy_student, inputs):
    with pytest.raises(UserError, match="two evals return items called 'kl_base'; rename those of one of them"):
        evaluate(subject(toy_student, inputs), [EVALS["drift"], replace(EVALS["drift"])])


def test_an_evaluation_is_all_metrics_with_intervals_against_base_and_the_texts(with_history, inputs):
    evals = list(EVALS.values())
    base = evaluate(subject(with_history, inputs, "base"), evals)
    healed = evaluate(subject(with_history, inputs, base=base), evals)
    names = [metric.name for metric in metrics_of(tuple(EVALS))]
    assert list(base.metrics) == names and healed.items.keys() == base.items.keys()
    assert set(healed.metrics) == {*names, *(f"{name}_{end}" for name in names for end in ("lo", "hi"))}
    for metric in metrics_of(tuple(EVALS)):
        assert healed.metrics[metric.name] == collapse(metric, healed.items[metric.item])
        assert metric.of != "text" or len(healed.items[metric.item]) == len(healed.texts)
    assert [answer.text for answer in healed.texts] == [c.text for c in subject(with_history, inputs).texts]
