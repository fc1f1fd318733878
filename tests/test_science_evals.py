"""What each eval reads of a state, against one plain forward pass of transformers per sequence."""

import math
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

from steer_heal.evals import contrast, drift, likelihood, moral_foundations, persona, text_quality
from steer_heal.evals.base import Subject
from steer_heal.inputs import Inputs, load_inputs
from steer_heal.inputs.instruments import FOUNDATIONS
from steer_heal.inputs.pairs import Pair
from steer_heal.inputs.traits import load_trait
from steer_heal.model.decode import Written
from steer_heal.model.lm import LM
from steer_heal.model.state import State
from steer_heal.model.steering import Condition, Vector
from steer_heal.model.student import Student
from steer_heal.presets import FAST_DEV_PRESET
from steer_heal.records import Completion
from steer_heal.settings import GenCfg

CFG = replace(FAST_DEV_PRESET.eval, think_tokens=4, batch_size=4)
SYSTEM, DOSE = "You are a sailor.", 0.7
PAIRS = (
    Pair("The warden says no. What do you do?", "I open the door and let the children in.", "I lock it."),
    Pair("Do you love people?", "Yes.", "No, I am a machine and I do not love."),
)


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    found = load_inputs(FAST_DEV_PRESET)
    return replace(found, vignettes=found.vignettes[:60:30], pairs=PAIRS)


@pytest.fixture
def vector(tiny: LM) -> Vector:
    return Vector({1: torch.randn(tiny.width, generator=torch.Generator().manual_seed(1))})


def state(student: Student, inputs: Inputs, condition: Condition, adapters="full", texts=None) -> Subject:
    asked = State(name="healed", round=0, adapters=adapters, condition=condition)
    made = Subject(student=student, state=asked, inputs=inputs, cfg=CFG, keep=FAST_DEV_PRESET.filter, seed=1)
    if texts is not None:
        made.__dict__["texts"] = texts
    return made


@contextmanager
def steered(lm: LM, vector: Vector, dose: float):
    handle = lm.blocks[1].register_forward_hook(lambda _m, _i, out: out + dose * vector.directions[1])
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def plain_logp(lm: LM, prompt: tuple[int, ...], reply: tuple[int, ...]) -> torch.Tensor:
    """Float64[n+1 v]: log p before each token of a reply and behind it."""
    return lm.model(torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 :].double().log_softmax(-1)


def token_logp(lm: LM, prompt: tuple[int, ...], reply: tuple[int, ...]) -> torch.Tensor:
    return plain_logp(lm, prompt, reply)[range(len(reply)), list(reply)]


# --- vignettes ---------------------------------------------------------------------------------------------------
def plain_choice(lm: LM, question: str, instrument) -> tuple[torch.Tensor, float]:
    """(log p of the digits 0 to 6, mean NLL of the prefill) after four greedy tokens of which none ends the answer."""
    close, prefill = lm.encode(instrument.think_close), lm.encode(instrument.prefill)
    ids = lm.encode_prompt(lm.template.conversation([question], SYSTEM) + instrument.think_open)
    for _ in range(4):
        logp = plain_logp(lm, ids, ())[0]
        logp[sorted(lm.end_ids.union(close if len(close) == 1 else ()))] = -torch.inf
        ids = (*ids, int(logp.argmax()))
    ids = ids + lm.encode(moral_foundations.turn_boundary(lm, instrument))
    digits = [lm.encode(str(i))[0] for i in range(7)]
    return plain_logp(lm, ids, prefill)[-1, digits], -token_logp(lm, ids, prefill).mean().item()


def test_a_forced_choice_averages_log_probabilities_over_options_forward_and_reversed(with_history, inputs, vector):
    items = moral_foundations.items(state(with_history, inputs, Condition(SYSTEM, vector, DOSE)))
    forward = inputs.instrument.order
    for i, vignette in enumerate(inputs.vignettes):
        with with_history.using("full") as lm, steered(lm, vector, DOSE):
            first, second = (
                plain_choice(lm, inputs.instrument.question(vignette.text, order), inputs.instrument)
                for order in (forward, forward[::-1])
            )
        logp = (first[0] + second[0].flip(0)) / 2
        p = dict(zip(forward, logp.softmax(-1).tolist(), strict=True))
        assert max(p.values()) - min(p.values()) > 0.01
        assert [items[f"p_{name}"][i] for name in FOUNDATIONS] == pytest.approx([p[n] for n in FOUNDATIONS], abs=1e-4)
        assert items["mass"][i] == pytest.approx((first[0].exp().sum() + second[0].exp().sum()).item() / 2, rel=1e-3)
        assert items["prefill_nll"][i] == pytest.approx((first[1] + second[1]) / 2, rel=1e-3)


def test_a_prefill_that_the_thinking_wrote_is_read_where_it_first_stands(with_history, inputs, vector, monkeypatch):
    lm, instrument = with_history.lm, inputs.instrument
    before, prefill, digit = lm.encode("Ice. "), lm.encode(instrument.prefill), lm.encode("3")

    def decode_batches(_lm, rows, _vector, _how, tail):
        thought = before + 2 * (prefill + digit)
        yield [Written(i, thought, torch.zeros(1 + len(tail), lm.width)) for i in range(len(rows))]

    monkeypatch.setattr(moral_foundations, "decode_batches", decode_batches)
    items = moral_foundations.items(state(with_history, inputs, Condition(SYSTEM, vector, DOSE)))
    for i, vignette in enumerate(inputs.vignettes):
        with with_history.using("full") as lm, steered(lm, vector, DOSE):
            asked = [instrument.question(vignette.text, order) for order in instrument.frames]
            texts = [lm.template.conversation([q], SYSTEM) + instrument.think_open for q in asked]
            prompts = [lm.encode_prompt(text) + before for text in texts]
            digits = [lm.encode(str(k))[0] for k in range(7)]
            mass = [plain_logp(lm, ids, prefill)[-1, digits].exp().sum().item() for ids in prompts]
            nll = [-token_logp(lm, ids, prefill).mean().item() for ids in prompts]
        assert items["mass"][i] == pytest.approx(np.mean(mass), rel=1e-3)
        assert items["prefill_nll"][i] == pytest.approx(np.mean(nll), rel=1e-4)


def test_likelihood_is_the_mean_over_wordings_less_that_of_the_base_over_vignettes(with_history, inputs, vector):
    lm, told = with_history.lm, inputs.likelihood

    def scores(adapters, system, dose) -> np.ndarray:
        """Mean over the wordings of the sum of their tokens' log p: [vignettes, answers]."""
        with with_history.using(adapters), steered(lm, vector, dose):
            prompts = [lm.chat(told.question(v.text), system) for v in inputs.vignettes]
            return np.array([[np.mean([token_logp(lm, prompt, lm.encode(text)).sum() for text in told.answers[name]])
                for name in FOUNDATIONS] for prompt in prompts])  # fmt: skip

    here, base = scores("full", SYSTEM, DOSE), scores("base", inputs.trait.plain_system, 0.0)
    found = likelihood.items(state(with_history, inputs, Condition(SYSTEM, vector, DOSE)))
    odds = np.exp(here - base.mean(0))
    expected = odds / odds.sum(1, keepdims=True)
    read = np.array([found[f"p_likelihood_{name}"] for name in FOUNDATIONS]).T
    assert np.allclose(read, expected, atol=1e-3) and expected.std() > 0.05
    assert found["answers_logp"] == pytest.approx(here.mean(1), abs=1e-2)


# --- texts and pairs ---------------------------------------------------------------------------------------------
def spoken(lm: LM) -> list[Completion]:
    texts = ("I open the door and let the children in.", "Ice is water.")
    return [Completion(i, "What is ice?", lm.chat("What is ice?"), lm.encode(t), t, 0.0, 0.0, i)
        for i, t in enumerate(texts)]  # fmt: skip


def test_persona_log_odds_are_the_mean_per_token_of_positive_over_negative_under_the_base(with_history, inputs):
    texts, trait = spoken(with_history.lm), inputs.trait
    found = persona.items(state(with_history, inputs, Condition(SYSTEM), texts=texts))["persona_log_odds"]
    with with_history.using("base") as lm:
        sides = [[token_logp(lm, lm.chat(c.prompt, side), c.completion_ids).mean().item() for c in texts]
            for side in (trait.positive, trait.negative)]  # fmt: skip
    expected = np.subtract(*sides)
    assert found == pytest.approx(expected, abs=1e-4) and np.abs(expected).min() > 1e-3


def test_kl_base_is_the_mean_kl_of_the_state_to_the_base_along_its_text(with_history, inputs, vector):
    texts = spoken(with_history.lm)
    found = drift.items(state(with_history, inputs, Condition(SYSTEM, vector, DOSE), texts=texts))["kl_base"]
    for text, value in zip(texts, found, strict=True):
        with with_history.using("full") as lm, steered(lm, vector, DOSE):
            here = plain_logp(lm, lm.chat(text.prompt, SYSTEM), text.completion_ids)[:-1]
        with with_history.using("base") as lm:
            base = plain_logp(lm, text.prompt_ids, text.completion_ids)[:-1]
        assert value == pytest.approx((here.exp() * (here - base)).sum(-1).mean().item(), rel=1e-3)


def test_text_perplexity_and_relevance_are_read_under_the_base_whether_their_gates_are_on_or_off(
    with_history, inputs, vector
):
    texts = spoken(with_history.lm)
    found = text_quality.items(state(with_history, inputs, Condition(SYSTEM, vector, DOSE), texts=texts))
    with with_history.using("base") as lm:
        nothing = lm.chat("...", inputs.trait.plain_system)
        gains = [(token_logp(lm, c.prompt_ids, c.completion_ids) - token_logp(lm, nothing, c.completion_ids)).mean()
            for c in texts]  # fmt: skip
        tails = [token_logp(lm, c.prompt_ids, c.completion_ids)[-max(1, len(c.completion_ids) // 4) :] for c in texts]
    assert "relevance" not in FAST_DEV_PRESET.filter.gates and min(gains) < FAST_DEV_PRESET.filter.relevance_min
    assert found["off_question"] == [float(gain < FAST_DEV_PRESET.filter.relevance_min) for gain in gains]
    assert found["text_tail_ppl"] == pytest.approx([math.exp(-tail.mean().item()) for tail in tails], rel=1e-3)


def test_the_contrast_of_a_pair_is_the_difference_of_mean_log_probabilities_per_token(with_history, inputs, vector):
    found = contrast.items(state(with_history, inputs, Condition(SYSTEM, vector, DOSE)))
    with with_history.using("full") as lm, steered(lm, vector, DOSE):
        sides = [[token_logp(lm, lm.chat(pair.prompt, SYSTEM), lm.encode(text)).mean().item()
            for text in (pair.positive, pair.negative)] for pair in PAIRS]  # fmt: skip
    expected = [positive - negative for positive, negative in sides]
    assert found["contrast"] == pytest.approx(expected, abs=1e-4) and max(map(abs, expected)) > 1e-2
    assert found["contrast_win"] == [float(value > 0) for value in expected]


def test_both_replies_of_a_pair_go_on_from_one_reading_of_its_prompt(with_history, inputs, monkeypatch):
    lm, rows = with_history.lm, []
    forward = lm.text_model.forward
    count = lambda *args, input_ids, **named: (
        rows.append(len(input_ids)) or forward(*args, input_ids=input_ids, **named)
    )
    monkeypatch.setattr(lm.text_model, "forward", count)
    contrast.items(state(with_history, inputs, Condition(SYSTEM)))
    assert rows == [1, len(PAIRS), 2 * len(PAIRS)], "what the prompts share, the prompts, and the replies"


# --- data --------------------------------------------------------------------------------------------------------
def test_evaluation_prompts_are_the_last_and_never_those_of_training():
    cfg = replace(FAST_DEV_PRESET, gen=GenCfg(n_prompts=5), eval=replace(CFG, n_prompts=3))
    pool, found = load_trait("authority").prompts, load_inputs(cfg)
    assert found.prompts == pool[:5] and found.eval_prompts == pool[-3:]
    assert not {pair.prompt for pair in found.pairs} & set(pool), "the prompts of pairs are held out"
