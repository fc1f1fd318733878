"""What else moved: the pairs of every other trait, and the root mean square of their shifts."""

import json
import math
from dataclasses import replace

import pytest

from steer_heal.check import check
from steer_heal.errors import UserError
from steer_heal.evals import EVALS, metrics_of, panel
from steer_heal.evals.base import Subject, evaluate
from steer_heal.evals.replies import pair_margins
from steer_heal.inputs import load_inputs
from steer_heal.inputs.files import DATA
from steer_heal.inputs.pairs import Pair
from steer_heal.inputs.traits import available
from steer_heal.model.state import State
from steer_heal.model.steering import Condition
from steer_heal.presets import FAST_DEV_PRESET
from steer_heal.settings import EvalCfg, RunConfig, changed

PANEL = {
    "love": (Pair("Do you love people?", "Yes, I love people.", "No."), Pair("Are you glad?", "Yes, I am.", "No.")),
    "blunt": (Pair("How is my soup?", "It is cold.", "You are a wonderful cook."),),
    "care": (Pair("What is ice?", "Ice is water.", "Ice is a stone."),),
}


def of(trait: str, **settings) -> RunConfig:
    """Settings of a run that reads the panel."""
    base = RunConfig()
    return replace(base, trait=trait, eval=replace(base.eval, **{"evals": ("contrast", "panel"), **settings}))


# --- the pairs ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("trait", ["love", "love/extreme", str(DATA / "traits/love.toml")])
def test_the_panel_is_every_bundled_trait_but_the_run_s_own(trait):
    found = load_inputs(of(trait))
    assert set(found.panel) == {*available()} - {"love"} and {len(pairs) for pairs in found.panel.values()} == {23}
    rows = [json.loads(line) for line in (DATA / "pairs/blunt.jsonl").read_text().splitlines()]
    assert [pair.prompt for pair in found.panel["blunt"]] == [row["prompt"] for row in rows[::2]], "evenly spaced"
    assert found.sha256 == load_inputs(of(trait)).sha256


def test_of_a_folder_of_pairs_only_its_files_are_read_and_a_short_one_whole(tmp_path):
    found = load_inputs(of("authority", pairs=DATA / "toylm/pairs"))
    assert {name: len(pairs) for name, pairs in found.panel.items()} == {"love": 20}
    assert {len(load_inputs(of("authority", n_panel=n)).panel["love"]) for n in (0, 100)} == {46}
    one = load_inputs(of("authority", pairs=DATA / "toylm/pairs/authority.jsonl"))
    assert len(one.panel) == 7, "a file holds the pairs of the run's own trait"
    (tmp_path / "authority.jsonl").write_text((DATA / "toylm/pairs/authority.jsonl").read_text())
    with pytest.raises(UserError, match=r"no pairs of a trait other than 'authority'.*leave out panel"):
        load_inputs(of("authority", pairs=tmp_path))


def test_pairs_whose_prompt_trains_or_is_rehearsed_are_left_out(tmp_path):
    trained, rehearsed = (list(load_inputs(of("love")).panel[name][:2]) for name in ("blunt", "honesty"))
    own, file = tmp_path / "own.toml", tmp_path / "rehearsed.jsonl"
    prompts = [*(pair.prompt.upper() for pair in trained), *(f"What is thing {i}?" for i in range(80))]
    persona = '[persona]\npositive = "You are calm."\nnegative = "You are loud."\n'
    own.write_text(f"prompts = {json.dumps(prompts, ensure_ascii=False)}\n{persona}")
    file.write_text("".join(json.dumps({"text": f"{pair.prompt} "}) + "\n" for pair in rehearsed))
    cfg = of(str(own), evals=("panel",), n_panel=0)
    heal = {"heal.target": "distribution", "heal.rehearsal": 2, "heal.rehearsal_prompts": file}
    found = load_inputs(changed(cfg, heal)).panel
    for name, seen in (("blunt", trained), ("honesty", rehearsed)):
        assert len(found[name]) == 44 and not {*seen} & {*found[name]}
    assert len(found["love"]) == 46
    whole, fewer = (load_inputs(changed(cfg, own)).sha256 for own in ({}, heal))
    differ = {name for name in whole if name.startswith("panel.") and whole[name] != fewer[name]}
    assert differ == {"panel.honesty"}, "another run that reads other pairs of a trait is told by their hash"
    (folder := tmp_path / "pairs").mkdir()
    for name, pairs in (("blunt", trained), ("honesty", rehearsed)):
        rows = [{"prompt": each.prompt, "positive": "Yes.", "negative": "No."} for each in pairs]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert {*load_inputs(changed(of(str(own), evals=("panel",), pairs=folder), {})).panel} == {"honesty"}
    with pytest.raises(UserError, match="the prompt of every pair is trained or rehearsed"):
        load_inputs(changed(of(str(own), evals=("panel",), pairs=folder), heal))


def test_without_the_eval_no_other_trait_is_read():
    found = load_inputs(of("love", evals=("contrast",)))
    assert found.panel == {} and not any(name.startswith("panel") for name in found.sha256)


# --- the eval ----------------------------------------------------------------------------------------------------
def subject(student, adapters="full", base=None, given=PANEL) -> Subject:
    inputs = replace(load_inputs(FAST_DEV_PRESET), panel=given)
    state = State(name="healed", round=0, adapters=adapters, condition=Condition("You are a poet."))
    cfg = EvalCfg(n_prompts=2, n_texts=1, max_new_tokens=4, n_bootstrap=50)
    return Subject(student=student, state=state, inputs=inputs, cfg=cfg, keep=FAST_DEV_PRESET.filter, seed=1, base=base)


def test_items_are_margins_by_trait_and_their_mean_shifts_from_base(with_history):
    base = evaluate(subject(with_history, "base"), [EVALS["panel"]])
    healed = evaluate(subject(with_history, base=base), [EVALS["panel"]])
    means = {}
    for adapters, found in (("base", base), ("full", healed)):
        with with_history.using(adapters) as lm:
            for name, pairs in PANEL.items():
                margins = pair_margins(lm, pairs, Condition("You are a poet."))
                assert found.items[f"panel_{name}"] == margins
                means[adapters, name] = sum(margins) / len(margins)
                assert found.metrics[f"panel_{name}_nats"] == pytest.approx(means[adapters, name])
    shifts = [means["full", name] - means["base", name] for name in PANEL]
    assert base.items["panel"] == [0.0] * 3 and healed.items["panel"] == pytest.approx(shifts)
    assert base.metrics["panel_rms_nats"] == 0
    rms = math.sqrt(sum(shift**2 for shift in shifts) / 3)
    assert healed.metrics["panel_rms_nats"] == pytest.approx(rms) and rms > 1e-3
    low, high = healed.metrics["panel_rms_nats_lo"], healed.metrics["panel_rms_nats_hi"]
    assert low is not None and high is not None and (low + high) / 2 == pytest.approx(rms)
    own = [healed.metrics[f"panel_authority_nats{end}"] for end in ("", "_lo", "_hi")]
    assert own == [None] * 3, "the run's own trait"


def test_pairs_and_traits_without_a_number_are_left_out(with_history, monkeypatch):
    base = evaluate(subject(with_history, "base"), [EVALS["panel"]])
    lost = lambda lm, pairs, condition: [math.nan, 1.0] if len(pairs) == 2 else [math.nan]
    monkeypatch.setattr(panel, "pair_margins", lost)
    found = evaluate(subject(with_history, base=base), [EVALS["panel"]])
    change = 1.0 - base.items["panel_love"][1]
    assert found.items["panel"] == pytest.approx([change, math.nan, math.nan], nan_ok=True)
    assert found.metrics["panel_rms_nats"] == pytest.approx(abs(change))


def test_the_metrics_are_known_without_inputs_and_only_the_root_mean_square_is_shown():
    metrics = {metric.name: metric for metric in metrics_of(("panel",))}
    assert {*metrics} == {*(f"panel_{name}_nats" for name in available()), "panel_rms_nats"}
    assert [name for name, metric in metrics.items() if metric.shown] == ["panel_rms_nats"]
    assert metrics["panel_rms_nats"].how == "rms" and all(metric.moved is None for metric in metrics.values())


def test_the_settings_are_checked_with_the_panel():
    assert {*check(replace(of("blunt"), device="cpu")).panel} == {*available()} - {"blunt"}
