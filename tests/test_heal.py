import copy
from dataclasses import replace

import pytest
import torch
from conftest import scramble

from steer_heal.lm import LM
from steer_heal.records import UserError
from steer_heal.stages.bake import Student
from steer_heal.stages.heal import heal, reference_samples, schedule, split_by_prompt
from steer_heal.stages.loss import losses


def _factors(student: Student) -> dict[str, torch.Tensor]:
    return student.factors("round")


def test_lam_0_and_nll_train_the_same_adapter(tiny: LM, kept, heal_cfg):
    out = []
    for cfg in (replace(heal_cfg, lam=0.0), replace(heal_cfg, divergence="nll")):
        student = Student(tiny, cfg)
        report = heal(student, kept, 0, cfg, seed=3)
        out.append((_factors(student), [step.sft for step in report.steps]))
        student.discard_round()
    assert out[0][1] == out[1][1]
    assert all(torch.equal(out[0][0][k], out[1][0][k]) for k in out[0][0])


def test_training_lowers_the_loss_and_the_barrier_holds_the_divergence(tiny: LM, kept, heal_cfg):
    reports = {}
    for name, cfg in {
        "free": replace(heal_cfg, lam=0.0, epochs=6),
        "held": replace(heal_cfg, lam=20.0, epochs=6),
    }.items():
        student = Student(tiny, cfg)
        reports[name] = heal(student, kept, 0, cfg, seed=3)
        student.discard_round()
    assert reports["free"].steps[-1].sft < 0.9 * reports["free"].steps[0].sft
    assert reports["held"].steps[-1].divergence < 0.5 * reports["free"].steps[-1].divergence
    assert reports["held"].steps[-1].pressure > 0 and reports["free"].steps[-1].pressure == 0


@pytest.mark.parametrize("apart", [False, True])
def test_gradients_with_a_baked_history_are_those_of_a_plainly_merged_model(
    apart, with_history: Student, kept, heal_cfg, monkeypatch
):
    cfg, lm = heal_cfg, with_history.lm
    assert not with_history.merging_is_lossy, "float32"
    monkeypatch.setattr(Student, "merging_is_lossy", apart)
    samples = reference_samples(with_history, kept[:4], cfg)
    with_history.new_round(9)
    scramble(with_history, 9, scale=0.05)
    own = _factors(with_history)

    def gradients(student: Student) -> dict[str, torch.Tensor]:
        with student.training() as parameters:
            sft, divergence = losses(student.lm, samples, cfg)
            (sft + divergence).mean().backward()
            names = [name for name, p in student._peft.named_parameters() if p.requires_grad]
            return {name: p.grad.clone() for name, p in zip(names, parameters, strict=True)}

    found = gradients(with_history)
    with with_history.gate("prev"):
        merged_weights = {name: m.get_base_layer().weight.data.clone() for name, m in with_history._layers()}
    plain = copy.deepcopy(lm.model)
    for module in list(plain.modules()):
        for child_name, child in list(module.named_children()):
            if hasattr(child, "get_base_layer"):
                setattr(module, child_name, child.get_base_layer())
    merged = Student(replace(lm, model=plain), cfg)
    for name, weight in merged_weights.items():
        plain.get_submodule(name.removeprefix("base_model.model.")).weight.data = weight
    merged.new_round(9)
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(merged._peft, own, adapter_name="round")
    expected = gradients(merged)
    assert found.keys() == expected.keys() and len(found) > 0
    for name, gradient in found.items():
        assert torch.allclose(gradient, expected[name], rtol=1e-3, atol=1e-5), name
    history_free = Student(tiny_again(), cfg)
    history_free.new_round(9)
    set_peft_model_state_dict(history_free._peft, own, adapter_name="round")
    without = gradients(history_free)
    assert any(not torch.allclose(gradient, without[name], rtol=1e-2, atol=1e-4) for name, gradient in found.items())


def tiny_again() -> LM:
    from steer_heal.lm import load

    return load("tiny-random")


def test_chunks_of_the_head_change_neither_loss_nor_gradient(tiny: LM, kept, heal_cfg, monkeypatch):
    student = Student(tiny, heal_cfg)
    samples = reference_samples(student, kept[:4], heal_cfg)
    student.new_round(0)
    scramble(student, 0)

    def read():
        with student.training() as parameters:
            sft, divergence = losses(tiny, samples, heal_cfg)
            grads = torch.autograd.grad((sft + divergence).mean(), parameters)
        return sft, divergence, grads

    whole = read()
    monkeypatch.setattr(LM, "chunk_size", 7)
    chunked = read()
    assert torch.allclose(whole[0], chunked[0], atol=1e-5) and torch.allclose(whole[1], chunked[1], atol=1e-5)
    for a, b in zip(whole[2], chunked[2]):
        assert (a - b).norm() <= 1e-4 * a.norm()


def test_the_head_sees_completion_positions_only(tiny: LM, kept, heal_cfg):
    student = Student(tiny, heal_cfg)
    seen = []
    samples = reference_samples(student, kept[:3], heal_cfg)
    handle = tiny.head.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0].shape[0]))
    losses(tiny, samples, heal_cfg)
    handle.remove()
    assert sum(seen) == 2 * sum(len(sample.completion_ids) for sample in samples)


def test_the_end_of_turn_is_trained(tiny: LM, kept, heal_cfg):
    student = Student(tiny, heal_cfg)
    samples = reference_samples(student, kept[:2], heal_cfg)
    assert all(sample.completion_ids[-1] == tiny.tokenizer.eos_token_id for sample in samples)
    sft, _ = losses(tiny, samples[:1], heal_cfg)
    nll = tiny.completion_nll([samples[0].prompt_ids], [samples[0].completion_ids])[0]
    assert sft[0].item() == pytest.approx(nll.mean().item(), abs=1e-4)


def test_validation_shares_no_prompt_with_training(tiny: LM, kept, heal_cfg):
    samples = reference_samples(Student(tiny, heal_cfg), kept, heal_cfg)
    for seed in range(5):
        train, validation = split_by_prompt(samples, seed)
        assert train and validation and len(train) + len(validation) == len(samples)
        assert not {s.prompt_index for s in train} & {s.prompt_index for s in validation}
    with pytest.raises(UserError, match="answer one prompt"):
        split_by_prompt(samples[:1], 0)


def test_the_first_step_already_learns():
    rates = [schedule(step, 40) for step in range(40)]
    assert rates[0] > 0 and max(rates) == 1.0 and rates[-1] < 0.02
    assert [schedule(step, 3) for step in range(3)][0] > 0


def test_the_reference_is_prev_or_base_and_gates_what_the_divergence_measures(with_history: Student, kept, heal_cfg):
    lm = with_history.lm
    for reference in ("prev", "base"):
        cfg = replace(heal_cfg, reference=reference)
        samples = reference_samples(with_history, kept[:2], cfg)
        with with_history.gate(reference):
            assert losses(lm, samples, cfg)[1].max() < 1e-3
    assert losses(lm, samples, cfg)[1].max() < 1e-3  # outside of a gate the model is the base
    with with_history.gate("full"):
        assert losses(lm, samples, cfg)[1].min() > 1e-2


def test_adapters_train_in_float32_under_a_bfloat16_model(kept, heal_cfg):
    lm = tiny_again()
    lm.model.to(torch.bfloat16)
    cfg = replace(heal_cfg, lr=1e-4)
    student = Student(lm, cfg)
    student.new_round(3)
    before = _factors(student)
    student.discard_round()
    heal(student, kept, 0, cfg, seed=3)
    after = _factors(student)
    moved = [(after[k] != before[k]).float().mean().item() for k in after]
    assert all(p.dtype == torch.float32 for n, p in student._peft.named_parameters() if ".lora_" in n)
    assert min(moved) > 0.99


def test_in_low_precision_the_history_acts_apart_and_the_divergence_starts_at_0(kept, heal_cfg):
    lm = tiny_again()
    lm.model.to(torch.bfloat16)
    student = Student(lm, heal_cfg)
    student.new_round(0)
    scramble(student, 0, scale=0.1)
    student.bake()
    assert student.merging_is_lossy
    samples = reference_samples(student, kept[:4], heal_cfg)
    with student.gate("prev"):
        rounded = [lm.hidden([sample.ids])[0, len(sample.prompt_ids) - 1 : -1] for sample in samples]
    student.new_round(1)
    with student.training():
        start, merged = (
            losses(lm, each, heal_cfg)[1].max()
            for each in (samples, [replace(s, reference=h) for s, h in zip(samples, rounded, strict=True)])
        )
    assert start < 1e-4 < merged, "where the reference is read merged, it begins with the rounding"


def test_a_loss_that_is_not_a_number_stops_with_the_step(tiny: LM, kept, heal_cfg):
    with pytest.raises(UserError, match="at step .* of round 2, on an answer to prompt .*; lower --heal.lr"):
        cfg = replace(heal_cfg, lr=1e30)
        heal(Student(tiny, cfg), kept, 2, cfg, seed=0)


def test_lam_decays_over_rounds(tiny: LM, kept, heal_cfg):
    cfg = replace(heal_cfg, lam=0.8, lam_power=0.5, epochs=1)
    student = Student(tiny, cfg)
    assert heal(student, kept, 3, cfg, seed=0).lam == pytest.approx(0.4)


def test_tau_follows_its_own_schedule(tiny: LM, kept, heal_cfg):
    cfg = replace(heal_cfg, tau=0.8, tau_power=1.0, epochs=1)
    student = Student(tiny, cfg)
    taus = []
    for r in (0, 3):
        taus.append(heal(student, kept, r, cfg, seed=1).tau)
        student.discard_round()
    assert taus == pytest.approx([0.8, 0.2])


@pytest.mark.parametrize("divergence", ["nll", "kl_rev"])
def test_the_spectral_penalty_shrinks_the_update_under_any_divergence(tiny: LM, kept, heal_cfg, divergence):
    sizes = {}
    for weight in (0.0, 10.0):
        cfg = replace(heal_cfg, divergence=divergence, spectral=weight, epochs=4)
        student = Student(tiny, cfg)
        heal(student, kept, 0, cfg, seed=1)
        sizes[weight] = max(
            torch.linalg.matrix_norm(scale * b @ a, 2).item() for a, b, scale in student.round_updates()
        )
        student.discard_round()
    assert 0 < sizes[10.0] < 0.5 * sizes[0.0]
