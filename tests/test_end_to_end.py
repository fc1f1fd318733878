"""The fast-dev command as a person runs it, with runtime shape checks on, and the files it leaves."""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from peft import PeftModel

from steer_heal.events import of_stage, read_events
from steer_heal.files import ROOT
from steer_heal.lm import load
from steer_heal.plot import plot
from steer_heal.provenance import LINKS, check

CONTRACT = {
    "auth_nats",
    "care_nats",
    "coherence",
    "prefill_nll",
    "frac_unscorable",
    "top1_acc",
    "text_ppl_median",
    "degenerate_frac",
}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("out with space")
    command = [sys.executable, "-m", "steer_heal.run", "fast-dev", "--out", str(out), "--export", str(out / "merged")]
    finished = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "BEARTYPE": "1"}, cwd=ROOT)
    assert finished.returncode == 0, finished.stderr
    return next(p for p in out.iterdir() if (p / "events.jsonl").exists()), finished


def test_every_stage_wrote_its_event(done):
    events = read_events(done[0])
    stages = Counter(e["stage"] for e in events)
    once = {"run_start": 1, "base": 1, "prompted": 1, "control_gen": 1, "control": 1, "run_end": 1}
    each_round = dict.fromkeys(("vector", "dose", "gen", "steered", "heal", "adapter_gen", "healed", "round"), 2)
    assert {k: v for k, v in stages.items() if k != "heal_step"} == once | each_round
    assert stages["heal_step"] == sum(e["n_steps"] for e in of_stage(events, "heal"))
    assert all({"schema", "stage", "round", "t", "wall_s"} <= e.keys() for e in events)


def test_measured_states_carry_the_contract_s_metrics_with_intervals(done):
    events = read_events(done[0])
    for stage in ("base", "prompted", "steered", "healed"):
        for event in of_stage(events, stage):
            assert CONTRACT <= event["metrics"].keys()
            if stage != "base":
                assert {f"{name}_{side}" for name in CONTRACT for side in ("lo", "hi")} <= event["metrics"].keys()


def test_every_completion_is_logged_with_its_dose_scores_and_reasons(done):
    for event in of_stage(read_events(done[0]), "gen"):
        kappa = of_stage(read_events(done[0]), "dose")[event["round"]]["kappa"]
        for row in event["completions"]:
            assert {"dose", "alpha", "scores", "keep", "reasons", "text", "completion_ids", "prompt"} <= row.keys()
            assert row["keep"] == (not row["reasons"])
            assert not row["train"] or row["keep"] and row["dose"] <= kappa * 1.0001
        assert sum(row["train"] for row in event["completions"]) == event["n_train"]


def test_prompts_of_training_validation_and_evaluation_are_apart(done):
    events = read_events(done[0])
    for heal, gen, healed in zip(of_stage(events, "heal"), of_stage(events, "gen"), of_stage(events, "adapter_gen")):
        trained = {row["prompt_index"] for row in gen["completions"] if row["train"]}
        assert set(heal["validation_prompts"]) < trained
        assert not {row["prompt"] for row in gen["completions"]} & {row["prompt"] for row in healed["texts"]}


def test_the_last_checkpoint_is_the_student_that_was_measured(done):
    run, _ = done
    prompt = torch.tensor([load("tiny-random").chat("What do you do?")])
    adapted = PeftModel.from_pretrained(load("tiny-random").model, run / "ckpt" / "r1")
    merged = load(str(run.parent / "merged")).model
    with torch.no_grad():
        assert torch.allclose(adapted(prompt).logits, merged(prompt).logits, atol=1e-3)
    finished = subprocess.run(
        [
            sys.executable,
            "-m",
            "steer_heal.evals",
            "--model",
            "tiny-random",
            "--adapter",
            str(run / "ckpt" / "r1"),
            "--json",
            "--prompts",
            "data/toylm/prompts/authority.jsonl",
            "--eval.vignettes",
            "data/toylm/vignettes.jsonl",
            "--eval.instrument",
            "data/toylm/instrument.toml",
            "--eval.think-tokens",
            "4",
            "--eval.n-prompts",
            "4",
            "--eval.n-texts",
            "8",
            "--eval.max-new-tokens",
            "24",
            "--eval.oracle",
            "toylm",
            "--eval.n-bootstrap",
            "200",
            "--filter.ppl-max",
            "1e9",
            "--filter.rep-max",
            "1",
            "--filter.min-words",
            "0",
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert finished.returncode == 0, finished.stderr
    alone, event = json.loads(finished.stdout), of_stage(read_events(run), "healed")[-1]["metrics"]
    assert alone.keys() == event.keys()
    assert alone["auth_nats"] == pytest.approx(event["auth_nats"], abs=1e-4)


def test_the_picture_is_drawn_again_from_the_events_alone(done, tmp_path):
    (tmp_path / "events.jsonl").write_bytes((done[0] / "events.jsonl").read_bytes())
    assert plot(tmp_path).stat().st_size > 20_000
    assert (done[0] / "trajectory.png").exists()


def test_a_run_that_died_early_still_draws_what_it_has(done, tmp_path):
    lines = (done[0] / "events.jsonl").read_text().splitlines(keepends=True)
    assert plot_of(tmp_path / "nothing", lines[:1]) is None
    assert plot_of(tmp_path / "base", lines[:2]) is not None
    assert plot_of(tmp_path / "torn", [*lines[:8], lines[8][:40]]) is not None


def plot_of(folder, lines):
    folder.mkdir()
    (folder / "events.jsonl").write_text("".join(lines))
    return plot(folder)


def test_the_table_and_results_say_the_same(done):
    run, finished = done
    for state in ("base", "prompted", "control", "steered r0", "healed r1"):
        assert f"| {state} " in finished.stdout
    header, row = (run.parent / "results.tsv").read_text().splitlines()
    assert dict(zip(header.split("\t"), row.split("\t")))["run"] == run.name


def test_every_other_way_through_a_round_runs(tmp_path):
    """iso-KL dose, frozen and ablating vector, highest dose only, spectral penalty, barrier to base, no filter but one gate."""
    flags = (
        "--dose.mode iso_kl --dose.train-on highest --dose.kl-tokens 8 --steer.method directional_ablation --steer.normalize --steer.refresh once "
        "--heal.spectral 0.1 --heal.reference base --heal.aggregate p95 --heal.divergence kl_fwd --heal.tau-power 1 --filter.gates short "
        "--trait love/inner --no-control --quiet"
    )
    command = [sys.executable, "-m", "steer_heal.run", "fast-dev", "--out", str(tmp_path), *flags.split()]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "BEARTYPE": "1"})
    assert finished.returncode == 0, finished.stderr
    events = read_events(next(p.parent for p in tmp_path.glob("*/events.jsonl")))
    calibrations, doses = of_stage(events, "calibration"), of_stage(events, "dose")
    for found, dose, gen in zip(calibrations, doses, of_stage(events, "gen"), strict=True):
        assert dose["mode"] == "iso_kl" and dose["kappa"] == pytest.approx(found["dose"])
        assert [row["dose"] for row in gen["completions"]] == pytest.approx([found["dose"]] * len(gen["completions"]))
    assert [e["cosine_to_first"] for e in of_stage(events, "vector")] == pytest.approx([1.0, 1.0])
    assert [e["tau"] for e in of_stage(events, "heal")] == pytest.approx([0.5, 0.25])


def test_one_seed_gives_one_result(done, tmp_path):
    command = [sys.executable, "-m", "steer_heal.run", "fast-dev", "--out", str(tmp_path), "--quiet"]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT, env={**os.environ, "BEARTYPE": "1"})
    again = next(p.parent for p in tmp_path.glob("*/events.jsonl"))
    pick = lambda run: [
        (e["stage"], e.get("metrics"), e.get("completions"), e.get("sft"), e.get("provenance"))
        for e in read_events(run)
    ]
    assert pick(done[0]) == pick(again)
    assert all(set(LINKS) == set(event["provenance"]) for event in of_stage(read_events(again), "round"))
    assert not any(link.broken for link in check(again))
