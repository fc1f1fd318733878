"""Every diagnostic runs on the tiny random model, prints its table and SHOULD lines, and leaves its JSON."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from types import ModuleType

import pytest
import tyro

from steer_heal.events import append_result, read_results
from steer_heal.files import ROOT
from steer_heal.lab import LabCfg, cli, replay
from steer_heal.records import UserError

QUESTIONS = sorted(path.stem.removeprefix("diag_") for path in (ROOT / "scripts").glob("diag_*.py"))
SMALL = {
    "csweep": ["--doses", "0", "1"], "axis": [], "stages": [], "barrier": ["--lams", "0", "1", "--kappa", "1"], "seeds": ["--seeds", "1", "2"],
    "doses": ["--kappas", "0.5", "1", "--n", "6"], "kl_agg": ["--n", "4", "--length", "2", "--epochs", "1"],
    "bet": ["--seeds", "1", "--choose-seed", "2", "--lams", "0.5", "--barriers", "kl_rev-rmse"],
}


def load_script(name: str) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_question_has_a_test():
    assert set(QUESTIONS) == SMALL.keys() | {"heal_sweep"}


@pytest.mark.parametrize("question", SMALL)
def test_a_diagnostic_answers_on_the_tiny_model(question, tmp_path, capsys):
    arguments = ["--preset", "fast-dev", "--out", str(tmp_path), *SMALL[question]]
    tyro.cli(load_script(f"diag_{question}").main, args=arguments)
    printed = capsys.readouterr().out
    assert printed.count("\n|") >= 3 and "\nSHOULD " in printed
    written = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert written["rows"] and written["should"] and written["question"] in printed


def test_heal_sweep_heals_a_finished_run_again_on_its_own_history(tmp_path, capsys):
    command = [sys.executable, "-m", "steer_heal.run", "fast-dev", "--out", str(tmp_path), "--quiet", "--no-control", "--filter.n-keep", "8"]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT, env={**os.environ, "BEARTYPE": "0"})
    run = next(p for p in tmp_path.iterdir() if p.is_dir())
    tyro.cli(load_script("diag_heal_sweep").main, args=[str(run), "--round", "1", "--lams", "0.5", "--divergences", "kl_rev", "--out", str(tmp_path / "diag")])
    rows = json.loads((tmp_path / "diag" / "heal_sweep.json").read_text())["rows"]
    assert [row["state"] for row in rows][0] == "before"
    assert {row["state"] for row in rows[1:]} == {"nll lam 0 to prev", "kl_rev lam 0.5 to prev", "kl_rev lam 0.5 to base"}
    again = replay(run, 1)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    healed = next(e for e in events if e["stage"] == "healed" and e["round"] == 0)["metrics"]
    assert again.lab.read().metrics["auth_nats"] == pytest.approx(healed["auth_nats"], abs=1e-4)
    result, steps = again.lab.healed(again.kept, again.lab.cfg.heal, 1)  # the same texts in the same order: the run's own heal
    assert [step.sft for step in steps] == pytest.approx([e["sft"] for e in events if e["stage"] == "heal_step" and e["round"] == 1], abs=1e-5)
    assert result.metrics["auth_nats"] == pytest.approx(next(e for e in events if e["stage"] == "healed" and e["round"] == 1)["metrics"]["auth_nats"], abs=1e-4)
    with pytest.raises(UserError, match=r"no text of round 9: its rounds are \[0, 1\]"):
        replay(run, 9)
    shutil.rmtree(run)


def test_a_preset_takes_what_the_lab_is_given():
    cfg = LabCfg(preset="toy", trait="love", seed=7, n_threads=1).run_config()
    assert (cfg.trait, cfg.seed, cfg.n_threads, cfg.model) == ("love", 7, 1, "data/toylm")


@pytest.mark.parametrize("script", ["loops", "table", "diag_seeds", "diag_heal_sweep"])
@pytest.mark.parametrize("content", [None, "", "[]\n{}\n", '{"stage": "run_start", "round": null}\n{"stage": "round", "round": 0}\n'])
def test_a_folder_that_is_no_run_is_one_line(script, content, tmp_path, monkeypatch, capsys):
    if content is not None:
        (tmp_path / "events.jsonl").write_text(content)
    monkeypatch.setattr(sys, "argv", [script, str(tmp_path)])
    assert cli(load_script(script).main) == 1
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {tmp_path}") and printed.count("\n") == 1


@pytest.mark.parametrize("content", ["[]", "{", '{"a": 1}', '{"a": {"arm": "b"}}'])
def test_earlier_loops_that_are_none_are_refused(content, tmp_path, monkeypatch, capsys):
    (tmp_path / "loops.json").write_text(content)
    monkeypatch.setattr(sys, "argv", ["loops", "--data", str(tmp_path / "loops.json")])
    assert cli(load_script("loops").main) == 1 and "was not written by this script" in capsys.readouterr().err
    assert (tmp_path / "loops.json").read_text() == content


def test_results_puts_seeds_of_an_arm_together(tmp_path, capsys):
    for arm, seed, shift in (("a", 1, -1.0), ("a", 2, -2.0), ("a", 2, -3.0), ("b", 1, None)):
        append_result(tmp_path, {"arm": arm, "trait": "t", "n_rounds": 4, "settings": "aa", "seed": seed, "shift": shift, "run": f"{arm}{seed}{shift}"})
    rows = load_script("results").arms(read_results(tmp_path / "results.tsv"), ("shift",))
    assert rows[0] == {"arm": "a", "trait": "t", "rounds": "4", "settings": "aa", "n": "2", "shift": "-2.000 ± 1.414"}, "the last run of a seed counts"
    append_result(tmp_path, {"arm": "a", "trait": "t", "n_rounds": 4, "settings": "bb", "seed": 3, "shift": -9.0, "run": "other"})
    again = load_script("results").arms(read_results(tmp_path / "results.tsv"), ("shift",))
    assert [row["n"] for row in again if row["arm"] == "a"] == ["2", "1"], "other settings are another row"
    assert rows[1]["shift"] == "" and rows[1]["n"] == "1"
    assert load_script("results").main(tmp_path / "nowhere") == 1
    assert "finish a run first" in capsys.readouterr().err
