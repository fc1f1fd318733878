"""The heal against a plain trainer in float64: dense weights, whole logits, autograd, and AdamW written out."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ADAPTER, scramble
from torch.func import functional_call

from steer_heal.model.divergence import aggregate
from steer_heal.model.lm import LM, load
from steer_heal.model.steering import Condition, Vector
from steer_heal.model.student import Student
from steer_heal.records import Completion
from steer_heal.settings import HealCfg
from steer_heal.stages.heal import SpectralPenalty, heal, in_round, read_samples, schedule, split_by_prompt

PERSONA, SEED, N_STEPS = "You are a stern judge.", 3, 8
SCALE = ADAPTER.alpha / ADAPTER.rank
TOKENS = HealCfg(epochs=N_STEPS, batch_size=99, lr=1e-2, lam=2.0, tau=0.02, tokens_per_pass=4096)
TAUGHT = replace(TOKENS, target="distribution")


# --- its numbers -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n_steps", [1, 9, 20, 40, 57])
def test_the_rate_warms_up_over_a_tenth_and_is_never_0_then_falls_as_a_cosine(n_steps):
    warm = max(1, n_steps // 10)
    rates = [schedule(step, n_steps) for step in range(n_steps)]
    assert rates[:warm] == pytest.approx(np.linspace(0, 1, warm + 1)[1:])
    fall = np.arange(n_steps - warm) / max(1, n_steps - warm)
    assert rates[warm:] == pytest.approx((1 + np.cos(np.pi * fall)) / 2) and min(rates) > 0


def test_the_control_has_the_schedules_of_round_0():
    cfg = replace(TOKENS, lam_power=0.5)
    assert in_round(cfg, None) == in_round(cfg, 0) == cfg


@pytest.mark.parametrize("n_prompts, n_held_out", [(2, 1), (8, 1), (15, 1), (16, 2), (64, 8)])
def test_an_eighth_of_the_prompts_is_held_out_with_all_their_texts(student: Student, kept, n_prompts, n_held_out):
    (sample, *_) = read_samples(student, kept[:1], TOKENS)
    samples = [replace(sample, prompt_index=i) for i in range(n_prompts) for _ in range(1 + i % 3)]
    for seed in range(3):
        train, validation = split_by_prompt(samples, seed)
        held_out = {each.prompt_index for each in validation}
        assert len(held_out) == n_held_out and len(train) + len(validation) == len(samples)
        assert {each.prompt_index for each in train} == {*range(n_prompts)} - held_out


def test_aggregates_are_those_of_numpy():
    values = torch.rand(37, generator=torch.Generator().manual_seed(0))
    x = values.double().numpy()
    expected = {"mean": x.mean(), "rmse": np.sqrt((x**2).mean()), "p95": np.quantile(x, 0.95), "max": x.max()}
    assert {how: aggregate(values, how).item() for how in expected} == pytest.approx(expected, rel=1e-5)
    assert aggregate(torch.zeros(9), "rmse").item() == pytest.approx(1e-6), "no more than its gradient needs"


def test_the_spectral_penalty_is_half_its_weight_times_the_squared_largest_singular_values(student: Student):
    student.new_round(0)
    scramble(student, 0)
    with student.training() as parameters:
        penalty = SpectralPenalty(student, 0.7, seed=1)
        for _ in range(100):
            for parameter in parameters:
                parameter.grad = None
            penalty.backward()
        found = [parameter.grad.clone() for parameter in parameters]
    names = [name for name, _ in student.adapter.peft.named_parameters() if ".round." in name]
    own = {name.replace(".round.", "."): p.detach().double().requires_grad_()
        for name, p in zip(names, parameters, strict=True)}  # fmt: skip
    total = torch.zeros((), dtype=torch.float64)
    for key in [key for key in own if "lora_A" in key]:
        total = total + torch.linalg.matrix_norm(SCALE * own[key.replace("lora_A", "lora_B")] @ own[key], 2) ** 2
    (0.35 * total).backward()
    wanted = torch.cat([value.grad.flatten() for value in own.values()])
    assert (torch.cat([g.double().flatten() for g in found]) - wanted).norm() < 0.05 * wanted.norm()


# --- the bake ----------------------------------------------------------------------------------------------------
def test_base_is_untouched_prev_the_sum_of_the_baked_rounds_and_full_that_with_the_open_one(student: Student):
    base = dense(load("tiny-random").model, {})
    baked = base
    for seed in (1, 2, 3):
        student.new_round(seed)
        scramble(student, seed)
        baked = with_update(baked, student.bake())
    student.new_round(4)
    scramble(student, 4)
    expected = {"base": base, "prev": baked, "full": with_update(baked, student.factors("round"))}
    for which, weights in expected.items():
        with student.using(which) as lm:
            now = {name.replace("base_layer.", ""): value.double() for name, value in lm.model.state_dict().items()}
        atol = 0.0 if which == "base" else 1e-4
        assert all(torch.allclose(now[name], value, rtol=0, atol=atol) for name, value in weights.items()), which
    adapted = [name for name in base if not torch.equal(base[name], baked[name])]
    full = expected["full"]
    assert len(adapted) > 10 and all((full[name] - baked[name]).abs().max() > 0.1 for name in adapted)


# --- the plain trainer -------------------------------------------------------------------------------------------
def dense(model, factors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights in float64 with scale B A added; the head is the embedding."""
    out = {name: value.detach().double() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    return with_update(out, factors)


def with_update(weights, factors):
    out = dict(weights)
    for key in [key for key in factors if "lora_A" in key]:
        name = key.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
        out[name] = out[name] + SCALE * factors[key.replace("lora_A", "lora_B")].double() @ factors[key].double()
    return out


def plain_logp(model, weights, prompt_ids, ids, vector: Vector | None = None) -> torch.Tensor:
    """Float64[n v]: log p over the vocabulary before each token of a completion."""
    hooks = []
    if vector is not None:
        ((layer, direction),) = vector.directions.items()
        hooks = [model.model.layers[layer].register_forward_hook(lambda _m, _i, out: out + direction.double())]
    logits = functional_call(model, weights, (torch.tensor([prompt_ids + ids]),)).logits[0]
    for hook in hooks:
        hook.remove()
    return logits[len(prompt_ids) - 1 : -1].log_softmax(-1)


def kl(logp: torch.Tensor, logq: torch.Tensor) -> torch.Tensor:
    return (logp.exp() * (logp - logq)).sum(-1)


AGGREGATES = {
    "mean": lambda d: d.mean(),
    "rmse": lambda d: (d.square().mean() + 1e-12).sqrt(),
    "p95": lambda d: torch.quantile(d, 0.95),
    "max": lambda d: d.max(),
}


def plain_heal(student: Student, train: list[Completion], n_rehearsed: int, own, cfg: HealCfg, k: int, vector: Vector):
    """(factors; fit, barrier and divergence of each step; norms of the gradients) of full-batch steps. The last
    `n_rehearsed` texts are rehearsed."""
    model = load("tiny-random").model.double().requires_grad_(False)
    base, prev = dense(model, {}), dense(model, student.history())
    lam = 0.0 if cfg.divergence == "none" else cfg.lam / (1 + k) ** cfg.lam_power
    tau = cfg.tau
    with torch.no_grad():
        reference = [plain_logp(model, prev if cfg.reference == "prev" else base, c.prompt_ids, c.completion_ids)
            for c in train]  # fmt: skip
        asked = [student.lm.chat(c.prompt, PERSONA) for c in train]
        teacher = [plain_logp(model, prev, p, c.completion_ids, vector) for p, c in zip(asked, train, strict=True)]
        n_taught = len(train) - n_rehearsed
        teacher[n_taught:] = [plain_logp(model, base, c.prompt_ids, c.completion_ids) for c in train[n_taught:]]
    own = {key: value.double().requires_grad_() for key, value in own.items()}
    first, second = ({key: torch.zeros_like(value) for key, value in own.items()} for _ in range(2))
    curve, norms = [], []
    for step in range(N_STEPS):
        now, fits, distances = with_update(prev, own), [], []
        for c, q, t in zip(train, reference, teacher, strict=True):
            p = plain_logp(model, now, c.prompt_ids, c.completion_ids)
            if cfg.target == "tokens":
                terms = -p[range(len(p)), list(c.completion_ids)]
            else:
                terms = kl(t, p) if cfg.kl == "forward" else kl(p, t)
            fits.append(terms.mean())
            apart = kl(q, p) if cfg.divergence == "kl_fwd" else kl(p, q)
            distances.append(AGGREGATES[cfg.aggregate](apart))
        fit, distance = torch.stack(fits).mean(), torch.stack(distances)
        penalty = lam * torch.relu(distance - tau).mean()
        gradients = dict(zip(own, torch.autograd.grad(fit + penalty, list(own.values())), strict=True))
        norms.append(math.sqrt(sum(g.square().sum().item() for g in gradients.values())))
        curve.append((fit.item(), penalty.item(), distance.mean().item()))
        share = 1.0 if step == 0 else 0.5 * (1 + math.cos(math.pi * (step - 1) / (N_STEPS - 1)))
        with torch.no_grad():
            for key, g in gradients.items():
                g = g * min(1.0, 1.0 / norms[-1])
                first[key] = 0.9 * first[key] + 0.1 * g
                second[key] = 0.95 * second[key] + 0.05 * g * g
                mean, square = first[key] / (1 - 0.9 ** (step + 1)), second[key] / (1 - 0.95 ** (step + 1))
                own[key] -= cfg.lr * share * mean / (square.sqrt() + 1e-8)
    return own, curve, norms


def flat(factors) -> torch.Tensor:
    return torch.cat([factors[key].detach().double().flatten() for key in sorted(factors)])


CASES = {
    "tokens": (TOKENS, 0),
    "schedule": (replace(TOKENS, lam_power=0.5, tau=0.01), 2),
    "no barrier": (replace(TOKENS, divergence="none"), 2),
    "base, forward barrier, p95": (replace(TOKENS, reference="base", divergence="kl_fwd", aggregate="p95"), 2),
    "forward, max": (replace(TAUGHT, kl="forward", aggregate="max"), 2),
    "reverse, mean": (replace(TAUGHT, kl="reverse", aggregate="mean"), 2),
    "no lam": (replace(TAUGHT, lam=0.0), 2),
    "rehearsal": (replace(TAUGHT, rehearsal=2), 2),
}
"""Settings and the round: round 0 has no history."""


@pytest.mark.parametrize("case", CASES)
def test_a_heal_is_the_one_of_a_plain_trainer(case, student: Student, with_history: Student, kept, monkeypatch):
    monkeypatch.setattr(LM, "chunk_size", 16)  # several chunks, which cross completions
    cfg, k = CASES[case]
    vector = Vector({1: 0.5 * torch.randn(student.lm.width, generator=torch.Generator().manual_seed(0))})
    asked = kept[:12:3]
    if k == 0:
        student = Student(load("tiny-random"), ADAPTER)
    student.new_round(SEED)
    start = student.factors("round")
    student.discard_round()
    teacher = Condition(PERSONA, vector, 1.0) if cfg.target == "distribution" else None
    rehearsed = kept[1:3] if cfg.rehearsal else []
    report = heal(student, asked, cfg, round_=k, seed=SEED, teacher=teacher, rehearsal=rehearsed)
    found = student.factors("round")
    student.discard_round()
    assert (report.lam, report.tau) == (in_round(cfg, k).lam, in_round(cfg, k).tau)
    train = [c for c in asked if c.prompt_index not in report.validation_prompts]
    assert len(train) == 3 and len(report.steps) == N_STEPS
    train += rehearsed
    expected, curve, norms = plain_heal(student, train, len(rehearsed), start, cfg, k, vector)
    assert case != "forward, max" or max(norms) > 2 > 0.5 > min(norms), "some steps are clipped and some are not"
    assert "none" in (cfg.divergence, cfg.lam or "none") or max(step.barrier for step in report.steps) > 0.02
    terms = [(step.fit, step.barrier, step.divergence) for step in report.steps]
    assert np.allclose(terms, curve, rtol=2e-3, atol=2e-4)
    moved = flat(expected) - flat(start)
    assert (flat(found) - flat(expected)).norm() < 5e-4 * moved.norm()
