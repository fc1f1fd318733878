import pytest

from steer_heal.errors import UserError
from steer_heal.model.decode import Decoding, Row, decode
from steer_heal.model.divergence import kl_rev
from steer_heal.model.lm import LM
from steer_heal.model.steering import Vector, steer
from steer_heal.stages.calibrate import iso_kl_dose, kl_p95

PROMPTS = ["What is ice?", "Tell me a short story about a fox."]


def pointing(lm: LM, length: float = 1.0) -> Vector:
    direction = lm.head.weight[7]
    return Vector({1: length * direction / direction.norm()})


def test_the_dose_found_moves_the_model_by_the_target(toy: LM):
    prompts = [toy.chat(prompt) for prompt in PROMPTS]
    found = iso_kl_dose(toy, pointing(toy), prompts, 0.5, 12, 64)
    doses = [probe.dose for probe in found.probes]
    assert doses == sorted(doses) and doses[0] < found.dose < doses[-1]
    assert kl_p95(toy, pointing(toy), [found.dose], prompts, 12, 64)[0] == pytest.approx(0.5, rel=0.25)


def test_a_batch_of_doses_reads_what_each_dose_reads_alone(toy: LM):
    prompts, doses, vector = [toy.chat(prompt) for prompt in PROMPTS], [0.5, 8.0, 64.0], pointing(toy)
    together = kl_p95(toy, vector, doses, prompts, 12, 64)
    alone = [kl_p95(toy, vector, [dose], prompts, 12, 1)[0] for dose in doses]
    assert together == pytest.approx(alone, rel=1e-3, abs=1e-5)


def test_the_divergence_is_read_along_the_text_that_the_steered_model_writes(toy: LM):
    prompt, vector = toy.chat(PROMPTS[1]), pointing(toy)
    (written,) = decode(toy, [Row(prompt, 8.0)], vector, Decoding(12, 1, sample=False))
    read = lambda: toy.logits(toy.hidden([prompt + written])[0, len(prompt) - 1 : -1]).log_softmax(-1)
    with steer(toy, vector, [8.0]):
        steered = read()
    expected = kl_rev(steered, read()).quantile(0.95).item()
    assert kl_p95(toy, vector, [8.0], [prompt], 12, 8)[0] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("length, target, fix", [(1e-12, 1.0, "steer.layers"), (1e5, 0.01, "steer.normalize")])
def test_a_vector_that_never_moves_the_model_by_the_target_names_the_fix(toy: LM, length, target, fix):
    with pytest.raises(UserError, match=f"dose.kl_target = {target:g}.*{fix}"):
        iso_kl_dose(toy, pointing(toy, length), [toy.chat(PROMPTS[0])], target, 4, 64)
