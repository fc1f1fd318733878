import math
from dataclasses import replace

import pytest
import torch
from conftest import ADAPTER, scramble
from transformers import AutoModelForCausalLM

from steer_heal.errors import UserError
from steer_heal.model.divergence import DIVERGENCES, kl_rev
from steer_heal.model.lm import LM, load
from steer_heal.model.student import Student
from steer_heal.records import NotFinite
from steer_heal.stages import heal as heal_module
from steer_heal.stages.heal import HealState, SavedHeal, heal, not_finite, read_pairs, read_samples, split_by_prompt
from steer_heal.stages.loss import losses


def healed(student: Student, kept, cfg, round_: int | None = 0, **more):
    """(factors, report) of a heal from the student as it is now."""
    student.discard_round()
    report = heal(student, kept, cfg, round_=round_, seed=3, **more)
    return student.factors("round"), report


def test_training_lowers_the_loss_and_the_barrier_holds_the_divergence(student, kept, heal_cfg):
    free, held = (healed(student, kept, replace(heal_cfg, lam=lam, epochs=6))[1] for lam in (0.0, 20.0))
    assert free.steps[-1].fit < 0.9 * free.steps[0].fit and free.validation[-1]["fit"] < 0.9 * free.validation[0]["fit"]
    assert held.steps[-1].divergence < 0.5 * free.steps[-1].divergence
    assert held.pressure > 0 and free.steps[-1].pressure == 0 and free.pressure is None
    assert held.fired > 0.5 and free.fired == 0
    assert [point["epoch"] for point in held.validation] == list(range(7))
    assert held.validation[0]["divergence"] < 1e-3, "a heal starts at its reference"


def test_a_divergence_needs_no_slope_written_by_hand(student, kept, heal_cfg, monkeypatch):
    monkeypatch.setitem(
        DIVERGENCES, "mine", DIVERGENCES["kl_rev"]._replace(value=lambda p, q: kl_rev(p, q), slope=None)
    )
    known, own = (healed(student, kept, replace(heal_cfg, divergence=name))[1] for name in ("kl_rev", "mine"))
    for a, b in zip(known.steps, own.steps, strict=True):
        assert (a.fit, a.divergence, a.pressure) == pytest.approx((b.fit, b.divergence, b.pressure), rel=1e-3, abs=1e-5)


def test_a_heal_that_is_resumed_after_any_step_ends_bit_for_bit_where_the_whole_one_does(student, kept, heal_cfg):
    cfg = replace(heal_cfg, spectral=0.1)
    saved = []

    def on_step(state: HealState) -> None:
        shared = state.saved()
        saved.append(SavedHeal({name: t.clone() for name, t in shared.tensors.items()}, shared.steps, shared.curve))

    factors, report = healed(student, kept, cfg, on_step=on_step)
    per_epoch = len(saved) // 2
    assert [len(each.steps) for each in saved] == list(range(1, len(saved) + 1))
    for n in (1, per_epoch - 1, per_epoch, per_epoch + 1, len(saved)):
        again, same_report = healed(student, kept, cfg, saved=saved[n - 1])
        assert same_report == report
        assert all(torch.equal(again[key], factors[key]) for key in factors), f"after {n} steps"


@pytest.mark.parametrize("apart", [False, True])
def test_gradients_with_a_baked_history_are_those_of_a_plainly_merged_model(
    apart, with_history: Student, kept, heal_cfg, monkeypatch, tmp_path
):
    samples = read_samples(with_history, kept[:4], heal_cfg)
    with_history.export(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).requires_grad_(False)

    def gradients(student: Student) -> list[torch.Tensor]:
        student.new_round(9)
        scramble(student, 9, scale=0.05)
        with student.training() as parameters:
            assert sum(p.requires_grad for p in student.lm.model.parameters()) == len(parameters)
            ce, divergence = losses(student.lm, samples, heal_cfg)
            return torch.autograd.grad((ce + divergence).mean(), parameters)

    merged = gradients(Student(replace(with_history.lm, model=plain), ADAPTER))
    without = gradients(Student(load("tiny-random"), ADAPTER))
    assert not with_history.adapter.merging_is_lossy, "float32"
    monkeypatch.setattr(type(with_history.adapter), "merging_is_lossy", apart)
    found = gradients(with_history)
    assert len(found) > 0 and all(
        torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(found, merged, strict=True)
    )
    assert any(not torch.allclose(a, b, rtol=1e-2, atol=1e-4) for a, b in zip(found, without, strict=True))


def test_the_head_sees_completion_positions_only(student, kept, heal_cfg):
    samples = read_samples(student, kept[:3], heal_cfg)
    seen = []
    handle = student.lm.head.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0].shape[0]))
    losses(student.lm, samples, heal_cfg)
    handle.remove()
    assert sum(seen) == 2 * sum(len(sample.completion_ids) for sample in samples)


@pytest.fixture
def low_precision() -> LM:
    lm = load("tiny-random")
    lm.model.to(torch.bfloat16)
    return lm


def test_adapters_train_in_float32_under_a_bfloat16_model(low_precision: LM, kept, heal_cfg):
    student = Student(low_precision, ADAPTER)
    student.new_round(3)
    before = student.factors("round")
    after, _ = healed(student, kept, replace(heal_cfg, lr=1e-4))
    assert min((after[key] != before[key]).float().mean().item() for key in after) > 0.99
    with student.training() as parameters:
        assert {parameter.dtype for parameter in parameters} == {torch.float32}


def test_in_low_precision_the_history_acts_apart_and_the_divergence_starts_at_0(low_precision: LM, kept, heal_cfg):
    lm = low_precision
    student = Student(lm, ADAPTER)
    student.new_round(0)
    scramble(student, 0, scale=0.1)
    student.bake()
    samples = read_samples(student, kept[:4], heal_cfg)
    with student.using("prev"):
        rounded = [lm.hidden([sample.ids])[0, len(sample.prompt_ids) - 1 : -1] for sample in samples]
    student.new_round(1)
    read_merged = [replace(sample, reference=state) for sample, state in zip(samples, rounded, strict=True)]
    with student.training():
        start, merged = (losses(lm, each, heal_cfg)[1].max() for each in (samples, read_merged))
    assert start < 1e-4 < merged, "where the reference is read merged, it begins with the rounding"


def test_a_loss_that_is_not_a_number_names_the_step_and_the_answer(student, kept, heal_cfg, monkeypatch):
    monkeypatch.setattr(heal_module, "schedule", lambda step, n_steps: 1e30)
    with pytest.raises(NotFinite) as stopped:
        heal(student, kept, heal_cfg, round_=2, seed=0)
    bad = stopped.value
    assert bad.step > 0 and bad.text
    assert any(row.text.startswith(bad.text) for row in kept if row.prompt_index == bad.prompt_index)
    assert f"step {bad.step} of round 3" in str(bad) and "heal.lr" in str(bad)
    student.discard_round()
    with pytest.raises(NotFinite, match="of the control, on an answer to prompt"):
        heal(student, kept, heal_cfg, round_=None, seed=0)


def test_a_loss_that_is_not_a_number_on_a_rehearsed_text_says_so(student, kept, heal_cfg):
    sample = replace(read_samples(student, kept[:1], heal_cfg)[0], rehearsed=True)
    error = not_finite(student.lm, [sample], heal_cfg, loss=math.nan, norm=1.0, step=3, round_=0)
    assert "on a rehearsed text that begins" in str(error) and error.prompt_index is None


# --- pairs -------------------------------------------------------------------------------------------------------
def log_p(student: Student, completions) -> torch.Tensor:
    """log p of each whole completion under the model as it is now, in nats."""
    nlls = student.lm.completion_nll([c.prompt_ids for c in completions], [c.completion_ids for c in completions])
    return -torch.stack([nll.sum() for nll in nlls])


def against(kept):
    """Rejected answers: the same tokens backwards, without the first few of them, so that lengths differ."""
    return [replace(c, completion_ids=c.completion_ids[::-1][i % 4 :]) for i, c in enumerate(kept)]


@pytest.mark.parametrize("reference", ["prev", "base"])
def test_the_loss_of_a_pair_is_that_of_direct_preference_optimisation(with_history: Student, kept, heal_cfg, reference):
    cfg = replace(heal_cfg, reference=reference)
    chosen, rejected, beta = kept[:4], against(kept[:4]), 0.05
    pairs = read_pairs(with_history, chosen, rejected, cfg=cfg, beta=beta)
    with with_history.using(reference):
        before = log_p(with_history, chosen) - log_p(with_history, rejected)
    with_history.new_round(3)
    scramble(with_history, 3, scale=0.2)
    with with_history.using("full"):
        margin = log_p(with_history, chosen) - log_p(with_history, rejected) - before
        fits, divergences = losses(with_history.lm, pairs, cfg)
    assert margin.abs().max() > 1
    assert torch.allclose(fits, torch.log1p(torch.exp(-beta * margin)), rtol=1e-3, atol=1e-4)
    assert divergences.shape == (4,) and divergences.min() > 0


def test_a_heal_on_pairs_makes_the_chosen_answers_likelier_than_the_rejected_ones(student, kept, heal_cfg):
    cfg = replace(heal_cfg, divergence="none", epochs=4, lr=3e-3)
    rejected = against(kept)
    report = healed(student, kept, cfg, rejected=rejected, beta=0.1)[1]
    assert report.validation[0]["fit"] == pytest.approx(math.log(2), abs=1e-3), "a heal starts at its reference"
    assert report.validation[-1]["fit"] < 0.5 * math.log(2) and report.n_train + report.n_validation == len(kept)
    margins = []
    for state in ("prev", "full"):
        with student.using(state):
            margins.append(log_p(student, kept) - log_p(student, rejected))
    held_out = [i for i, c in enumerate(kept) if c.prompt_index in report.validation_prompts]
    assert (margins[1] - margins[0])[held_out].min() > 0


def test_answers_to_one_prompt_cannot_be_split(student, kept, heal_cfg):
    with pytest.raises(UserError, match="gen.n-prompts"):
        split_by_prompt(read_samples(student, kept[:1], heal_cfg), 0)
