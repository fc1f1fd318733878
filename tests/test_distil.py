"""The teacher's distribution as target: against a plain computation in float64; own text, renewal, gating, limits."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import ADAPTER, scramble
from scipy.stats import binomtest
from steer_heal.stages.budget import broken, limits, own_interval
from torch.func import functional_call

from steer_heal import round as steps
from steer_heal.check import check
from steer_heal.errors import UserError
from steer_heal.model.lm import LM, load
from steer_heal.model.steering import Condition, Vector
from steer_heal.model.student import Student
from steer_heal.presets import FAST_DEV_PRESET
from steer_heal.records import EvalResult, Metric, Scored
from steer_heal.settings import BacktrackCfg, HealCfg
from steer_heal.stages import heal as heal_module
from steer_heal.stages.generate import Ask
from steer_heal.stages.heal import SavedHeal, batch_plan, heal, in_round, read_samples, rehearsal_samples
from steer_heal.stages.passes import Passes
from steer_heal.stages.states import final_states, kl_between

PERSONA = "You are a stern judge."
CFG = HealCfg(target="distribution", divergence="none", epochs=2, lr=1e-2, batch_size=4, pressure_every=1)
BARRIER = {"divergence": "kl_rev", "lam": 2.0, "tau": 0.01}
SCALE = ADAPTER.alpha / ADAPTER.rank


def noise(lm: LM, length: float = 0.5) -> Vector:
    generator = torch.Generator().manual_seed(0)
    return Vector({1: length * torch.randn(lm.width, generator=generator)})


# --- against float64 ---------------------------------------------------------------------------------------------
def weights(model, factors) -> dict[str, torch.Tensor]:
    """Weights of a model in float64 with dense updates B A added."""
    tied = "lm_head.weight"  # it is the embedding
    out = {name: value.detach().double() for name, value in model.state_dict().items() if name != tied}
    for key in [key for key in factors if "lora_A" in key]:
        name = key.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
        out[name] = out[name] + SCALE * factors[key.replace("lora_A", "lora_B")] @ factors[key]
    return out


def plain_logp(model, state, prompt_ids, completion_ids, cap, vector=None):
    """log p over the vocabulary before each token of a completion: whole logits, nothing cached."""
    hook = None
    if vector is not None:
        layer, direction = next(iter(vector.directions.items()))

        def add(_module, _inputs, out):
            return (out[0] + direction.double(), *out[1:]) if isinstance(out, tuple) else out + direction

        hook = model.model.layers[layer].register_forward_hook(add)
    logits = functional_call(model, state, (torch.tensor([prompt_ids + completion_ids]),)).logits[0].double()
    if hook is not None:
        hook.remove()
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    return logits[len(prompt_ids) - 1 : -1].log_softmax(-1)


def plain(model, history, own, kept, cfg, teacher, cap):
    """The loss of a step, from its definition."""
    before = weights(model, history)
    now = dict(before)
    for key in [key for key in own if "lora_A" in key]:
        name = key.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
        now[name] = before[name] + SCALE * own[key.replace("lora_A", "lora_B")] @ own[key]
    total = torch.zeros((), dtype=torch.float64)
    for c in kept:
        logp = plain_logp(model, now, c.prompt_ids, c.completion_ids, cap)
        with torch.no_grad():
            taught = plain_logp(model, before, teacher[0][c.prompt_index], c.completion_ids, cap, teacher[1])
            reference = plain_logp(model, before, c.prompt_ids, c.completion_ids, cap)
        if cfg.kl == "forward":
            fit = (taught.exp() * (taught - logp)).sum(-1)
        else:
            fit = (logp.exp() * (logp - taught)).sum(-1)
        total = total + fit.mean()
        if cfg.divergence != "none":
            rmse = ((logp.exp() * (logp - reference)).sum(-1).square().mean() + 1e-12).sqrt()
            total = total + cfg.lam * torch.relu(rmse - cfg.tau)
    return total / len(kept)


def step(student: Student, kept, cfg: HealCfg, teacher: Condition):
    """(loss, gradients by name) of one step, as built."""
    cfg = in_round(cfg, 0)
    samples = read_samples(student, kept, cfg, teacher=teacher)
    student.new_round(0)
    scramble(student, 5, scale=0.2)
    names = [n.replace(".round.", ".") for n, _ in student.adapter.peft.named_parameters() if ".round." in n]
    with student.training() as parameters:
        terms = Passes(student.lm, cfg, ADAPTER.layers, parameters).gradients(samples, with_pressure=False)
        gradients = dict(zip(names, [p.grad for p in parameters], strict=True))
    return terms.fit + terms.barrier, gradients


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("kl", ["forward", "reverse"])
@pytest.mark.parametrize("more", [{}, BARRIER], ids=["free", "barrier"])
def test_loss_and_gradient_are_those_of_a_plain_computation_in_float64(with_history, kept, monkeypatch, more, kl, cap):
    lm = with_history.lm
    assert lm.model.config.tie_word_embeddings
    monkeypatch.setattr(LM, "chunk_size", 16)  # several chunks, which cross completions
    lm.model.config.final_logit_softcapping = cap
    cfg = replace(CFG, kl=kl, **more)
    teacher = Condition(PERSONA, noise(lm), 1.0)
    kept = kept[:5]
    history = {key: value.double() for key, value in with_history.factors("history").items()}
    loss, gradients = step(with_history, kept, cfg, teacher)
    own = {key: value.double().requires_grad_() for key, value in with_history.factors("round").items()}
    model = load("tiny-random").model.double()
    prompts = {c.prompt_index: lm.chat(c.prompt, PERSONA) for c in kept}
    expected = plain(model, history, own, kept, cfg, (prompts, noise(lm)), cap)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    found, wanted = (
        torch.cat([side[name].flatten().double() for name in sorted(own)])
        for side in (gradients, {name: value.grad for name, value in own.items()})
    )
    assert wanted.norm() > 1e-3 and (found - wanted).norm() <= 1e-4 * wanted.norm()


def test_bfloat16_weights_give_the_loss_and_the_gradient_of_float32_within_a_tenth(kept):
    read = []
    for dtype in ("float32", "bfloat16"):
        lm = load("tiny-random", dtype=dtype)
        loss, gradients = step(
            Student(lm, ADAPTER), kept[:5], replace(CFG, **BARRIER), Condition(PERSONA, noise(lm), 1.0)
        )
        read.append((loss, torch.cat([g.flatten().float() for _, g in sorted(gradients.items())])))
    (loss, gradient), (half_loss, half_gradient) = read
    assert half_loss == pytest.approx(loss, rel=0.1)
    assert (half_gradient - gradient).norm() <= 0.1 * gradient.norm()


# --- what the heal does with it ----------------------------------------------------------------------------------
def test_the_student_comes_to_write_as_its_teacher_does(student, kept):
    lm = student.lm
    teacher = Condition(PERSONA, noise(lm), 1.0)
    report = heal(student, kept, replace(CFG, epochs=8), round_=0, seed=3, teacher=teacher)
    assert report.validation[-1]["fit"] < 0.5 * report.validation[0]["fit"]
    assert report.validation[0]["divergence"] < 1e-3, "a heal starts at its reference"
    taught = final_states(lm, kept, teacher)
    with student.using("full"):
        own = final_states(lm, kept)
    now, before = (
        torch.cat([kl_between(lm, t, s) for t, s in zip(taught, states, strict=True)]).mean()
        for states in (own, final_states(lm, kept))
    )
    assert now < 0.5 * before


def test_positions_past_the_limit_are_left_out(student, kept):
    lm = student.lm
    teacher = Condition(PERSONA, noise(lm), 1.0)
    far = [kl_between(lm, *pair) for pair in zip(final_states(lm, kept, teacher), final_states(lm, kept), strict=True)]
    limit = torch.cat(far).median().item()
    samples = read_samples(student, kept, replace(CFG, max_departure=limit), teacher=teacher)
    assert all(torch.equal(s.weights, (kl <= limit).float()) for s, kl in zip(samples, far, strict=True))
    report = heal(student, kept, replace(CFG, max_departure=limit), round_=0, seed=3, teacher=teacher)
    assert report.left_out == pytest.approx(0.5, abs=0.02)
    assert report.validation[0]["fit"] < torch.cat(far).mean()


def test_where_every_position_is_left_out_nothing_is_learnt(student, kept):
    teacher = Condition(PERSONA, noise(student.lm), 1.0)
    report = heal(student, kept, replace(CFG, max_departure=1e-9), round_=0, seed=3, teacher=teacher)
    assert report.left_out == 1.0 and all(step.fit == 0 for step in report.steps)
    assert all(not value.any() for key, value in student.factors("round").items() if "lora_B" in key)


def test_settings_that_say_nothing_are_refused():
    for wrong in ({"max_departure": 1.0}, {"refresh_every": 4}, {"text": "own"}, {"refresh": "teacher"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            HealCfg(**wrong)


# --- new text while it heals -------------------------------------------------------------------------------------
ONLINE = replace(CFG, text="own", refresh_every=2, epochs=3)


def renewing(student: Student, kept, calls: list):
    """A renewal whose text depends on the student as it is: the completions whatever its logits are."""

    def renew(n, held_out):
        with student.using("full") as lm:
            read = [lm.logits(h).max().item() for h in final_states(lm, kept)]
        calls.append((n, tuple(held_out), read))
        rows = [c for c in kept if c.prompt_index not in held_out]
        return [Scored(c, {}, (), () if i % 4 else ("loop",)) for i, c in enumerate(rows)], Condition(PERSONA)

    return renew


def test_text_is_renewed_by_the_student_as_it_is_and_never_for_held_out_prompts(student, kept):
    calls = []
    renew = renewing(student, kept, calls)
    report = heal(student, kept, ONLINE, round_=0, seed=3, teacher=Condition(PERSONA), renew=renew)
    n_windows = -(-len(report.steps) // 2)
    assert [n for n, _, _ in calls] == list(range(n_windows - 1)) and n_windows > 2
    assert {held for _, held, _ in calls} == {report.validation_prompts}
    assert calls[0][2] != calls[1][2], "the second text was written by a student that had learnt"
    assert [step.n_texts for step in report.steps[:3]] == [14, 14, 10]


def test_a_heal_that_is_resumed_between_two_texts_ends_bit_for_bit_where_the_whole_one_does(student, kept):
    saved = {}

    def on_step(state):
        if len(state.steps) % 2 == 0:
            shared = state.saved()
            tensors = {name: tensor.clone() for name, tensor in shared.tensors.items()}
            saved[len(state.steps)] = SavedHeal(tensors, shared.steps, shared.curve)

    def healed(**more):
        student.discard_round()
        more |= {"teacher": Condition(PERSONA), "renew": renewing(student, kept, [])}
        report = heal(student, kept, ONLINE, round_=0, seed=3, **more)
        return student.factors("round"), report

    factors, report = healed(on_step=on_step)
    for n in (2, 4, max(saved)):
        again, same = healed(saved=saved[n])
        assert same == report and all(torch.equal(again[key], factors[key]) for key in factors)


def test_text_of_which_nothing_passes_the_filter_ends_the_heal(student, kept):
    def nothing(n, held_out):
        return [Scored(c, {}, ("loop",), ("loop",)) for c in kept], None

    with pytest.raises(UserError, match="none of the 16 texts.*refresh-every"):
        heal(student, kept, ONLINE, round_=0, seed=3, teacher=Condition(PERSONA), renew=nothing)


def test_every_epoch_takes_every_completion_once():
    plan = batch_plan(10, 4, n_steps=8, seed=1)
    assert len(plan) == 8 and plan == batch_plan(10, 4, n_steps=20, seed=1)[:8]
    for epoch in (plan[:3], plan[3:6]):
        assert sorted(i for batch in epoch for i in batch) == list(range(10))
    assert plan[:3] != plan[3:6]


# --- a round of it -----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def fast():
    cfg = replace(FAST_DEV_PRESET, dose=replace(FAST_DEV_PRESET.dose, mode="fixed", kappa=0.5), n_threads=1)
    return cfg, check(cfg)


@pytest.mark.parametrize(
    "made_of, system, steered", [("vector", False, True), ("prompt", True, False), ("both", True, True)]
)
def test_own_text_is_the_students_and_the_dose_the_teachers(fast, tiny, made_of, system, steered):
    cfg, inputs = fast
    student = Student(tiny, cfg.adapter)
    cfg = replace(cfg, heal=replace(cfg.heal, target="distribution", text="own", teacher=made_of))
    vector = steps.extract(student, inputs, cfg)
    found = steps.collect(student, vector, inputs, cfg, 0)
    assert {c.dose for c in found.completions} == {0.0} and found.dose == (0.5 if steered else 0.0)
    asked = [Ask(c.prompt_index, c.prompt, c.seed) for c in found.completions]
    assert steps.write(student, Condition(inputs.trait.plain_system), asked, inputs, cfg) == found.completions
    who = steps.teacher(vector, found.dose, inputs, cfg)
    assert (who.system == inputs.trait.positive) == system and (who.vector is vector) == steered
    report = steps.heal(student, found, inputs, cfg, 0, vector)
    assert report.validation[0]["fit"] > 0


def test_in_mode_survival_the_teachers_text_chooses_the_dose_and_does_not_train(fast, tiny):
    cfg, inputs = fast
    cfg = replace(cfg, dose=replace(cfg.dose, mode="survival"))
    cfg = replace(cfg, heal=replace(cfg.heal, target="distribution", text="own", teacher="both"))
    student = Student(tiny, cfg.adapter)
    found = steps.collect(student, steps.extract(student, inputs, cfg), inputs, cfg, 0)
    n_probed = sum(probe.n for probe in found.probes)
    assert n_probed > 0 and all(row.completion.dose > 0 for row in found.scored[:n_probed])
    assert {row.completion.dose for row in found.scored[n_probed:]} == {0.0}
    assert found.dose == found.kappa * max(cfg.gen.alphas)


def test_tokens_of_the_prompted_model_carry_the_plain_prompt(fast, tiny):
    cfg, inputs = fast
    cfg = replace(cfg, heal=replace(cfg.heal, teacher="prompt"))
    student = Student(tiny, cfg.adapter)
    found = steps.collect(student, steps.extract(student, inputs, cfg), inputs, cfg, 0)
    assert found.dose == 0.0
    asked = [Ask(c.prompt_index, c.prompt, c.seed) for c in found.completions]
    assert steps.write(student, Condition(inputs.trait.positive), asked, inputs, cfg) == found.completions
    assert all(c.prompt_ids == tiny.chat(c.prompt, inputs.trait.plain_system) for c in found.completions)


def test_every_renewal_continues_with_the_next_prompts(fast, tiny, monkeypatch):
    cfg, inputs = fast
    distil = {"target": "distribution", "text": "own", "teacher": "both", "refresh_every": 1, "batch_size": 3}
    cfg = replace(cfg, heal=replace(cfg.heal, **distil))
    student = Student(tiny, cfg.adapter)
    vector = steps.extract(student, inputs, cfg)
    found = steps.collect(student, vector, inputs, cfg, 0)
    write = steps.write
    asked = []

    def watched(student, condition, asks, *rest):
        asked.append([ask.prompt_index for ask in asks])
        return write(student, condition, asks, *rest)

    monkeypatch.setattr(steps, "write", watched)
    report = steps.heal(student, found, inputs, cfg, 0, vector)
    own = [i for i in range(len(inputs.prompts)) if i not in report.validation_prompts]
    assert len(asked) == len(report.steps) - 1
    assert [i for text in asked for i in text] == [own[k % len(own)] for k in range(3 * len(asked))]


def test_a_renewed_teacher_is_the_student_as_it_is_and_otherwise_that_of_the_start(student, kept):
    student.new_round(0)
    scramble(student, 1)
    who = Condition(PERSONA)
    with student.using("full"):
        moved = final_states(student.lm, kept, who)
    for refresh, of, same in (("teacher", "full", True), ("text", "prev", False)):
        samples = read_samples(student, kept, replace(ONLINE, refresh=refresh), teacher=who, state=of)
        assert torch.allclose(samples[0].teacher, moved[0], atol=1e-4) is same


@pytest.mark.parametrize("refresh, n_read", [("teacher", 1), ("text", 0)])
def test_what_a_renewal_makes_anew(fast, tiny, monkeypatch, refresh, n_read):
    """With teacher: a vector a renewal, and a teacher made of the student that has learnt; else that of the start."""
    cfg, inputs = fast
    distil = {"target": "distribution", "text": "own", "teacher": "vector", "refresh_every": 2, "refresh": refresh}
    cfg = replace(cfg, heal=replace(cfg.heal, **distil))
    student = Student(tiny, cfg.adapter)
    vector = steps.extract(student, inputs, cfg)
    found = steps.collect(student, vector, inputs, cfg, 0)
    extract = steps.extract
    read = heal_module.read_samples
    extracted = []
    states = []

    def watched_extract(*args):
        extracted.append(args)
        return extract(*args)

    def watched_read(*args, **more):
        states.append(more.get("state"))
        return read(*args, **more)

    monkeypatch.setattr(steps, "extract", watched_extract)
    monkeypatch.setattr(heal_module, "read_samples", watched_read)
    steps.heal(student, found, inputs, cfg, 0, vector)
    n_renewed = len(states) - 1
    assert n_renewed > 0 and len(extracted) == n_read * n_renewed
    assert states[1:] == n_renewed * ["full" if refresh == "teacher" else "prev"]


# --- rehearsal ---------------------------------------------------------------------------------------------------
def test_rehearsed_text_is_the_bases_and_the_base_teaches_it(fast, tiny, monkeypatch):
    cfg, _ = fast
    heal_cfg = replace(cfg.heal, target="distribution", text="own", teacher="prompt", rehearsal=5)
    cfg = replace(cfg, heal=heal_cfg)
    inputs = check(cfg)
    student = Student(tiny, cfg.adapter)
    student.new_round(0)
    scramble(student, 1)
    student.bake()
    vector = steps.extract(student, inputs, cfg)
    found = steps.collect(student, vector, inputs, cfg, 1)
    asked = [Ask(c.prompt_index, c.prompt, c.seed) for c in found.rehearsal]
    plain = Condition(inputs.trait.plain_system)
    assert [c.prompt for c in found.rehearsal] == list(inputs.rehearsal) and len(asked) == 5
    assert steps.write(student, plain, asked, inputs, cfg, adapters="base") == list(found.rehearsal)
    assert steps.write(student, plain, asked, inputs, cfg) != list(found.rehearsal)
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
    report = steps.heal(student, found, inputs, cfg, 1, vector)
    rehearsed = [s for batch in trained for s in batch if s.completion_ids == found.rehearsal[0].completion_ids]
    assert len(rehearsed) == cfg.heal.epochs and all(s.rehearsed for s in rehearsed)
    assert all(torch.equal(s.teacher, base[0]) for s in rehearsed)
    assert report.n_train == len(found.kept) - report.n_validation + 5


def test_the_control_rehearses_nothing(fast, tiny):
    cfg, _ = fast
    cfg = replace(cfg, heal=replace(cfg.heal, target="distribution", text="own", rehearsal=5))
    assert steps.collect(Student(tiny, cfg.adapter), None, check(cfg), cfg, -1).rehearsal == ()


def test_what_cannot_be_rehearsed_is_refused(fast, tmp_path):
    cfg, inputs = fast
    with pytest.raises(ValueError, match="heal.rehearsal is 5: it must be 0 with heal.target tokens"):
        HealCfg(rehearsal=5)
    with pytest.raises(ValueError, match="heal.rehearsal is 5: it must be 0 with heal.refresh_every 2"):
        HealCfg(target="distribution", text="own", refresh_every=2, rehearsal=5)
    many = replace(cfg, heal=replace(cfg.heal, target="distribution", rehearsal=25))
    with pytest.raises(UserError, match="heal.rehearsal is 25: its file holds 24 rows"):
        check(many)
    for prompt in (inputs.eval_prompts[0], inputs.pairs[0].prompt):
        path = tmp_path / "prompts.jsonl"
        path.write_text(json.dumps({"text": "What is ice?"}) + "\n" + json.dumps({"text": prompt}) + "\n")
        both = replace(many.heal, rehearsal=2, rehearsal_prompts=path)
        with pytest.raises(UserError, match="a prompt of trait 'authority': what is rehearsed"):
            check(replace(cfg, heal=both))


# --- limits ------------------------------------------------------------------------------------------------------
SHARE = Metric(name="degenerate_frac", item="degenerate", form=".0%", title="broken texts", good=0.1, broken=0.5)
MASS = Metric(name="coherence", item="mass", form=".4f", good=0.95, broken=0.85)
DRIFT = Metric(name="kl_base", item="kl_base")


def test_a_limit_is_the_bad_end_of_the_bases_interval_or_what_is_good():
    values = {"degenerate": [1.0] * 8 + [0.0] * 56, "mass": [0.9, 0.92, 0.94, 0.96] * 16, "kl_base": [0.0] * 64}
    base = EvalResult({}, values)
    found = limits([SHARE, MASS, DRIFT], base, BacktrackCfg(retries=1), 0)
    assert found["degenerate_frac"] == pytest.approx(binomtest(8, 64).proportion_ci(method="wilson").high)
    assert 0.92 < found["coherence"] < 0.93 and "kl_base" not in found
    whole = EvalResult({}, {"degenerate": [0.0] * 64, "mass": [0.999] * 63 + [0.998], "kl_base": [0.0] * 64})
    assert limits([SHARE, MASS], whole, BacktrackCfg(), 0) == {"degenerate_frac": 0.1, "coherence": 0.95}
    given = limits([SHARE, MASS, DRIFT], base, BacktrackCfg(limits={"degenerate_frac": 0.3, "kl_base": 0.2}), 0)
    assert given == {**found, "degenerate_frac": 0.3, "kl_base": 0.2}


def test_what_is_past_a_limit_is_said_with_its_value():
    limit = {"degenerate_frac": 0.1, "coherence": 0.95, "kl_base": 0.2}
    assert broken([SHARE, MASS, DRIFT], {"degenerate_frac": 0.1, "coherence": 0.95, "kl_base": 0.2}, limit) == []
    assert broken([SHARE, MASS, DRIFT], {"degenerate_frac": 0.2, "coherence": None, "kl_base": 0.3}, limit) == [
        "broken texts is 20%, the limit is 10%",
        "coherence has no value, the limit is 0.9500",
        "kl_base is 0.300, the limit is 0.200",
    ]


def test_the_interval_of_a_share_is_not_empty_where_nothing_is_broken():
    assert own_interval([0.0] * 24, 0)[1] == pytest.approx(0.138, abs=1e-3)
    low, high = own_interval([0.2, 0.4, 0.6, 0.8] * 8, 0)
    assert 0.38 < low < 0.48 < 0.52 < high < 0.62
    assert own_interval([float("nan")], 0) == (float("-inf"), float("inf"))
