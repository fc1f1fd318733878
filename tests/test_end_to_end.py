"""The commands as a person runs them, with runtime shape checks on, and what they leave."""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from peft import PeftModel
from places import ROOT
from runs import SETTINGS, of, recorded, started

from steer_heal.__main__ import main
from steer_heal.model.lm import load
from steer_heal.runs.results import read_results
from steer_heal.verdict import UNTRAINED

N_VIGNETTES = "12"


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(run folder, what was printed) of a fast-dev run in a process of its own, where no type or shape is wrong."""
    out = tmp_path_factory.mktemp("out with space")
    command = [sys.executable, "-m", "steer_heal", "run", "fast-dev", "--out", str(out)]
    command += ["--eval.n-vignettes", N_VIGNETTES]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "BEARTYPE": "1"}, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    folder = next(path.parent for path in out.glob("*/events.jsonl"))
    assert "could not draw" not in (folder / "run.log").read_text(encoding="utf-8")
    return folder, done.stdout


@pytest.fixture(scope="module")
def events(done):
    return recorded(done[0])


def test_every_step_wrote_its_event(events):
    kinds = Counter(e.get("state", e["event"]) for e in events)
    once = dict.fromkeys(("run_start", "base", "prompted", "control", "run_end"), 1)
    each_round = dict.fromkeys(("extracted", "steered", "healed", "round_done"), 2)
    n_steps = sum(e["n_steps"] for e in of(events, "trained"))
    assert kinds == once | each_round | {"gathered": 3, "trained": 3, "heal_step": n_steps}
    assert all({"schema", "event", "round", "t", "wall_s", "prev"} <= e.keys() for e in events)


def test_every_state_has_every_metric_and_all_but_the_base_intervals(events):
    names = {metric["name"] for metric in events[0]["metrics"]}
    assert of(events, "measured", "base")[0]["metrics"].keys() == names
    ends = {f"{name}_{side}" for name in names for side in ("lo", "hi")}
    for state in ("prompted", "control", "steered", "healed"):
        assert all(event["metrics"].keys() == names | ends for event in of(events, "measured", state)), state


def test_every_completion_is_recorded_with_its_dose_its_scores_and_why_it_was_dropped(events):
    gates = events[0]["gates"]
    for found in (event["collected"] for event in of(events, "gathered")):
        assert found["train"] and len({*found["train"]}) == len(found["train"])
        for i, row in enumerate(found["scored"]):
            text = row["completion"]
            assert {"alpha", "text", "completion_ids", "prompt"} < text.keys() and row["scores"].keys() == gates.keys()
            assert {*row["reasons"]} <= {*row["failed"]}
            assert i not in found["train"] or not row["reasons"] and text["dose"] <= found["kappa"] * 1.0001


def test_prompts_of_training_validation_and_evaluation_are_apart(events):
    rounds = of(events, "trained")[1:], of(events, "gathered")[1:], of(events, "measured", "healed")
    for heal, gathered, healed in zip(*rounds, strict=True):
        written = [row["completion"] for row in gathered["collected"]["scored"]]
        trained = {written[i]["prompt_index"] for i in gathered["collected"]["train"]}
        assert {*heal["validation_prompts"]} < trained
        assert not {text["prompt"] for text in written} & {text["prompt"] for text in healed["texts"]}


def test_checkpoint_export_and_eval_command_hold_the_student_that_was_measured(done, events, capsys, monkeypatch):
    folder, _ = done
    prompt = torch.tensor([load("tiny-random").chat("What do you do?")])
    adapted = PeftModel.from_pretrained(load("tiny-random").model, folder / "ckpt" / "r1")
    assert main(["export", str(folder), str(folder.parent / "merged")]) == 0
    capsys.readouterr()
    merged = load(str(folder.parent / "merged")).model
    with torch.no_grad():
        assert torch.allclose(adapted(prompt).logits, merged(prompt).logits, atol=1e-3)
    cards = [folder / "ckpt" / name for name in ("control", "r0", "r1")] + [folder.parent / "merged"]
    assert all("last event" in (path / "README.md").read_text() for path in cards)
    flags = {
        "--model": "tiny-random",
        "--adapter": f"{folder}/ckpt/r1",
        "--prompts": "data/toylm/prompts/authority.jsonl",
        "--eval.vignettes": "data/toylm/vignettes.jsonl",
        "--eval.n-vignettes": N_VIGNETTES,
        "--eval.instrument": "data/toylm/instrument.toml",
        "--eval.pairs": "data/toylm/pairs",
        "--eval.think-tokens": "4",
        "--eval.n-prompts": "4",
        "--eval.n-texts": "8",
        "--eval.max-new-tokens": "24",
        "--eval.n-bootstrap": "200",
    }
    monkeypatch.chdir(ROOT)
    evals_ = ["--eval.evals", "moral_foundations", "text_quality", "drift", "persona", "contrast", "toylm"]
    assert main(["eval", *(word for pair in flags.items() for word in pair), *evals_, "--json"]) == 0
    alone, then = json.loads(capsys.readouterr().out), of(events, "measured", "healed")[-1]["metrics"]
    assert alone.keys() == then.keys()
    for name in ("authority_nats", "authority_nats_lo", "coherence", "kl_base", "text_tail_ppl_median"):
        assert alone[name] == pytest.approx(then[name], rel=1e-3, abs=1e-4), name


def test_the_table_the_row_of_results_and_the_verdict_say_the_same(done, events):
    folder, printed = done
    for state in ("base", "prompted", "control", "steered round 1", "healed round 2"):
        assert f"{state} " in printed
    (row,) = read_results(folder.parent / "results.tsv")
    verdict = events[-1]["verdict"]
    assert (row["run"], row["verdict"]) == (folder.name, verdict.split("\n")[0])
    assert verdict == UNTRAINED and UNTRAINED in printed, "an untrained model is not judged"
    assert float(row["authority_nats"]) == of(events, "measured", "healed")[-1]["metrics"]["authority_nats"]
    assert {"report.html", "diary.md", "trajectory.png"} < {path.name for path in folder.iterdir()}


def test_every_other_way_through_a_round_runs(tmp_path, quick):
    """Calibrated dose, ablating vector, one alpha, spectral penalty, barrier to base, one gate."""
    flags = (
        "--dose.mode iso_kl --gen.alphas 1 --dose.kl-tokens 8 --steer.method directional_ablation "
        "--steer.normalize --heal.spectral 0.1 --heal.reference base --heal.aggregate p95 "
        "--heal.divergence kl_fwd --filter.gates short --trait love/inner --no-control"
    )
    events = recorded(started(tmp_path, SETTINGS.split(), *flags.split(), "--eval.n-vignettes", "3"))
    for found, gathered in zip(of(events, "calibrated"), of(events, "gathered"), strict=True):
        dose, collected = found["calibration"]["dose"], gathered["collected"]
        assert gathered["mode"] == "iso_kl" and collected["kappa"] == pytest.approx(dose)
        assert all(row["completion"]["dose"] == pytest.approx(dose) for row in collected["scored"])
    assert [e["tau"] for e in of(events, "trained")] == [0.5, 0.5]
