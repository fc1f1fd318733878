from dataclasses import replace

import pytest
import torch

from steer_heal.errors import UserError
from steer_heal.model.decode import Decoding
from steer_heal.model.lm import LM
from steer_heal.model.steering import Condition, Vector
from steer_heal.records import Completion
from steer_heal.stages.calibrate import contrast_strength, iso_kl_dose
from steer_heal.stages.generate import Ask, generate
from steer_heal.stages.states import final_states, kl_between

PROMPTS = ["What is ice?", "Tell me a short story about a fox."]
PERSONA = "You do as you are told."


def pointing(lm: LM, length: float = 1.0) -> Vector:
    direction = lm.head.weight[7]
    return Vector({1: length * direction / direction.norm()})


def own_texts(lm: LM) -> list[Completion]:
    asks = [Ask(i, prompt, seed=i) for i, prompt in enumerate(PROMPTS)]
    return generate(lm, asks, Condition(), plain_system="", how=Decoding(12, 2))


def kl_p95(lm: LM, teacher: Condition, texts: list[Completion]) -> float:
    pairs = zip(final_states(lm, texts, teacher), final_states(lm, texts), strict=True)
    return torch.cat([kl_between(lm, *pair) for pair in pairs]).quantile(0.95).item()


def test_beside_a_persona_the_dose_takes_the_teacher_as_far_from_the_student_as_the_target(toy: LM):
    system, texts = PERSONA, own_texts(toy)
    target = 0.5 + kl_p95(toy, Condition(system), texts)
    found = iso_kl_dose(toy, Condition(system, pointing(toy)), texts, target)
    doses = [probe.dose for probe in found.probes]
    assert doses == sorted(doses) and doses[0] < found.dose < doses[-1]
    assert kl_p95(toy, Condition(system, pointing(toy), found.dose), texts) == pytest.approx(target, rel=0.25)


def test_a_prompt_that_is_past_the_target_alone_leaves_no_room_for_a_dose(toy: LM):
    texts = own_texts(toy)
    target = kl_p95(toy, Condition(PERSONA), texts) / 2
    assert target > 0 and iso_kl_dose(toy, Condition(PERSONA, pointing(toy)), texts, target).dose == 0.0
    under = [replace(text, prompt_ids=toy.chat(text.prompt, PERSONA)) for text in texts]
    assert iso_kl_dose(toy, Condition("", pointing(toy)), under, target / 2).dose == 0.0, "the other way round"


def test_a_teacher_whose_numbers_overflow_is_not_one_that_moves_nothing(toy: LM):
    states = final_states(toy, own_texts(toy)[:1])
    with pytest.raises(UserError, match="logits of a teacher of model .* goes beyond float32"):
        contrast_strength(toy, states, [torch.full_like(states[0], torch.inf)], 0.1)


@pytest.mark.parametrize("length, target, fix", [(1e-12, 1.0, "steer.layers"), (1e5, 0.01, "steer.normalize")])
def test_a_vector_that_never_moves_the_model_by_the_target_names_the_fix(toy: LM, length, target, fix):
    with pytest.raises(UserError, match=f"dose.kl_target = {target:g}.*{fix}"):
        iso_kl_dose(toy, Condition("", pointing(toy, length)), own_texts(toy), target)
