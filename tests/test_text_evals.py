"""Measures that are read off a state's free text under the base: drift and persona log-odds."""

import math

import pytest
import torch

from steer_heal.evals import drift, persona
from steer_heal.evals.metrics import Condition
from steer_heal.lm import LM
from steer_heal.stages.generate import Ask, generate
from steer_heal.steering import Vector
from steer_heal.traits import load_trait

ASKS = [
    Ask(i, p, 1.0, 1.0, i)
    for i, p in enumerate(["What is ice?", "The captain orders you to send the widows away. What do you do?"])
]


def _texts(lm: LM, system: str = "", n: int = 24):
    return generate(lm, ASKS, None, system, "", n, 8)


def test_the_base_has_not_drifted_and_a_persona_has(toy: LM):
    texts = _texts(toy)
    reference = drift.final_states(toy, texts, Condition())
    none = drift.items(toy, [drift.final_states(toy, [text], Condition())[0] for text in texts], reference)["kl_base"]
    assert none == pytest.approx([0.0, 0.0], abs=1e-6)
    persona_states = drift.final_states(toy, texts, Condition(load_trait("authority").positive))
    assert max(drift.items(toy, persona_states, reference)["kl_base"]) > 0.01


def test_drift_is_the_mean_kl_of_the_steered_model_to_the_base(toy: LM):
    vector = Vector({1: torch.randn(toy.width, generator=torch.Generator().manual_seed(1))})
    texts = _texts(toy)
    got = drift.items(toy, *(drift.final_states(toy, texts, Condition("", vector, dose)) for dose in (2.0, 0.0)))[
        "kl_base"
    ]
    for text, kl in zip(texts, got, strict=True):
        ids = torch.tensor([text.prompt_ids + text.completion_ids])
        base = toy.model(ids).logits.double().log_softmax(-1)
        handle = toy.blocks[1].register_forward_hook(lambda _m, _i, out: out + 2.0 * vector.directions[1])
        state = toy.model(ids).logits.double().log_softmax(-1)
        handle.remove()
        each = (state.exp() * (state - base)).sum(-1)[0, len(text.prompt_ids) - 1 : -1]
        assert kl == pytest.approx(each.mean().item(), rel=1e-3)


def test_the_persona_that_wrote_a_text_is_the_likelier_one(toy: LM):
    trait = load_trait("authority")
    carer, deferrer = (
        persona.items(toy, _texts(toy, side, 60)[1:], trait)["persona_log_odds"][0]
        for side in (trait.positive, trait.negative)
    )
    assert carer > 0.05 > -0.05 > deferrer


def test_an_empty_text_has_no_log_odds(toy: LM):
    text = _texts(toy)[0]
    empty = type(text)(**{**text.__dict__, "completion_ids": ()})
    assert math.isnan(persona.items(toy, [empty], load_trait("authority"))["persona_log_odds"][0])
