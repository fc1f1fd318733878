"""A step of the heal in any number of passes, with activations kept or computed again, through a card that is full."""

import warnings
from dataclasses import replace

import pytest
import torch
from conftest import scramble

from steer_heal.divergence import barrier
from steer_heal.lm import LM
from steer_heal.records import UserError
from steer_heal.stages.bake import Student
from steer_heal.stages.heal import heal, reference_samples, validate
from steer_heal.stages.loss import losses
from steer_heal.stages.passes import Passes, recomputed, through_the_head


def _factors(student: Student) -> dict[str, torch.Tensor]:
    return student.factors("round")


def test_a_batch_of_8_is_8_batches_of_1(tiny: LM, kept, heal_cfg):
    student = Student(tiny, heal_cfg)
    samples = reference_samples(student, kept[:8], heal_cfg)
    student.new_round(0)
    scramble(student, 0)
    with student.training():
        together = losses(tiny, samples, heal_cfg)
        alone = [losses(tiny, [sample], heal_cfg) for sample in samples]
    for k in (0, 1):
        assert torch.allclose(together[k], torch.cat([pair[k] for pair in alone]), atol=1e-5)


def test_several_passes_give_the_gradient_of_one(tiny: LM, kept, heal_cfg):
    student = Student(tiny, heal_cfg)
    samples = reference_samples(student, kept[:8], heal_cfg)
    student.new_round(0)
    scramble(student, 0, scale=0.05)
    read = []
    for budget in (10_000, 60):
        with student.training() as parameters:
            numbers = Passes(tiny, replace(heal_cfg, lam=0.7, tokens_per_pass=budget), parameters).gradients(
                samples, True
            )
            read.append((numbers, [p.grad.clone() for p in parameters]))
            for p in parameters:
                p.grad = None
    assert read[0][0] == pytest.approx(read[1][0], rel=1e-4) and read[0][0][3] > 0
    for one, several in zip(read[0][1], read[1][1]):
        assert (one - several).norm() <= 1e-4 * one.norm()


def test_a_step_of_64_tokens_a_pass_is_one_of_4096(with_history: Student, kept, heal_cfg):
    lm, read, numbers = with_history.lm, [], []
    samples = reference_samples(with_history, kept, heal_cfg)
    with_history.new_round(0)
    scramble(with_history, 0, scale=0.05)
    for cfg in (
        replace(heal_cfg, tokens_per_pass=4096),
        replace(heal_cfg, tokens_per_pass=64),
        replace(heal_cfg, checkpoint="on"),
    ):
        with with_history.training() as parameters:
            numbers.append(Passes(lm, replace(cfg, lam=0.7), parameters).gradients(samples, True))
            read.append([p.grad.clone() for p in parameters])
            for p in parameters:
                p.grad = None
    assert (
        numbers[0] == pytest.approx(numbers[1], rel=1e-4)
        and numbers[0] == pytest.approx(numbers[2], rel=1e-4)
        and numbers[0][3] > 0
    )
    for several in read[1:]:
        for one, other in zip(read[0], several, strict=True):
            assert 0 < one.norm() and (one - other).norm() <= 1e-4 * one.norm()


def test_passes_are_bucketed_by_length_and_within_their_budget(tiny: LM, kept, heal_cfg, monkeypatch):
    student, seen, hidden = Student(tiny, heal_cfg), [], tiny.hidden
    samples = reference_samples(student, kept, heal_cfg)
    student.new_round(0)
    monkeypatch.setattr(tiny, "hidden", lambda rows: seen.append([len(row) for row in rows]) or hidden(rows))
    with student.training() as parameters:
        Passes(tiny, replace(heal_cfg, tokens_per_pass=150), parameters).gradients(samples, False)
    assert sorted(sum(seen, [])) == sorted(len(sample.ids) for sample in samples)
    assert sum(seen, []) == sorted(sum(seen, [])), "rows of like length share a pass"
    assert all(max(group) * len(group) <= 150 for group in seen) and any(len(group) > 1 for group in seen)


@pytest.mark.parametrize("name, how", [("kl_rev", "rmse"), ("kl_fwd", "p95"), ("nll", "rmse")])
@pytest.mark.parametrize("size", [7, 40, 10_000])
def test_a_pass_gives_the_gradient_of_the_plain_loss_however_its_head_is_cut(
    size, name, how, tiny: LM, kept, heal_cfg, monkeypatch
):
    cfg = replace(heal_cfg, divergence=name, aggregate=how, lam=0.0 if name == "nll" else 0.7)
    student = Student(tiny, cfg)
    samples = reference_samples(student, kept, cfg)
    student.new_round(0)
    scramble(student, 0, scale=0.1)
    with student.training() as parameters:
        sft, divergence = losses(tiny, samples, cfg)
        cfg = replace(cfg, tau=divergence.median().item())  # half of them fire
        penalty = barrier(divergence, cfg.lam, cfg.tau) * (cfg.lam > 0)
        pulled = torch.autograd.grad(sft.mean(), parameters, retain_graph=True)
        pushed = (
            torch.autograd.grad(penalty.mean(), parameters) if cfg.lam else [torch.zeros_like(p) for p in parameters]
        )
        monkeypatch.setattr(LM, "chunk_size", size)
        numbers = Passes(tiny, replace(cfg, tokens_per_pass=200), parameters).gradients(samples, True)
        norm = lambda gradients: sum(g.square().sum() for g in gradients).sqrt().item()
        assert numbers == pytest.approx(
            (sft.mean().item(), divergence.mean().item(), penalty.mean().item(), norm(pushed) / norm(pulled)), rel=1e-3
        )
        assert (numbers[3] > 0.01) is (name != "nll")
        for p, pull, push in zip(parameters, pulled, pushed, strict=True):
            assert (p.grad - pull - push).norm() <= 1e-4 * (pull + push).norm()


def test_completions_fill_chunks_of_the_head_together():
    assert list(through_the_head([20, 30, 70, 129, 8, 400, 9], 128)) == [[3, 5], [0, 1, 2, 4], [6]]
    assert list(through_the_head([80] * 4, 64)) == [[0, 1, 2, 3]] and list(through_the_head([], 64)) == []


@pytest.fixture
def full_card(tiny: LM, monkeypatch):
    """Runs out of memory in the backward pass of more than 100 padded tokens, from the second pass on: by then part of
    the step's gradients are there."""
    hidden, sizes = tiny.hidden, []

    def limited(rows):
        out = hidden(rows)
        sizes.append(len(rows) * max(map(len, rows)))
        if len(sizes) > 1 and sizes[-1] > 100 and out.requires_grad:

            def burst(_gradient):
                raise torch.OutOfMemoryError("no memory (as if)")

            out.register_hook(burst)
        return out

    return lambda: monkeypatch.setattr(tiny, "hidden", limited) or sizes


def test_a_pass_that_runs_out_of_memory_is_split_and_the_step_starts_again(tiny: LM, kept, heal_cfg, full_card):
    cfg = replace(heal_cfg, tokens_per_pass=320, lam=0.7)
    student = Student(tiny, cfg)
    samples = reference_samples(student, kept, cfg)
    student.new_round(0)
    scramble(student, 0, scale=0.05)
    with student.training() as parameters:
        wanted = Passes(tiny, cfg, parameters).gradients(samples, True)
        whole = [p.grad.clone() for p in parameters]
        for p in parameters:
            p.grad = None
        passes, sizes = Passes(tiny, cfg, parameters), full_card()
        with pytest.warns(
            UserWarning, match=r"ran out of memory; passes of \d+ tokens fit and are kept; --heal.tokens-per-pass"
        ):
            got = passes.gradients(samples, True)
        assert got == pytest.approx(wanted, rel=1e-4) and max(sizes) > 100
        for one, p in zip(whole, parameters, strict=True):
            assert (one - p.grad).norm() <= 1e-4 * one.norm()
            p.grad = None
        fitted, tried = passes.tokens, len(sizes)
        passes.gradients(samples, True)
        assert passes.tokens == fitted <= 100 and max(sizes[tried:]) <= 100, "what fitted is kept"


def test_a_heal_through_a_full_card_ends_where_an_empty_one_does(tiny: LM, kept, heal_cfg, full_card):
    cfg, ends = replace(heal_cfg, lr=1e-3), []
    for prepare in (lambda: None, full_card):
        student = Student(tiny, cfg)
        prepare()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            heal(student, kept, 0, cfg, seed=3)
        ends.append((_factors(student), [w for w in told if "ran out of memory" in str(w.message)]))
        student.discard_round()
    assert not ends[0][1] and len(ends[1][1]) == 1, "one step pays for it, once"
    for key, value in ends[0][0].items():
        assert torch.allclose(value, ends[1][0][key], atol=2e-4), key


def test_one_completion_that_does_not_fit_is_computed_again_and_then_an_error(tiny: LM, kept, heal_cfg, monkeypatch):
    cfg = replace(heal_cfg, tokens_per_pass=10)
    student = Student(tiny, cfg)
    samples = reference_samples(student, kept, cfg)
    student.new_round(0)

    def never(rows):
        raise torch.OutOfMemoryError("no memory (as if)")

    monkeypatch.setattr(tiny, "hidden", never)
    with (
        student.training() as parameters,
        pytest.raises(UserError, match="over 1 completions, .* cannot be smaller; use --heal.checkpoint on"),
    ):
        passes = Passes(tiny, cfg, parameters)
        try:
            passes.gradients(samples, False)
        finally:
            assert passes.recompute


def test_checkpointing_is_on_by_itself_where_a_pass_would_store_much(tiny: LM, heal_cfg):
    on = {
        how: Passes(tiny, replace(heal_cfg, checkpoint=how, tokens_per_pass=10**6), []).recompute
        for how in ("auto", "on", "off")
    }
    assert on == {"auto": True, "on": True, "off": False}
    assert not Passes(tiny, heal_cfg, []).recompute


def test_checkpointed_blocks_keep_only_their_inputs(tiny: LM, kept, heal_cfg):
    student = Student(tiny, heal_cfg)
    rows = [sample.ids for sample in reference_samples(student, kept, heal_cfg)]
    student.new_round(0)
    stored = {}
    with student.training():
        for name, blocks in (("all", []), ("inputs", tiny.blocks)):
            count = lambda tensor: stored.update({name: stored.get(name, 0) + tensor.nbytes}) or tensor
            with recomputed(blocks), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
                tiny.hidden(rows)
    assert stored["inputs"] < 0.2 * stored["all"]


def test_the_validation_curve_does_not_depend_on_its_passes(tiny: LM, kept, heal_cfg):
    student = Student(tiny, heal_cfg)
    samples = reference_samples(student, kept, heal_cfg)
    student.new_round(0)
    scramble(student, 0)
    with student.training():
        one, several = (validate(tiny, samples, replace(heal_cfg, tokens_per_pass=n)) for n in (10_000, 64))
    assert one == pytest.approx(several, rel=1e-5) and one["divergence"] > 0.1
