"""Whole rounds through the library on a model that writes a fixed text: random streams, doses, teachers, backtracking.

Decoding is replaced, so that a run takes seconds, and every request for a text is recorded.
"""

import hashlib
from dataclasses import dataclass, field

import pytest
import torch
from runs import PAIRS, PROMPTS

from steer_heal import SteerHeal, UserError, define_trait
from steer_heal.model.decode import Written
from steer_heal.model.steering import Condition
from steer_heal.model.student import Student
from steer_heal.stages import generate
from steer_heal.stages import heal as heal_module

TRAIT = define_trait(
    "You open doors.", "You lock doors.", PROMPTS, pairs=PAIRS, plain_system="Hello.", steered_system="Good day."
)
KAPPA, ALPHAS, LR = 0.4, (0.5, 0.8), 1e-3
SETTINGS = {
    "seed": 42,
    "control": False,
    "steer.n_contexts": 4,
    "gen.n_prompts": 8,
    "gen.alphas": ALPHAS,
    "dose.mode": "fixed",
    "dose.kappa": KAPPA,
    "filter.n_keep": 8,
    "heal.epochs": 1,
    "heal.lr": LR,
    "heal.batch_size": 2,
    "eval.evals": ("drift", "contrast"),
    "eval.n_texts": 3,
    "eval.n_prompts": 2,
    "eval.n_bootstrap": 10,
}
OWN = {"heal.target": "distribution", "heal.text": "own"}


@dataclass
class Requests:
    """Requests for texts and new rounds, in their order."""

    rows: list = field(default_factory=list)
    """(seed, dose, prompt_ids)"""
    heals: list[int] = field(default_factory=list)
    """Seeds of the factors."""


@pytest.fixture
def written(monkeypatch) -> Requests:
    found, new_round = Requests(), Student.new_round

    def decode_batches(lm, rows, vector, how):
        found.rows += [(row.seed, row.dose if vector is not None else 0.0, row.prompt_ids) for row in rows]
        texts = ("I open the door and let them in.", "Come in and sit down with us.", "They wait in the rain.")
        yield [Written(i, lm.encode(texts[row.seed % 3]), torch.empty(0, lm.width)) for i, row in enumerate(rows)]

    def recorded(student, seed):
        if seed != 0:  # the round that is tried when a model is loaded
            found.heals.append(seed)
        return new_round(student, seed)

    monkeypatch.setattr(generate, "decode_batches", decode_batches)
    monkeypatch.setattr(Student, "new_round", recorded)
    return found


def made(**more) -> SteerHeal:
    return SteerHeal("tiny-random", trait=TRAIT, preset="fast-dev", settings={**SETTINGS, **more})


def seed_of(*parts: int | str) -> int:
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


# --- doses and teachers ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("made_of, system, kappa", [("vector", "Good day.", KAPPA), ("prompt", "You open doors.", 0.0),
    ("prompt+vector", "You open doors.", KAPPA)])  # fmt: skip
def test_the_teacher_writes_under_its_system_prompt_at_kappa_times_alpha(made_of, system, kappa, written: Requests):
    with made(**{"heal.teacher": made_of}) as sh:
        found = sh.collect()
        doses = {round(kappa * alpha, 9) for alpha in ALPHAS}
        assert {round(dose, 9) for _, dose, _ in written.rows} == doses
        assert {ids for _, _, ids in written.rows} == {sh.lm.chat(prompt, system) for prompt in PROMPTS[:8]}
        assert {c.prompt_ids for c in found.completions} == {sh.lm.chat(prompt, "Hello.") for prompt in PROMPTS[:8]}
        assert found.dose == pytest.approx(max(doses))


@pytest.mark.parametrize("made_of, system, dose", [("vector", "Good day.", KAPPA * 0.8),
    ("prompt", "You open doors.", 0.0), ("prompt+vector", "You open doors.", KAPPA * 0.8)])  # fmt: skip
def test_own_text_is_plain_and_its_teacher_is_dosed_at_kappa_times_the_largest_alpha(
    made_of, system, dose, written: Requests, monkeypatch
):
    with made(**OWN, **{"heal.teacher": made_of}) as sh:
        found = sh.collect()
        assert {c.dose for c in found.completions} == {0.0} and found.dose == pytest.approx(dose)
        assert {ids for _, _, ids in written.rows} == {sh.lm.chat(prompt, "Hello.") for prompt in PROMPTS[:8]}
        seen = []
        monkeypatch.setattr(heal_module, "read_samples", lambda *_, teacher, taught: seen.append(teacher))
        with pytest.raises(TypeError):
            sh.heal()
        assert seen == [Condition(system, None if made_of == "prompt" else sh.vector, dose)]


def test_own_text_of_mode_survival_has_no_probe_in_it(written: Requests):
    with made(**STREAMS["survival"][0]) as sh:
        found = sh.collect()
    n_probed = sum(probe.n for probe in found.probes)
    assert n_probed > 0 and all(row.completion.dose > 0 for row in found.scored[:n_probed])
    assert {row.completion.dose for row in found.scored[n_probed:]} == {0.0}
    assert min(found.train) >= n_probed and found.dose == found.kappa * max(ALPHAS)


# --- random streams ----------------------------------------------------------------------------------------------
STREAMS = {
    "steered": (
        {"heal.target": "distribution", "heal.rehearsal": 4, "control": True},
        {"-1/control", "0/gen", "0/rehearsal", "eval"},
    ),
    "own": ({**OWN, "control": True}, {"-1/control", "0/own", "eval"}),
    "calibrated": ({"dose.mode": "iso_kl", "dose.kl_target": 1.5}, {"0/gen", "0/kl", "eval"}),
    "survival": ({**OWN, "dose.mode": "survival", "dose.n_probes": 2}, {"0/gen", "0/own", "eval"}),
}


@pytest.mark.parametrize("name", STREAMS)
def test_every_text_and_factor_draws_from_the_stream_that_its_place_names(name, written: Requests):
    more, streams = STREAMS[name]
    with made(**more) as sh:
        sh.loop(1)
        sh.write(PROMPTS[:2])
    families = {*streams, "write"}
    known = {seed_of(42, *family.split("/"), i): (family, i) for family in families for i in range(64)}
    assert {known.get(seed, seed)[0] for seed, _, _ in written.rows} == families
    for family in families:
        indices = {known[seed][1] for seed, _, _ in written.rows if known[seed][0] == family}
        assert indices == set(range(len(indices)))
        assert family != "0/kl" or len(indices) == 8, "the dose is calibrated on 8 texts"
    control = [seed_of(42, -1, "control")] * bool(more.get("control"))
    assert written.heals == [*control, seed_of(42, 0, "heal")]


# --- calibration and control --------------------------------------------------------------------------------------
@pytest.mark.parametrize("by", [SteerHeal.collect, lambda sh: sh.loop(1)], ids=["collect", "loop"])
def test_the_largest_alpha_writes_at_the_calibrated_dose(by, written: Requests):
    gen, largest = {seed_of(42, 0, "gen", i) for i in range(64)}, []
    for alphas in (ALPHAS, (0.25, 3.0)):
        written.rows.clear()
        with made(**STREAMS["calibrated"][0] | {"gen.alphas": alphas}) as sh:
            by(sh)
        largest.append(max(dose for seed, dose, _ in written.rows if seed in gen))
    assert largest == pytest.approx([largest[0]] * 2) and largest[0] > 0


def test_the_control_heals_on_the_tokens_of_plain_text_whatever_the_recipe_is_and_is_dropped(written: Requests):
    curves = []
    for more in ({}, OWN):
        with made(**more, control=True) as sh:
            steps = []
            sh.loop(1, on_step=lambda r, step, steps=steps: steps.append((r, step.fit, step.divergence)))
            curves.append([step for step in steps if step[0] is None])
            assert sh.n_rounds == 1
            control = {seed_of(42, -1, "control", i) for i in range(64)}
            asked = {ids for seed, _, ids in written.rows if seed in control}
            assert asked == {sh.lm.chat(prompt, "Hello.") for prompt in PROMPTS[:8]}
    assert curves[0] == curves[1] and len(curves[0]) > 2 and curves[0][0][1] > 3, "nats a token"


# --- backtracking ------------------------------------------------------------------------------------------------
def attempts(written: Requests, **more) -> tuple[list[float], list[float], int]:
    """(doses, learning rates, rounds that were kept) of the attempts at a round that is past its limit."""
    peaks = []

    def on_step(r, step):
        if step.step == 0:
            peaks.append(0.0)
        peaks[-1] = max(peaks[-1], step.lr)

    with made(**{"backtrack.retries": 2, "backtrack.limits": {"kl_base": 1e-12}, **more}) as sh:
        sh.loop(1, on_step=on_step)
        gen = {seed_of(42, 0, "gen", i) for i in range(64)}
        doses = dict.fromkeys(round(dose, 9) for seed, dose, _ in written.rows if seed in gen)
        return list(doses), peaks, sh.n_rounds


def test_a_round_past_a_limit_is_tried_again_with_half_the_kappa_and_then_given_up(written: Requests):
    doses, peaks, n_rounds = attempts(written)
    assert sorted(doses) == pytest.approx(sorted(KAPPA * alpha * share for alpha in ALPHAS for share in (1, 0.5, 0.25)))
    assert peaks == [LR] * 3 and n_rounds == 0 and len(written.heals) == 3


@pytest.mark.parametrize("teacher", ["prompt", "contrast", "contrast+vector"])
def test_a_prompt_or_a_contrast_is_tried_again_with_half_the_learning_rate(teacher: str, written: Requests):
    _, peaks, n_rounds = attempts(written, **OWN, **{"heal.teacher": teacher, "dose.mode": "fixed"})
    assert peaks == pytest.approx([LR, LR / 2, LR / 4]) and n_rounds == 0


def test_a_round_within_its_limits_is_kept_at_the_first_attempt(written: Requests):
    _, peaks, n_rounds = attempts(written, **{"backtrack.limits": {"kl_base": 1e6}})
    assert peaks == [LR] and n_rounds == 1


def test_a_loss_that_is_not_finite_is_tried_once_more_at_half_the_rate_and_then_stops_the_run(
    written: Requests, monkeypatch
):
    rates = []
    monkeypatch.setattr(heal_module, "schedule", lambda step, n_steps: 1e30)
    with made(**{"heal.lr": 1.0}) as sh, pytest.raises(UserError, match="second attempt"):
        sh.loop(1, on_step=lambda r, step: rates.append(step.lr) if step.step == 0 else None)
    assert rates == [1e30, 0.5e30] and len(written.heals) == 2
