"""`run --plan`: the stages that the run then has, and nothing written."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from runs import DOORS
from test_shown_flags import SMALLEST

from steer_heal import SteerHeal
from steer_heal import estimate as module
from steer_heal.__main__ import main
from steer_heal.estimate import estimate
from steer_heal.evals import classifier
from steer_heal.presets import CHAT_PRESET
from steer_heal.settings import changed
from steer_heal.stages.heal import HealState

SMALL = {**SMALLEST, "heal.contrast_kl": 0.01, "eval.evals": ("contrast", "holds", "panel", "everyday", "text_quality")}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A few items are read of each kind, however short that takes."""
    monkeypatch.setattr(module, "LONG_ENOUGH", 1e-9)


@pytest.mark.parametrize("change", [{}, {"control": False, "n_rounds": 2}])
def test_the_plan_has_the_stages_of_the_run(change):
    cfg = changed(CHAT_PRESET, {**SMALL, **change})
    with SteerHeal(trait=DOORS, settings=cfg) as sh:
        before = [each.clone() for each in sh.lm.model.parameters()]
        plan = {stage.stage: stage for stage in estimate(sh.bench)}
        assert sh.n_rounds == 0 and sh.student.n_rounds == 0
        assert all(map(torch.equal, before, sh.lm.model.parameters()))
        n_states = len(sh.loop()) if not change else 2 + 2 * 2
    assert plan["states"].times == n_states
    assert plan["heal"].times == plan["text"].times == cfg.n_rounds + cfg.control
    assert plan["text"].each == "54 (at most 72) texts of 6 tokens", "48 of them are rehearsed"
    assert plan["pre-flight"].times == 0, "an untrained model is not asked"
    assert all(stage.seconds > 0 for stage in plan.values() if stage.times)


def test_more_of_a_thing_takes_longer_and_a_vector_has_its_probes():
    few = {"dose.mode": "survival", "heal.teacher": "vector", "heal.contrast_kl": 0.0, "gen.max_new_tokens": 24}
    with SteerHeal(trait=DOORS, settings=changed(CHAT_PRESET, {**SMALL, **few})) as sh:
        own = {stage.stage: stage for stage in estimate(sh.bench)}
        cfg = changed(sh.cfg, {"n_rounds": 2, "heal.epochs": 9})
        more = {stage.stage: stage for stage in estimate(replace(sh.bench, cfg=cfg))}
    assert own["text"].each.startswith("58 (at most 76) "), "6 texts, 4 probes and 48 that are rehearsed"
    assert more["heal"].each != own["heal"].each
    assert more["states"].times > own["states"].times


def test_the_probe_reads_more_items_until_they_take_long_enough(monkeypatch):
    monkeypatch.setattr(module, "LONG_ENOUGH", 1e-9)
    sizes = []
    few = module._few
    monkeypatch.setattr(module, "_few", lambda bench, n: sizes.append(n) or few(bench, n))
    with SteerHeal(trait=DOORS, settings=changed(CHAT_PRESET, SMALL)) as sh:
        module._seconds_of_a_state(sh.bench)
        assert sizes == [1, 4]
        monkeypatch.setattr(module, "LONG_ENOUGH", 1e9)
        found = module._seconds_of_a_state(sh.bench)
    n_items = max(80, len(sh.bench.inputs.pairs))
    assert sizes[-1] >= n_items > sizes[-2] // 4, "all items, and no more"
    assert found.keys() == {"margins", "texts", *SMALL["eval.evals"]}


def test_the_command_prints_the_plan_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [word for name, value in SMALL.items() if name != "control" for word in flag(name, value)]
    assert main(["run", "chat", "--plan", "--quiet", *flags]) == 0
    out = capsys.readouterr().out
    assert "heal" in out and "minutes in all" in out and "memory: weights" in out
    assert list(tmp_path.iterdir()) == []


def flag(name: str, value: object) -> list[str]:
    values = value if isinstance(value, tuple) else (value,)
    return [f"--{name}".replace("_", "-"), *map(str, values)]


def test_what_an_eval_writes_once_a_run_is_counted_once():
    pytest.importorskip("sklearn")
    cfg = changed(CHAT_PRESET, {**SMALL, "eval.evals": ("contrast", "classifier"), "eval.n_texts": 4})
    with SteerHeal(trait=DOORS, settings=cfg) as sh:
        plan = {stage.stage: stage for stage in estimate(sh.bench)}
        n_prompts = len(sh.bench.inputs.trait.prompts)
        assert plan["text of the evals"].times == 1
        assert plan["text of the evals"].each == f"{2 * n_prompts} texts of {cfg.eval.max_new_tokens} tokens"


def test_the_seconds_of_a_state_are_without_what_is_written_once(monkeypatch):
    pytest.importorskip("sklearn")
    writings = []
    written = classifier.generate
    monkeypatch.setattr(classifier, "generate", lambda *args, **how: writings.append(1) or written(*args, **how))
    timed = module._timed
    during = []

    @contextmanager
    def noted(seconds, name):
        before = len(writings)
        with timed(seconds, name):
            yield
        during.append((name, len(writings) - before))

    monkeypatch.setattr(module, "_timed", noted)
    with SteerHeal(
        trait=DOORS, settings=changed(CHAT_PRESET, {**SMALL, "eval.evals": ("contrast", "classifier")})
    ) as sh:
        module._seconds_of_a_state(sh.bench)
    of_it = [n for name, n in during if name == "classifier"]
    assert writings and of_it and not any(of_it)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_step_that_is_timed_has_as_many_examples_as_one_of_the_run(batch_size, monkeypatch):
    sizes = []
    step = HealState.step
    monkeypatch.setattr(HealState, "step", lambda state, batch: sizes.append(len(batch)) or step(state, batch))
    cfg = changed(CHAT_PRESET, {**SMALL, "gen.batch_size": batch_size, "heal.batch_size": 2, "filter.n_keep": 8})
    with SteerHeal(trait=DOORS, settings=cfg) as sh:
        estimate(sh.bench)
    assert sizes == [2, 2]
