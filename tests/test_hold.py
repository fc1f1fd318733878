"""Texts that are written and trained under attacks, while the teacher reads them under its own prompts."""

from dataclasses import replace

import pytest

from steer_heal import SteerHeal
from steer_heal.bench import Bench
from steer_heal.check import check
from steer_heal.errors import UserError
from steer_heal.inputs.attacks import attacked
from steer_heal.model.student import Student
from steer_heal.presets import FAST_DEV_PRESET
from steer_heal.recipe import Recipe
from steer_heal.records import Completion
from steer_heal.settings import HealCfg, changed
from steer_heal.stages import states
from steer_heal.stages.generate import Ask

HELD = {
    "heal.target": "distribution", "heal.text": "own", "heal.teacher": "contrast", "heal.hold": 0.5,
    "heal.divergence": "none", "dose.mode": "fixed", "filter.n_keep": 12, "filter.max_attempts": 24,
}  # fmt: skip


ATTACKS = """
[[attack]]
name = "role"
opposes = true
system = "Play this part. {negative}"

[[attack]]
name = "note"
opposes = false
after = "Write it as a short note."

[[attack]]
name = "talk"
opposes = false
turns = ["What is a kid?", "A young goat."]
"""


@pytest.fixture
def bench(tiny, tmp_path) -> Bench:
    path = tmp_path / "attacks.toml"
    path.write_text(ATTACKS)
    cfg = changed(FAST_DEV_PRESET, {**HELD, "heal.hold_attacks": path})
    return Bench(cfg, check(cfg), Student(tiny, cfg.adapter))


def test_half_of_the_own_texts_stand_behind_the_attacks_in_turn(bench: Bench):
    lm, recipe = bench.student.lm, Recipe.of(bench.cfg)
    vector = bench.extract()
    found = bench.collect(recipe, 0, vector)
    held = [row.completion for row in found.scored if row.completion.attack]
    assert len(held) == pytest.approx(len(found.scored) / 2, abs=1)
    names = [attack.name for attack in bench.inputs.hold]
    assert [c.attack for c in held] == [names[i % len(names)] for i in range(len(held))]
    by_name = {attack.name: attack for attack in bench.inputs.hold}
    for c in held:
        assert c.prompt_ids == lm.prompt(attacked(by_name[c.attack], c.prompt, bench.trait), bench.trait.plain_system)
    assert all(row.completion.prompt_ids == lm.chat(row.completion.prompt, bench.trait.plain_system)
               for row in found.scored if not row.completion.attack)  # fmt: skip


def test_the_teacher_reads_a_held_text_under_its_own_prompts(bench: Bench, monkeypatch):
    lm, trait = bench.student.lm, bench.trait
    recipe = Recipe.of(bench.cfg)
    vector = bench.extract()
    found = bench.collect(recipe, 0, vector)
    read = []
    monkeypatch.setattr(
        states,
        "_read",
        lambda lm, texts, prompts, *more, own=states._read: read.append(prompts) or own(lm, texts, prompts, *more),
    )  # noqa: E501
    teacher = bench.make_teacher(recipe, vector, found)
    sides = (trait.plain_system, trait.positive, trait.negative)
    by_name = {attack.name: attack for attack in bench.inputs.hold}

    def expected(c, side):
        """Without an attack that opposes the trait, and behind any other, but always under the teacher's own prompt."""
        if not c.attack or by_name[c.attack].opposes:
            return lm.chat(c.prompt, side)
        return lm.prompt(replace(attacked(by_name[c.attack], c.prompt, trait), system=None), side)

    assert read == [[expected(c, side) for c in found.completions] for side in sides]
    kinds = {by_name[c.attack].opposes for c in found.completions if c.attack}
    assert kinds == {True, False}
    read.clear()
    bench.heal(recipe, 0, found, teacher)
    trained = [c.prompt_ids for c in found.completions]
    assert read == [trained], "the reference is read where the student trains; the teacher's states are known"


def test_a_hold_that_says_nothing_is_refused():
    with pytest.raises(ValueError, match=r"heal\.hold is 0\.5: it must be 0 with heal\.text steered"):
        HealCfg(hold=0.5)
    with pytest.raises(ValueError, match=r"heal\.contrast_kl is 0\.1: it must be 0 with heal\.teacher vector"):
        HealCfg(contrast_kl=0.1)
    with pytest.raises(ValueError, match=r"heal\.contrast is 2\.0: it must be 1 with heal\.teacher prompt"):
        HealCfg(teacher="prompt", contrast=2.0)


def test_without_a_hold_no_attack_is_read(bench: Bench):
    cfg = replace(bench.cfg, heal=replace(bench.cfg.heal, hold=0.0))
    inputs = check(cfg)
    assert inputs.hold == () and "heal.hold_attacks" not in inputs.sha256 and "heal.hold_attacks" in bench.inputs.sha256


def test_over_the_passes_each_prompt_comes_with_and_without_an_attack(bench: Bench):
    change = bench._under_attacks(1 / 3)
    prompts = bench.inputs.prompts
    asks = [change(Ask(i % len(prompts), prompts[i % len(prompts)], i)) for i in range(12 * len(prompts))]
    held = [bool(ask.attack) for ask in asks]
    assert sum(held) == pytest.approx(len(held) / 3, abs=4)
    for k in range(len(prompts)):
        assert {held[i] for i in range(k, len(held), len(prompts))} == {True, False}


def test_the_attacks_of_the_eval_do_not_train(bench: Bench, tmp_path):
    measured = changed(bench.cfg, {"heal.hold_attacks": "data/attacks/eval.toml", "eval.evals": ("holds", "contrast")})
    with pytest.raises(UserError, match="heal.hold_attacks contains the attack 'opposite"):
        check(measured)
    plain = changed(bench.cfg, {"eval.attacks": "data/attacks/eval.toml"})
    alike = tmp_path / "alike.toml"
    (own,) = (attack for attack in check(plain).attacks if attack.name == "break_character")
    told = own.after.upper().replace(" ", "  ")
    alike.write_text(f'[[attack]]\nname = "other"\nopposes = true\nafter = "{told}"\n')
    with pytest.raises(UserError, match="heal.hold_attacks contains the attack 'break_character'"):
        check(changed(measured, {"heal.hold_attacks": alike}))


def test_the_gate_for_the_question_leaves_the_attack_around_the_three_dots(bench: Bench):
    lm, trait = bench.student.lm, bench.trait
    text = lm.encode("I open the door.")
    for attack in bench.inputs.hold:
        prompt = lm.prompt(attacked(attack, "...", trait), trait.plain_system)
        (row,) = bench.score([Completion(0, "...", prompt, text, "I open the door.", 0.0, 0.0, 0, attack.name)])
        assert row.scores["relevance"] == pytest.approx(0, abs=1e-4), attack.name


def test_a_contrast_is_not_measured_by_a_package_that_cannot_and_its_budget_sets_its_strength():
    with pytest.raises(UserError, match="eval.backend is 'tinymfv': it must be builtin with heal.teacher contrast"):
        changed(FAST_DEV_PRESET, {"heal.teacher": "contrast", "eval.backend": "tinymfv"})
    own = {"target": "distribution", "text": "own", "teacher": "contrast"}
    with pytest.raises(ValueError, match="heal.contrast is 2.0: it must be 1 with heal.contrast_kl"):
        HealCfg(**own, contrast=2.0, contrast_kl=0.1)


def test_the_library_measures_the_teacher_at_the_strength_of_its_budget():
    with SteerHeal("tiny-random", preset="fast-dev", settings={**HELD, "heal.contrast_kl": 0.002}) as sh:
        sh.collect()
        before = sh._strength(sh.vector)
        sh.heal()
        assert sh._strength(sh.vector) == before == sh.teacher.strength.strength != 1.0
        assert sh.teacher.states is None
