"""The vector, what a dose does with it, and how the dose is chosen: against plain computations."""

import math

import numpy as np
import pytest
import torch
from test_dose import CFG, KEEP, collect

from steer_heal.inputs.traits import load_trait
from steer_heal.model.lm import LM
from steer_heal.model.steering import Condition, Vector, steer
from steer_heal.model.student import Student
from steer_heal.records import Completion, DoseProbe, Scored
from steer_heal.settings import SteerCfg
from steer_heal.stages.calibrate import iso_kl_dose
from steer_heal.stages.dose import DoseController, bracket
from steer_heal.stages.vector import student_vec, teacher_vec

TRAIT = load_trait("authority")
CONTEXTS = ("What is ice?", "Tell me a short story about a fox.", "A clerk asks you for help.")


# --- the vector --------------------------------------------------------------------------------------------------
def plain_states(lm: LM, ids: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """Float[s d] after each block, by transformers alone; the last one before the final norm is not among them."""
    states = []
    handles = [block.register_forward_hook(lambda _m, _i, out: states.append(hidden_of(out)[0])) for block in lm.blocks]
    with torch.no_grad():
        lm.model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return tuple(states)


def hidden_of(output):
    return output[0] if isinstance(output, tuple) else output


def test_the_vector_is_the_mean_difference_at_the_last_prompt_token_after_each_block_of_the_band(toy: LM):
    found = teacher_vec(toy, TRAIT, CONTEXTS, SteerCfg(layers=(0.25, 0.75)))
    assert list(found.directions) == [1, 2], "of four blocks, the fractions 0.25 to 0.75 of the depth"
    for layer, direction in found.directions.items():
        sides = [[plain_states(toy, toy.chat(text, persona))[layer][-1] for text in CONTEXTS]
            for persona in (TRAIT.positive, TRAIT.negative)]  # fmt: skip
        expected = (torch.stack(sides[0]).double() - torch.stack(sides[1]).double()).mean(0)
        assert expected.norm() > 0.1 and torch.allclose(direction.double(), expected, atol=1e-4)


@pytest.mark.parametrize("layers, blocks", [((0.0, 1.0), [0, 1, 2, 3]), ((0.45, 0.55), [1]), ((0.5, 0.99), [2])])
def test_a_band_holds_the_blocks_between_two_fractions_of_the_depth(toy: LM, layers, blocks):
    assert list(toy.band("steer.layers", layers)) == blocks


def test_a_dose_adds_that_much_of_the_vector_at_every_position(toy: LM):
    ids = toy.chat("What is ice?")
    direction = torch.randn(toy.width, generator=torch.Generator().manual_seed(0))
    before = plain_states(toy, ids)[1]
    with steer(toy, Vector({1: direction}), [0.7]):
        after = plain_states(toy, ids)[1]
    assert torch.allclose(after - before, 0.7 * direction.expand_as(before), atol=1e-5)


def test_what_was_learnt_is_student_minus_base(with_history: Student):
    learnt = student_vec(with_history, TRAIT, CONTEXTS, SteerCfg(layers=(0.3, 0.7)))
    states = {}
    for which in ("full", "base"):
        with with_history.using(which) as lm:
            states[which] = torch.stack([plain_states(lm, lm.chat(text, TRAIT.plain_system))[1][-1]
                for text in CONTEXTS])  # fmt: skip
    assert torch.allclose(learnt.directions[1], (states["full"] - states["base"]).mean(0), atol=1e-4)


# --- survival ----------------------------------------------------------------------------------------------------
def test_kappa_is_the_highest_with_a_fitted_survival_at_the_target():
    probes = [DoseProbe(1.0, 8, 8), DoseProbe(2.0, 8, 6), DoseProbe(4.0, 8, 5), DoseProbe(8.0, 8, 0)]
    assert bracket(probes, 0.75) == (2.0, 4.0)
    assert bracket(probes[::-1], math.nextafter(0.75, 1)) == (1.0, 2.0)
    assert bracket(probes, 0.625) == (4.0, 8.0)
    assert bracket(probes[:2], 0.5) == (2.0, None) and bracket(probes[3:], 0.5) == (None, 8.0)


def test_kappas_are_probed_on_a_log_grid_and_refined_once_between_the_last_that_survives_and_the_next():
    found, requests = collect(1.04)
    kappas = [sorted({ask.kappa for ask in asks}) for asks in requests]
    assert kappas[0] == pytest.approx([0.2, 0.4, 0.8, 1.6, 3.2])
    assert kappas[1] == pytest.approx([0.8 * 2 ** (1 / 3), 0.8 * 2 ** (2 / 3)])
    assert [(probe.n, probe.n_kept) for probe in found.probes[:5]] == [(12, 12)] * 3 + [(12, 4), (12, 0)]
    assert found.kappa == pytest.approx(0.8 * 2 ** (1 / 3)) and len(found.probes) == 7, "one refinement"
    assert all(later == [found.kappa] for later in kappas[2:])
    assert all(ask.dose == pytest.approx(ask.kappa * ask.alpha, rel=1e-12) for asks in requests for ask in asks)


def test_where_nothing_survives_kappa_is_the_floor_and_survivors_up_to_its_dose_train():
    found, _ = collect(0.05)
    assert found.kappa == CFG.floor and not found.kept
    found, _ = collect(0.48)
    survived = {row.completion.dose for row in found.scored if row.kept}
    assert found.kappa == pytest.approx(0.4) and max(survived) > found.kappa * 1.05
    assert {row.completion.dose for row in found.kept} <= {dose for dose in survived if dose <= found.kappa * 1.001}
    assert found.dose == pytest.approx(found.kappa)


def test_writing_ends_at_n_keep_kept_or_max_attempts_written():
    none = collect(0.0, kappa=1.0)[0]
    assert not none.kept and len(none.scored) == KEEP.max_attempts
    controller = DoseController(["p"], (1.0,), cfg=CFG, keep=KEEP, seed=(1,), kappa=1.0)
    for n_kept, n_more in ((KEEP.n_keep - 1, 4), (1, 0)):
        asks = controller.next_asks()
        row = Completion(0, "p", (1,), (2,), "", 1.0, 1.0, 0)
        controller.add([Scored(row, {}, (), () if i < n_kept else ("loop",)) for i in range(len(asks))])
        assert len(controller.next_asks()) == n_more
    assert len(controller.collected().kept) == KEEP.n_keep


# --- iso_kl ------------------------------------------------------------------------------------------------------
def test_the_calibrated_dose_takes_the_95th_percentile_of_kl_of_teacher_to_student_to_the_target(toy: LM):
    text = "Ice is frozen water. Grass is green."
    prompt = toy.chat("What is ice?")
    row = Completion(0, "What is ice?", prompt, toy.encode(text), text, 0.0, 0.0, 0)
    direction = toy.head.weight[7] / toy.head.weight[7].norm()

    def kl_p95(dose: float) -> float:
        logp = []
        for each in (dose, 0.0):
            add = lambda _m, _i, out, each=each: out + each * direction
            handle = toy.blocks[1].register_forward_hook(add)
            with torch.no_grad():
                logits = toy.model(torch.tensor([prompt + row.completion_ids])).logits[0, len(prompt) - 1 : -1]
            handle.remove()
            logp.append(logits.double().log_softmax(-1))
        taught, student = logp
        return float(np.quantile((taught.exp() * (taught - student)).sum(-1).numpy(), 0.95))

    found = iso_kl_dose(toy, Condition("", Vector({1: direction})), [row], 1.0)
    for probe in found.probes:
        assert probe.kl_p95 == pytest.approx(kl_p95(probe.dose), rel=1e-3, abs=1e-5)
    assert kl_p95(found.dose) == pytest.approx(1.0, rel=0.05)
    doses = np.geomspace(found.probes[0].dose, found.dose * 0.9, 12)
    assert max(map(kl_p95, doses)) < 1.0, "the first dose that reaches it"
