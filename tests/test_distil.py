"""The teacher's distribution as target: what the student learns, and rehearsal."""

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from conftest import ADAPTER, scramble

from steer_heal.bench import Bench
from steer_heal.check import check
from steer_heal.diag import distil
from steer_heal.diag.distil import ARMS, Flags, has_prompts, require_one_panel, with_settings
from steer_heal.diag.lab import Lab
from steer_heal.errors import UserError
from steer_heal.inputs import load_inputs
from steer_heal.inputs.files import DATA, parse_texts, read_file
from steer_heal.inputs.traits import available, load_trait
from steer_heal.model.lm import LM, load
from steer_heal.model.steering import Condition, Vector
from steer_heal.model.student import Student
from steer_heal.presets import FAST_DEV_PRESET, PRESETS
from steer_heal.recipe import Recipe
from steer_heal.settings import HealCfg, changed
from steer_heal.stages.generate import Ask
from steer_heal.stages.heal import batch_plan, read_samples, rehearsal_samples
from steer_heal.stages.passes import Passes
from steer_heal.stages.states import final_states, kl_between

PERSONA = "You are a stern judge."
SMOL = PRESETS["smol-distil"][1]
CFG = HealCfg(target="distribution", divergence="none", epochs=2, lr=1e-2, batch_size=4, pressure_every=1)


def noise(lm: LM, length: float = 0.5) -> Vector:
    generator = torch.Generator().manual_seed(0)
    return Vector({1: length * torch.randn(lm.width, generator=generator)})


def test_bfloat16_weights_give_the_loss_and_the_gradient_of_float32_within_a_tenth(kept):
    read = []
    for dtype in ("float32", "bfloat16"):
        student = Student(load("tiny-random", dtype=dtype), ADAPTER)
        cfg = replace(CFG, divergence="kl_rev", lam=2.0, tau=0.01)
        samples = read_samples(student, kept[:5], cfg, teacher=Condition(PERSONA, noise(student.lm), 1.0))
        student.new_round(0)
        scramble(student, 5, scale=0.2)
        with student.training() as parameters:
            terms = Passes(student.lm, cfg, ADAPTER.layers, parameters).gradients(samples, with_pressure=False)
            read.append((terms.fit + terms.barrier, torch.cat([p.grad.flatten().float() for p in parameters])))
    (loss, gradient), (half_loss, half_gradient) = read
    assert half_loss == pytest.approx(loss, rel=0.1)
    assert (half_gradient - gradient).norm() <= 0.1 * gradient.norm()


def test_in_float16_small_gradients_of_long_texts_do_not_vanish(kept):
    long = [replace(text, completion_ids=text.completion_ids * (400 // len(text.completion_ids))) for text in kept[:6]]
    read = []
    for dtype in ("float32", "float16"):
        student = Student(load("tiny-random", dtype=dtype), ADAPTER)
        cfg = replace(CFG, divergence="kl_rev", lam=2.0, tau=0.0)
        samples = read_samples(student, long, cfg, teacher=Condition("", noise(student.lm, 0.1), 1.0))
        student.new_round(0)
        scramble(student, 5, scale=0.01)
        with student.training() as parameters:
            terms = Passes(student.lm, cfg, ADAPTER.layers, parameters).gradients(samples, with_pressure=True)
            read.append((terms.pressure, torch.cat([p.grad.flatten().float() for p in parameters])))
    (pressure, gradient), (half_pressure, half_gradient) = read
    assert (half_gradient - gradient).norm() <= 0.1 * gradient.norm() and half_pressure == pytest.approx(pressure, 0.1)


# --- what the heal does with it ----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ARMS)
def test_an_arm_is_the_same_recipe_in_every_preset(name):
    presets = [cfg for preset, (_, cfg) in PRESETS.items() if preset != "fast-dev"]  # it writes too few probes
    recipes = {Recipe.of(changed(cfg, ARMS[name].settings)) for cfg in presets}
    assert len(recipes) == 1 or ARMS[name].preference or ARMS[name].untrained, (
        "the settings of an arm leave none of the recipe to the preset"
    )


def test_the_personas_of_another_trait_teach_where_an_arm_says_so(monkeypatch):
    lab, taught = Lab.of(FAST_DEV_PRESET), []

    def taught_by(loop, recipe, r):
        taught.append(loop.bench.trait)
        raise InterruptedError

    monkeypatch.setattr(distil, "run_round", taught_by)
    for name in ("contrast", "contrast of others"):
        with pytest.raises(InterruptedError):
            next(distil.rounds(lab, ARMS[name], distil.Flags(preset="fast-dev")))
    own, others = taught
    assert (own.positive, own.negative) == (lab.bench.trait.positive, lab.bench.trait.negative)
    unrelated = load_trait("asks_back")
    assert (others.positive, others.negative) == (unrelated.positive, unrelated.negative)


def test_what_is_known_by_heart_is_asked_under_the_condition_of_the_row():
    lab = Lab.of(replace(PRESETS["toy"][1], n_threads=1))
    vector = noise(lab.bench.student.lm, 8.0)
    plain = distil.everyday(lab.bench, lab.bench.plain)
    assert plain["facts"] == 0.875
    for condition in (Condition(PERSONA), replace(lab.bench.plain, vector=vector, dose=1.0)):
        assert distil.everyday(lab.bench, condition)["facts_nats"] < plain["facts_nats"] - 0.05


def test_the_arms_without_training_are_asked_under_their_own_condition(monkeypatch):
    lab, asked = Lab.of(changed(FAST_DEV_PRESET, {"eval.evals": ("moral_foundations",), "eval.n_vignettes": 4})), []
    monkeypatch.setattr(distil, "everyday", lambda bench, condition: asked.append(condition) or {})
    distil.untrained(lab, ARMS["prompt alone"], 0.03)
    assert asked == [Condition(lab.bench.trait.positive)]


@pytest.mark.parametrize("preset", ["chat", "smol-distil", "qwen", "gemma"])
def test_the_recipe_of_the_presets_is_an_arm(preset):
    cfg = PRESETS[preset][1]
    assert changed(cfg, ARMS["contrast, held, rehearsed"].settings).heal == cfg.heal


def test_the_arms_of_tokens_have_the_barrier_that_one_of_them_leaves_out():
    cfg = PRESETS["chat"][1]
    found = {name: changed(cfg, ARMS[name].settings).heal.divergence for name in ("tokens", "tokens, no barrier")}
    assert found == {"tokens": "kl_rev", "tokens, no barrier": "none"}


def test_an_arm_that_rehearses_can_be_tuned_afterwards():
    heal = {"heal.target": "distribution", "heal.rehearsal": 4, "heal.teacher": "contrast", "heal.contrast": 2.0}
    bench = Lab.of(changed(FAST_DEV_PRESET, {**heal, "heal.divergence": "none"})).bench
    assert distil.tune(bench, 2) >= 2


def test_a_column_that_some_seeds_lack_says_how_many_have_it():
    rows = [
        {"arm": "contrast", "round": 0, "seed": i, "shift": 0.5, "kept": kept} for i, kept in enumerate((0.5, None))
    ]
    (row,) = distil.over_seeds(rows)
    assert row["n"] == 2 and row["shift"] == "0.500 ± 0.000" and row["kept"] == "0.500 (1)"


def test_a_signed_student_is_half_the_difference_of_two_heals(monkeypatch):
    lab, taught, healed = Lab.of(FAST_DEV_PRESET), [], []
    student, trait = lab.bench.student, lab.bench.trait

    def heal_at_random(loop, recipe, r):
        taught.append((loop.bench.trait.positive, loop.bench.trait.negative))
        student.new_round(0)
        scramble(student, len(taught))
        healed.append(updates(student.bake()))

    monkeypatch.setattr(distil, "run_round", heal_at_random)
    monkeypatch.setattr(distil, "trained", lambda run, r: ([], {"heals": len(taught)}))
    assert distil.signed(lab.bench, Recipe.of(lab.bench.cfg), lab.progress) == ([], {"heals": 1})
    assert taught == [(trait.positive, trait.negative), (trait.negative, trait.positive)]
    towards, away = healed
    for name, update in updates(student.history()).items():
        assert torch.allclose(update, (towards[name] - away[name]) / 2, atol=1e-6)


def test_more_rounds_leave_the_signed_arm_out_of_those_that_are_run_by_default(monkeypatch, tmp_path):
    """A named one is refused."""
    asked = []

    def watched(by_arm, *_):
        asked.append(by_arm.keys())
        raise InterruptedError

    monkeypatch.setattr(distil, "done_with", watched)
    for n_rounds in (1, 2):
        with pytest.raises(InterruptedError):
            distil.main(distil.Flags(preset="fast-dev", n_rounds=n_rounds, out=tmp_path), {})
        assert ("contrast, signed" in asked[-1]) is (n_rounds == 1)
    with pytest.raises(UserError, match="n_rounds is 2: it must be 1 with arm 'contrast, signed'"):
        distil.main(distil.Flags(preset="fast-dev", n_rounds=2, arms=("contrast, signed",), out=tmp_path), {})


def updates(factors):
    """B A of every matrix that has low-rank factors."""
    return {name: factors[name.replace("lora_A", "lora_B")] @ a for name, a in factors.items() if "lora_A" in name}


def test_settings_that_say_nothing_are_refused():
    with pytest.raises(ValueError, match=r"heal\.text is 'own': it must be steered with heal\.target tokens"):
        HealCfg(text="own")


def test_every_epoch_takes_every_completion_once():
    plan = batch_plan(10, 4, epochs=2, seed=1)
    assert len(plan) == 6 and plan == batch_plan(10, 4, epochs=5, seed=1)[:6]
    for epoch in (plan[:3], plan[3:]):
        assert sorted(i for batch in epoch for i in batch) == list(range(10))
    assert plan[:3] != plan[3:]


# --- rehearsal ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def fast():
    cfg = replace(FAST_DEV_PRESET, dose=replace(FAST_DEV_PRESET.dose, mode="fixed", kappa=0.5), n_threads=1)
    return cfg, check(cfg)


def test_rehearsed_text_is_the_bases_and_the_base_teaches_it(fast, tiny, monkeypatch):
    cfg, _ = fast
    heal_cfg = replace(cfg.heal, target="distribution", text="own", teacher="prompt", rehearsal=5)
    cfg = replace(cfg, heal=heal_cfg)
    inputs = check(cfg)
    student = Student(tiny, cfg.adapter)
    student.new_round(0)
    scramble(student, 1)
    student.bake()
    bench = Bench(cfg, inputs, student)
    recipe = Recipe.of(cfg)
    vector = bench.extract()
    found = bench.collect(recipe, 1, vector)
    asked = [Ask(c.prompt_index, c.prompt, c.seed) for c in found.rehearsal]
    assert [c.prompt for c in found.rehearsal] == list(inputs.rehearsal) and len(asked) == 5
    assert bench.write(bench.plain, asked, adapters="base") == list(found.rehearsal)
    assert bench.write(bench.plain, asked) != list(found.rehearsal)
    with student.using("base"):
        base = final_states(tiny, found.rehearsal)
    for reference in ("base", "prev"):
        sample = rehearsal_samples(student, found.rehearsal, replace(cfg.heal, reference=reference))[0]
        assert torch.equal(sample.reference, base[0]) == (reference == "base")
    gradients = Passes.gradients
    trained = []

    def watched(passes, batch, **more):
        trained.append(batch)
        return gradients(passes, batch, **more)

    monkeypatch.setattr(Passes, "gradients", watched)
    report = bench.heal(recipe, 1, found, bench.make_teacher(recipe, vector, found))
    rehearsed = [s for batch in trained for s in batch if s.completion_ids == found.rehearsal[0].completion_ids]
    assert len(rehearsed) == cfg.heal.epochs and all(s.rehearsed for s in rehearsed)
    assert all(torch.equal(s.teacher, base[0]) for s in rehearsed)
    assert report.n_train == len(found.kept) - report.n_validation + 5
    own = {s.ids: s for batch in trained for s in batch if not s.rehearsed}.values()
    first = torch.cat([kl_between(tiny, s.teacher, s.reference) for s in own])  # the factor begins at zero
    assert report.validation[0]["kl_trained"] == pytest.approx(first.mean().item(), rel=1e-3), "no rehearsed text"


def test_by_default_half_of_the_rehearsal_is_everyday_talk_and_half_is_near_the_trait(tmp_path):
    everyday = set(parse_texts(read_file(DATA / "contexts.jsonl")))
    bare = tmp_path / "bare.toml"
    bare.write_text('[persona]\npositive = "You are calm."\nnegative = "You are loud."\n')
    for name, n_others in (("love", 7), ("love/inner", 7), (str(bare), 8)):
        found = load_inputs(changed(SMOL, {"trait": name, "heal.rehearsal": 49, "eval.evals": ("text_quality",)}))
        near = [text for text in found.rehearsal if text not in everyday]
        assert len(set(found.rehearsal)) == 49 and len(near) == 24
        owners = {other for other in available() if set(near) & set(load_trait(other).prompts)}
        assert len(owners) == n_others and not owners & {name.split("/")[0]}
        own = {*found.trait.prompts, *(pair.prompt for pair in found.pairs)}
        assert not own & set(found.rehearsal), "a trait without prompts has everyday messages"
        assert {f"rehearsal.{other}" for other in owners} <= found.sha256.keys()
        near_alone = load_inputs(changed(SMOL, {"trait": name, "heal.rehearsal": 49, "heal.rehearsal_near": 1.0}))
        assert len({*near_alone.rehearsal} - everyday) == 49


def test_what_cannot_be_rehearsed_is_refused(fast, tmp_path):
    cfg, inputs = fast
    with pytest.raises(ValueError, match="heal.rehearsal is 5: it must be 0 with heal.target tokens"):
        HealCfg(rehearsal=5)
    with pytest.raises(ValueError, match="heal.rehearsal_near is 1.0: it must be 0.5 with heal.rehearsal 0"):
        HealCfg(rehearsal_near=1.0)
    with pytest.raises(ValueError, match="heal.rehearsal_near is 1.0: it must be 0.5"):
        HealCfg(rehearsal_near=1.0, rehearsal_prompts=tmp_path / "prompts.jsonl")
    many = replace(cfg, heal=replace(cfg.heal, target="distribution", rehearsal=25))
    with pytest.raises(UserError, match="heal.rehearsal is 25: its file has 24 rows"):
        check(many)
    for near, told in ((1.0, "heal.rehearsal_near is 1 and heal.rehearsal 2000: the other"), (0.0, "everyday mess")):
        with pytest.raises(UserError, match=told):
            check(changed(SMOL, {"heal.rehearsal": 2000, "heal.rehearsal_near": near}))
    for prompt in (inputs.eval_prompts[0], inputs.pairs[0].prompt):
        path = tmp_path / "prompts.jsonl"
        path.write_text(json.dumps({"text": "What is ice?"}) + "\n" + json.dumps({"text": prompt}) + "\n")
        both = replace(many.heal, rehearsal=2, rehearsal_prompts=path)
        with pytest.raises(UserError, match="a prompt of trait 'authority': "):
            check(replace(cfg, heal=both))


@pytest.mark.parametrize("preset", ["toy", "toy-distil", "smol", "smol-distil"])  # the others have one of their recipes
def test_every_arm_can_be_run_with_every_preset(preset):
    cfg = PRESETS[preset][1]
    names = [name for name in ARMS if has_prompts(cfg, ARMS[name])]
    assert len(names) >= len(ARMS) - 3, "the toy world has fewer prompts than three arms rehearse"
    for name in names:
        arm, _ = with_settings(name, cfg, Flags(preset=preset), {})
        heal = changed(cfg, arm.settings).heal
        assert not arm.preference or (heal.target, heal.text, heal.divergence) == ("tokens", "steered", "none")


def test_an_arm_that_rehearses_the_prompt_of_a_pair_of_the_panel_is_refused(tmp_path):
    cfg, flags = PRESETS["smol-distil"][1], Flags(preset="smol-distil")
    (asked, *_) = load_inputs(cfg).panel["formal"]
    for texts, refused in ((["Hum.", "Sing."], False), (["Hum.", f"{asked.prompt} "], True)):
        (tmp_path / "own.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        given = {"heal.rehearsal": 2, "heal.rehearsal_near": 0.5, "heal.rehearsal_prompts": tmp_path / "own.jsonl"}
        made = {
            name: with_settings(name, cfg, flags, own) for name, own in (("contrast", {}), ("prompt, rehearsed", given))
        }
        with pytest.raises(UserError, match="'prompt, rehearsed' rehearses") if refused else nullcontext():
            require_one_panel(cfg, made)
