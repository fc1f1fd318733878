"""A step of the heal in any number of passes, with activations kept or computed again, through a card that is full."""

import warnings
from dataclasses import replace

import pytest
import torch
from conftest import ADAPTER, scramble

from steer_heal.errors import UserError
from steer_heal.model.divergence import barrier
from steer_heal.model.lm import LM
from steer_heal.stages import passes as passes_module
from steer_heal.stages.heal import heal, read_pairs, read_samples, validate
from steer_heal.stages.loss import losses
from steer_heal.stages.passes import STORED_SHARE, Passes, head_groups, recomputed


def opened(student, kept, cfg, scale=0.05, pairs=False):
    """The examples of a heal, with a round open whose factors are as large as `scale`."""
    if pairs:
        samples = read_pairs(student, kept[::2], kept[1::2], cfg=cfg, beta=0.05)
    else:
        samples = read_samples(student, kept, cfg)
    student.new_round(0)
    scramble(student, 0, scale)
    return samples


def passes_of(lm: LM, cfg, parameters=()) -> Passes:
    return Passes(lm, cfg, ADAPTER.layers, parameters)


def taken(parameters) -> list[torch.Tensor]:
    """The gradients that were left, which are removed."""
    gradients = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return gradients


def length(gradients) -> float:
    return sum(g.square().sum() for g in gradients).sqrt().item()


def same(gradients, others) -> bool:
    return all(a.norm() > 0 and (a - b).norm() <= 1e-4 * a.norm() for a, b in zip(gradients, others, strict=True))


@pytest.mark.parametrize("pairs, budget", [(False, 150), (True, 300)], ids=["samples", "pairs"])
def test_passes_are_bucketed_by_length_and_within_their_budget(pairs, budget, student, kept, heal_cfg, monkeypatch):
    examples = opened(student, kept, heal_cfg, pairs=pairs)
    seen = []
    hidden = student.lm.hidden

    def watched(rows):
        seen.append([len(row) for row in rows])
        return hidden(rows)

    monkeypatch.setattr(student.lm, "hidden", watched)
    with student.training() as parameters:
        passes_of(student.lm, replace(heal_cfg, tokens_per_pass=budget), parameters).gradients(examples, False)
    rows = [sample for example in examples for sample in example.samples]
    assert sorted(sum(seen, [])) == sorted(len(sample.ids) for sample in rows)
    longest = [max(group) for group in seen]
    assert longest == sorted(longest), "rows of like length share a pass"
    assert all(max(group) * len(group) <= budget for group in seen)
    assert any(len(group) > len(examples[0].samples) for group in seen)


@pytest.mark.parametrize(
    "name, how, pairs",
    [("kl_rev", "rmse", False), ("kl_fwd", "p95", False), ("none", "rmse", False), ("kl_rev", "rmse", True)],
)
@pytest.mark.parametrize("size", [7, 40, 10_000])
def test_a_pass_gives_the_gradient_of_the_plain_loss_however_its_head_is_cut(
    size, name, how, pairs, student, kept, heal_cfg, monkeypatch
):
    cfg = replace(heal_cfg, divergence=name, aggregate=how, lam=0.0 if name == "none" else 0.7)
    samples = opened(student, kept, cfg, scale=0.1, pairs=pairs)
    with student.training() as parameters:
        ce, divergence = losses(student.lm, samples, cfg)
        cfg = replace(cfg, tau=divergence.median().item())  # half of them fire
        penalty = barrier(divergence, cfg.lam, cfg.tau) * (cfg.lam > 0)
        of_ce = torch.autograd.grad(ce.mean(), parameters, retain_graph=True)
        of_barrier = torch.autograd.grad(penalty.mean(), parameters) if cfg.lam else [0 * g for g in of_ce]
        monkeypatch.setattr(LM, "chunk_size", size)
        numbers = passes_of(student.lm, replace(cfg, tokens_per_pass=200), parameters).gradients(samples, True)
        means = (ce.mean().item(), divergence.mean().item(), penalty.mean().item())
        assert numbers == pytest.approx((*means, length(of_barrier) / length(of_ce)), rel=1e-3)
        assert (numbers[3] > 0.01) is (name != "none")
        assert same([a + b for a, b in zip(of_ce, of_barrier, strict=True)], taken(parameters))


def test_completions_fill_chunks_of_the_head_together():
    assert list(head_groups([20, 30, 70, 129, 8, 400, 9], 128)) == [[3, 5], [0, 1, 2, 4], [6]]
    assert list(head_groups([80] * 4, 64)) == [[0, 1, 2, 3]] and list(head_groups([], 64)) == []


@pytest.fixture
def full_card(tiny: LM, monkeypatch):
    """Runs out of memory in the backward pass of more than 100 padded tokens, from the second pass on: by then part of
    the step's gradients are there."""
    hidden = tiny.hidden
    sizes = []

    def limited(rows):
        out = hidden(rows)
        sizes.append(len(rows) * max(map(len, rows)))
        if len(sizes) > 1 and sizes[-1] > 100 and out.requires_grad:

            def burst(_gradient):
                raise torch.OutOfMemoryError("no memory (as if)")

            out.register_hook(burst)
        return out

    return lambda: monkeypatch.setattr(tiny, "hidden", limited) or sizes


def test_a_pass_that_runs_out_of_memory_is_split_and_the_step_starts_again(student, kept, heal_cfg, full_card):
    cfg = replace(heal_cfg, tokens_per_pass=320, lam=0.7)
    samples = opened(student, kept, cfg)
    with student.training() as parameters:
        wanted, whole = passes_of(student.lm, cfg, parameters).gradients(samples, True), taken(parameters)
        passes, sizes = passes_of(student.lm, cfg, parameters), full_card()
        with pytest.warns(UserWarning, match="heal.tokens-per-pass"):
            got = passes.gradients(samples, True)
        assert got == pytest.approx(wanted, rel=1e-4) and same(whole, taken(parameters)) and max(sizes) > 100
        n_tried = len(sizes)
        passes.gradients(samples, True)
        assert max(sizes[n_tried:]) <= 100, "what fitted is kept"


def test_a_heal_through_a_full_card_ends_where_an_empty_one_does(student, kept, heal_cfg, full_card):
    cfg = replace(heal_cfg, lr=1e-3)
    ends = []
    for prepare in (lambda: None, full_card):
        student.discard_round()
        prepare()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            heal(student, kept, cfg, round_=0, seed=3)
        ends.append((student.factors("round"), sum("ran out of memory" in str(w.message) for w in told)))
    assert [n_told for _, n_told in ends] == [0, 1], "one step pays for it, once"
    for key, value in ends[0][0].items():
        assert torch.allclose(value, ends[1][0][key], atol=2e-4), key


def test_one_completion_that_does_not_fit_is_computed_again_and_then_an_error(student, kept, heal_cfg, monkeypatch):
    samples = opened(student, kept, heal_cfg)
    tried = []

    def never(rows):
        tried.append("forward" in vars(student.lm.blocks[0]))  # a block is replaced while it is computed again
        raise torch.OutOfMemoryError("no memory (as if)")

    monkeypatch.setattr(student.lm, "hidden", never)
    with student.training() as parameters, pytest.raises(UserError, match="heal.checkpoint"):
        passes_of(student.lm, replace(heal_cfg, tokens_per_pass=10), parameters).gradients(samples, False)
    assert tried == [False, True]


def test_activations_are_computed_again_where_a_pass_would_fill_the_free_memory(tiny: LM, heal_cfg, monkeypatch):
    stored = passes_of(tiny, heal_cfg)._stored()

    def recompute(**change) -> bool:
        return passes_of(tiny, replace(heal_cfg, **change)).recompute

    for free, expected in ((stored / STORED_SHARE * 0.99, True), (stored / STORED_SHARE * 1.01, False)):
        monkeypatch.setattr(passes_module, "free_bytes", lambda device, free=free: free)
        assert [recompute(checkpoint=how) for how in ("auto", "on", "off")] == [expected, True, False]
    assert recompute(tokens_per_pass=2 * heal_cfg.tokens_per_pass), "twice the tokens are twice the bytes"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_computing_again_changes_no_bit(dtype, with_history, kept, heal_cfg):
    with_history.lm.model.to(dtype)
    with_history.lm.model.requires_grad_(False)
    samples = opened(with_history, kept, heal_cfg)
    read = []
    for how in ("off", "on"):
        with with_history.training() as parameters:
            numbers = passes_of(with_history.lm, replace(heal_cfg, checkpoint=how), parameters).gradients(samples, True)
            read.append((numbers, taken(parameters)))
    assert read[0][0] == read[1][0] and all(map(torch.equal, read[0][1], read[1][1]))


def test_blocks_that_are_computed_again_keep_only_their_inputs(student, kept, heal_cfg):
    rows = [sample.ids for sample in opened(student, kept, heal_cfg)]
    stored = []
    with student.training():
        for blocks in ([], student.lm.blocks):
            sizes = []

            def count(tensor, sizes=sizes):
                sizes.append(tensor.nbytes)
                return tensor

            with recomputed(blocks), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
                student.lm.hidden(rows)
            stored.append(sum(sizes))
    assert stored[1] < 0.2 * stored[0]


def test_the_validation_curve_does_not_depend_on_its_passes(student, kept, heal_cfg):
    samples = opened(student, kept, heal_cfg, scale=0.3)
    with student.training():
        one, several = (validate(student.lm, samples, replace(heal_cfg, tokens_per_pass=n)) for n in (10_000, 64))
    assert one == pytest.approx(several, rel=1e-5) and one["divergence"] > 0.1
