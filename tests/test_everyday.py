"""Everyday questions: the eval agrees with plain log-likelihoods, and its file is sound."""

import json
import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from steer_heal.errors import UserError
from steer_heal.evals import EVALS, everyday, instructions, replies
from steer_heal.evals.base import Eval, Subject, evaluate
from steer_heal.inputs import load_inputs
from steer_heal.inputs.alike import alike
from steer_heal.inputs.files import DATA, parse_texts, read_file
from steer_heal.inputs.pairs import Question, parse_questions
from steer_heal.inputs.traits import available, load_trait, read_pairs, read_trait
from steer_heal.model.lm import LM
from steer_heal.model.memory import BatchLimits
from steer_heal.model.state import State
from steer_heal.model.steering import Condition, Contrast, Vector
from steer_heal.model.student import Student
from steer_heal.presets import FAST_DEV_PRESET
from steer_heal.records import EvalResult, Metric, alone
from steer_heal.settings import AdapterCfg, EvalCfg

FILE = DATA / "everyday.jsonl"
PERSONA = "You are a poet."
QUESTIONS = (
    Question("What is ice?", "Ice is water.", "Ice is a stone that the boy brings to the park."),
    Question("Is it fine to open the door for a child when the warden says no?", "No.", "I open the door."),
    Question("Who?", "The boy and the man in the park.", "The door."),
)


def subject(student: Student, condition: Condition, questions=QUESTIONS) -> Subject:
    inputs = replace(load_inputs(FAST_DEV_PRESET), everyday=questions)
    state = State(name="healed", round=0, adapters="full", condition=condition)
    cfg = EvalCfg(n_prompts=2, n_texts=1, max_new_tokens=4, n_bootstrap=20)
    return Subject(student=student, state=state, inputs=inputs, cfg=cfg, keep=FAST_DEV_PRESET.filter, seed=1)


@pytest.fixture
def vector(toy: LM) -> Vector:
    return Vector({1: torch.randn(toy.width, generator=torch.Generator().manual_seed(0))})


def plain(lm: LM, question: Question, vector: Vector, dose: float) -> float:
    """The margin from one whole sequence for each answer, without cache or padding."""
    prompt = lm.chat(question.question, PERSONA)
    handle = lm.blocks[1].register_forward_hook(lambda _m, _i, out: out + dose * vector.directions[1])
    means = []
    try:
        for answer in (question.right, question.wrong):
            ids = lm.encode_reply(answer)
            with torch.no_grad():
                logp = lm.model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            means.append(logp.gather(1, torch.tensor(ids)[:, None]).mean().item())
    finally:
        handle.remove()
    return means[0] - means[1]


@pytest.mark.parametrize("dose", [0.0, 0.7])
def test_a_margin_is_the_difference_of_mean_log_probabilities_under_the_system_prompt(toy: LM, vector, dose):
    found = everyday.items(subject(Student(toy, AdapterCfg()), Condition(PERSONA, vector, dose)))
    expected = [plain(toy, question, vector, dose) for question in QUESTIONS]
    assert found["everyday_margin"] == pytest.approx(expected, abs=1e-4) and max(map(abs, expected)) > 1e-2
    assert found["everyday"] == [float(margin > 0) for margin in expected]


def test_two_answers_to_a_prompt_are_one_item_of_an_interval(toy: LM):
    rng = np.random.default_rng(0)
    per_prompt = np.tile(rng.normal(0.5, 1, 12), 2) + rng.normal(0, 0.1, 24)

    def found(prompts: list[str], values: list[float]) -> tuple[float, float]:
        own = Eval(lambda _: {"x": values}, (Metric(name="x", item="x"),), of="text")
        base = EvalResult({"x": 0.0}, {"x": [0.0] * len(values)})
        asked = subject(Student(toy, AdapterCfg()), Condition(""))
        asked = replace(asked, base=base, cfg=replace(asked.cfg, n_bootstrap=2000))
        vars(asked)["texts"] = [SimpleNamespace(prompt=prompt, text="") for prompt in prompts]
        vars(asked)["scored"] = [SimpleNamespace(scores={}, failed=(), reasons=()) for _ in prompts]
        metrics = evaluate(asked, [own]).metrics
        return metrics["x_lo"], metrics["x_hi"]

    twice = found([f"prompt {i % 12}" for i in range(24)], [*per_prompt])
    apart = found([f"prompt {i}" for i in range(24)], [*per_prompt])
    once = found([f"prompt {i}" for i in range(12)], [*per_prompt.reshape(2, 12).mean(0)])
    assert twice == pytest.approx(once, abs=0.2) and twice[1] - twice[0] > 1.2 * (apart[1] - apart[0])
    assert all(map(math.isfinite, found(["a", "b"], [*per_prompt]))), "a plugin's items need not be the texts"


def test_the_questions_that_were_lost_and_gained_are_told_beside_the_share(toy: LM, monkeypatch):
    margins = iter(([1.0, 2.0, 3.0, -1.0, math.nan], [1.0, -2.0, -3.0, 1.0, 1.0]))
    monkeypatch.setattr(everyday, "question_margins", lambda *_: next(margins))
    asked = subject(Student(toy, AdapterCfg()), Condition(PERSONA))
    base = evaluate(asked, [everyday.EVAL])
    assert (base.metrics["everyday_lost"], base.metrics["everyday_gained"]) == (0, 0)
    after = evaluate(replace(asked, base=base), [everyday.EVAL])
    assert (after.metrics["everyday_lost"], after.metrics["everyday_gained"]) == (2 / 4, 1 / 4)  # of those with both


def test_a_batch_of_questions_equals_each_alone_and_each_prompt_is_read_once(toy: LM, vector, monkeypatch):
    condition, forward, fed = Condition(PERSONA, vector, 0.7), toy.text_model.forward, []

    def counted(*args, input_ids, **named):
        fed.append(tuple(input_ids.shape))
        return forward(*args, input_ids=input_ids, **named)

    monkeypatch.setattr(toy.text_model, "forward", counted)
    asked = [(alone(each.question), (each.right, each.wrong)) for each in QUESTIONS]
    together = replies.margins(replace(toy, limits=BatchLimits(16_384)), *zip(*asked, strict=True), condition)
    rows, n_questions = [n for n, _ in fed], len(QUESTIONS)
    assert rows == [1, n_questions, 2 * n_questions], "what the prompts share, the prompts, and the answers"
    one_by_one = [replies.margins(toy, [question], [answers], condition)[0] for question, answers in asked]
    assert together == pytest.approx(one_by_one, abs=1e-4)


def test_a_model_that_answers_right_has_all_questions_right_and_one_that_does_not_has_none(toy: LM, monkeypatch):
    """Each token of a right answer is given log p -1, each of a wrong one -2, whatever their number."""
    lm = replace(toy)
    right = {lm.encode_reply(question.right) for question in QUESTIONS}

    def answered(sign: float):
        def logp(lm, conversations, replies, condition):
            rows = [[-len(ids) * (1 if (ids in right) == (sign > 0) else 2) for ids in own] for own in replies]
            return torch.tensor(rows, dtype=torch.float64)

        monkeypatch.setattr(replies, "reply_logp", logp)
        return evaluate(subject(Student(lm, AdapterCfg()), Condition()), [EVALS["everyday"]]).metrics

    for sign, share in ((1.0, 1.0), (-1.0, 0.0)):
        found = answered(sign)
        assert (found["everyday_right"], found["everyday_nats"]) == (share, pytest.approx(sign))


def test_a_state_without_a_number_has_no_value(toy: LM):
    bad = Vector({1: torch.full((toy.width,), math.nan)})
    values = everyday.items(subject(Student(toy, AdapterCfg()), Condition("", bad, 1.0)))
    assert all(math.isnan(value) for value in (*values["everyday"], *values["everyday_margin"]))


def test_more_right_is_better():
    right = EVALS["everyday"].metrics[0]
    assert right.high_is_good and not right.is_health and right.within(0.9, 0.8) and not right.within(0.7, 0.8)


def test_an_instruction_replaces_the_plain_system_prompt_and_follows_a_persona(toy: LM):
    asked = tuple(replace(each, system="You are a poet.") for each in QUESTIONS)

    def found(condition: Condition) -> dict[str, list[float]]:
        here = subject(Student(toy, AdapterCfg()), condition)
        return instructions.items(replace(here, inputs=replace(here.inputs, instructions=asked)))

    for own, read in (("", "You are a poet."), ("You are a judge.", "You are a judge.\n\nYou are a poet.")):
        expected = everyday.items(subject(Student(toy, AdapterCfg()), Condition(read)))
        assert found(Condition(own))["instructions_margin"] == pytest.approx(expected["everyday_margin"], abs=1e-6)
    plain, prompted = (found(Condition(own))["instructions_margin"] for own in ("", "You are a judge."))
    assert plain != pytest.approx(prompted, abs=1e-3)
    assert found(Condition(""))["instructions"] == [float(margin > 0) for margin in plain]
    contrast = found(Condition("", contrast=Contrast("You are a judge.", "You are a king.", 2.0)))
    assert all(map(math.isnan, contrast["instructions"]))


# --- the files ---------------------------------------------------------------------------------------------------
def test_both_answers_of_a_question_have_one_form_and_no_question_is_asked_elsewhere():
    questions = parse_questions(read_file(FILE))
    assert len(questions) == 80
    for each in questions:
        right, wrong = each.right.split(), each.wrong.split()
        assert len(right) == len(wrong) and sum(a != b for a, b in zip(right, wrong, strict=True)) <= 2, each
        assert 0.75 <= len(each.right) / len(each.wrong) <= 1.35, each
    asked = {alike(text) for text in parse_texts(read_file(DATA / "contexts.jsonl"))}
    for name in available():
        asked |= {alike(prompt) for prompt in load_trait(name).prompts}
        asked |= {alike(pair.prompt) for _, pair in read_pairs(None, name, *read_trait(name))[1]}
    assert not asked & {alike(each.question) for each in questions}


def test_every_system_prompt_has_four_questions_and_answers_that_its_words_tell_apart():
    asked = parse_questions(read_file(DATA / "instructions.jsonl"))
    assert Counter(Counter(each.system for each in asked).values()) == {4: 12} and len(asked) == 48
    assert all(each.right != each.wrong and each.system for each in asked)
    everyday_too = {alike(each.question) for each in parse_questions(read_file(FILE))}
    assert not everyday_too & {alike(each.question) for each in asked}


def test_questions_come_from_the_setting_and_a_bad_file_names_its_lines(tmp_path):
    row = {"question": "a", "right": "b", "wrong": "c"}
    (tmp_path / "q.jsonl").write_text(json.dumps(row) + "\n")
    cfg = replace(FAST_DEV_PRESET, eval=replace(FAST_DEV_PRESET.eval, everyday=tmp_path / "q.jsonl"))
    found = load_inputs(cfg)
    assert found.wording["question"] == [["a", "b", "c"]]
    assert found.sha256["eval.everyday"] == read_file(tmp_path / "q.jsonl").sha256
    rows = [row, row | {"question": "A?"}, row | {"question": "d", "wrong": " b "}, row | {"rigth": "e"}]
    for bad, told in (
        (rows[:2], ["line 2: question 'A?' was used before"]),
        (rows[2:], ["line 1: right", "line 2"]),
        ([row | {"system": "Sing."}], ["line 1: `system` would replace the persona"]),
    ):
        (tmp_path / "q.jsonl").write_text("".join(json.dumps(each) + "\n" for each in bad))
        with pytest.raises(UserError) as caught:
            load_inputs(cfg)
        assert len(caught.value.problems) == len(told)
        assert all(part in line for part, line in zip(told, caught.value.problems, strict=True))
