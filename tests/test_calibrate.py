import pytest
import torch

from steer_heal.divergence import kl_rev
from steer_heal.lm import LM
from steer_heal.records import UserError
from steer_heal.stages.iso_kl import iso_kl_dose, kl_p95
from steer_heal.steering import Vector, steer

PROMPTS = ["What is ice?", "Tell me a short story about a fox."]


def _unit(lm: LM) -> Vector:
    direction = torch.randn(lm.width, generator=torch.Generator().manual_seed(0))
    return Vector({1: direction / direction.norm()})


def test_the_dose_found_moves_the_model_by_the_target(toy: LM):
    prompts = [toy.chat(p) for p in PROMPTS]
    dose, probes = iso_kl_dose(toy, _unit(toy), prompts, 0.5, 16, 64)
    assert [p.dose for p in probes] == sorted(p.dose for p in probes)
    assert kl_p95(toy, _unit(toy), [dose], prompts, 16, 64)[0] == pytest.approx(0.5, rel=0.25)


def test_a_batch_of_doses_reads_what_each_dose_reads_alone(toy: LM):
    prompts, doses = [toy.chat(p) for p in PROMPTS], [0.5, 8.0, 64.0]
    together = kl_p95(toy, _unit(toy), doses, prompts, 12, 64)
    assert together == pytest.approx(
        [kl_p95(toy, _unit(toy), [d], prompts, 12, 1)[0] for d in doses], rel=1e-3, abs=1e-5
    )
    with steer(toy, _unit(toy), [8.0]):
        steered = toy.logits(toy.hidden([prompts[0]])[0, -1:]).log_softmax(-1)
    plain = toy.logits(toy.hidden([prompts[0]])[0, -1:]).log_softmax(-1)
    assert kl_p95(toy, _unit(toy), [8.0], prompts[:1], 1, 8)[0] == pytest.approx(
        kl_rev(steered, plain).item(), rel=1e-3
    )


def test_a_vector_that_does_nothing_is_dead(toy: LM):
    with pytest.raises(UserError, match="the vector is dead.*steer.layers"):
        iso_kl_dose(toy, Vector({1: torch.full((toy.width,), 1e-12)}), [toy.chat(PROMPTS[0])], 1.0, 4, 64)


def test_a_vector_that_is_too_long_for_the_bracket_says_normalize(toy: LM):
    with pytest.raises(UserError, match="use --steer.normalize"):
        iso_kl_dose(toy, Vector({1: 1e5 * _unit(toy).directions[1]}), [toy.chat(PROMPTS[0])], 0.01, 4, 64)
