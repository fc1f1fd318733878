"""base and prompted are measured once for the same weights and settings, whatever the model is called."""

import dataclasses

import pytest
import torch

import steer_heal.eval_cache as eval_cache
from steer_heal.config import FAST_DEV_PRESET
from steer_heal.evals.metrics import Condition
from steer_heal.eval_cache import EvalCache
from steer_heal.events import read_events
from steer_heal.files import ROOT
from steer_heal.lm import LM, weights_sha256
from steer_heal.run import main
from steer_heal.stages.bake import Student
from steer_heal.stages.evaluate import load_items
from steer_heal.traits import load_trait

CFG = dataclasses.replace(FAST_DEV_PRESET.eval, n_texts=2, n_prompts=2, max_new_tokens=4, think_tokens=0, n_bootstrap=10)
VARIES = {"t", "wall_s"}


@pytest.fixture
def measured(tiny: LM, heal_cfg, tmp_path, monkeypatch):
    """Asks the cache, as Session does; the list counts what was really measured."""
    trait, counted, work = load_trait("authority", FAST_DEV_PRESET.gen.prompts), [], eval_cache.evaluate
    monkeypatch.setattr(eval_cache, "evaluate", lambda *args: counted.append(1) or work(*args))

    def ask(lm=tiny, cfg=CFG, which="base", system="", seed=1, trait=trait, base=None, student=None, keep=FAST_DEV_PRESET.filter):
        cache = EvalCache(tmp_path / "cache", student or Student(lm, heal_cfg), load_items(cfg, trait), trait)
        return cache(which, Condition(system), cfg, keep, seed, base)

    return ask, counted


def test_the_second_time_it_is_read_and_the_same(measured, tmp_path):
    ask, counted = measured
    first = ask()
    again = ask()
    assert len(counted) == 1 and again.metrics == first.metrics
    assert repr(again.items) == repr(first.items)  # NaN included
    prompted = ask(system="You are a poet.", base=first)
    assert len(counted) == 2 and ask(system="You are a poet.", base=again).metrics == prompted.metrics and len(counted) == 2
    file = next((tmp_path / "cache").glob("*.json"))
    for path in (tmp_path / "cache").glob("*.json"):
        path.write_text(path.read_text()[:-9])  # torn
    assert ask().metrics == first.metrics and len(counted) == 3 and file.exists()


def test_changed_weights_under_the_same_name_are_measured(measured, tiny: LM):
    ask, counted = measured
    first = ask()
    with torch.no_grad():
        next(tiny.model.parameters())[3, 3] += 0.5
    assert ask().metrics != first.metrics and len(counted) == 2


@pytest.mark.parametrize("change", [
    {"seed": 2}, {"system": "You are a poet."}, {"cfg": dataclasses.replace(CFG, think_tokens=1)}, {"cfg": dataclasses.replace(CFG, n_bootstrap=11)},
    {"keep": dataclasses.replace(FAST_DEV_PRESET.filter, loop_max=0.5)},
    {"trait": dataclasses.replace(load_trait("authority", FAST_DEV_PRESET.gen.prompts), negative="You are a stone.")},
], ids=lambda change: next(iter(change)))
def test_whatever_a_result_hangs_on_is_part_of_its_name(measured, change):
    ask, counted = measured
    ask()
    ask(**change)
    assert len(counted) == 2


def test_the_program_and_the_sampling_are_part_of_its_name(measured, tiny: LM, monkeypatch):
    ask, counted = measured
    ask()
    tiny.model.generation_config.temperature = 0.5
    ask()
    monkeypatch.setattr(eval_cache, "versions", lambda: {"torch": "another"})
    ask()
    assert len(counted) == 3


def test_only_the_untouched_model_is_kept(measured, tmp_path):
    ask, counted = measured
    for _ in range(2):
        ask(which="full")
        ask(cfg=dataclasses.replace(CFG, cache=False))
    assert len(counted) == 4 and not (tmp_path / "cache").exists()


def test_the_name_of_the_weights_is_theirs_alone(tiny: LM, heal_cfg):
    untouched = weights_sha256(tiny.model)
    student = Student(tiny, heal_cfg)
    student.new_round(1)
    assert weights_sha256(tiny.model) == untouched, "adapters count"
    with torch.no_grad():
        tiny.model.get_parameter("model.norm.weight").neg_()
    assert weights_sha256(tiny.model) != untouched
    assert weights_sha256(tiny.model.bfloat16()) != untouched


def test_a_second_run_writes_the_same_events(tmp_path, monkeypatch):
    measured, work = [], eval_cache.evaluate
    monkeypatch.setattr(eval_cache, "evaluate", lambda *args: measured.append(args[1]) or work(*args))
    few = tmp_path / "few.jsonl"
    few.write_text("".join((ROOT / "data/toylm/vignettes.jsonl").read_text().splitlines(keepends=True)[:20]))
    for _ in range(2):
        assert main([
            "fast-dev", "--quiet", "--out", str(tmp_path), "--no-control", "--n-rounds", "1", "--heal.epochs", "1", "--eval.n-bootstrap", "10",
            "--n-threads", "1", "--steer.n-contexts", "4", "--gen.max-new-tokens", "6", "--eval.vignettes", str(few),
        ]) == 0
    first, second = ([e for e in read_events(path.parent) if e["stage"] in ("base", "prompted", "healed")] for path in sorted(tmp_path.glob("*/events.jsonl")))
    strip = lambda events: [{k: v for k, v in e.items() if k not in VARIES} for e in events]
    assert strip(first) == strip(second)
    assert measured == ["base", "base", "full", "full", "full", "full"], "base, prompted, steered and healed; then the last two alone"
    assert len(list((tmp_path / ".cache" / "eval").iterdir())) == 2
