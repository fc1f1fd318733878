"""Every script runs on a tiny model, prints its table and SHOULD lines, and leaves its JSON."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace

import bench_generation
import bench_gpu
import bench_heal
import bench_round
import common
import fault_drill
import filter_evidence
import loops
import pytest
import results
import torch
from made_runs import changed as changed_events
from made_runs import run_events, with_config, write_run
from places import ROOT
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from steer_heal.__main__ import main
from steer_heal.check import check
from steer_heal.diag import QUESTIONS, distil, prompting, signal
from steer_heal.diag.lab import Lab, PresetFlags, replay
from steer_heal.errors import UserError
from steer_heal.events import Gathered, Measured, RunStart
from steer_heal.inputs.files import DATA
from steer_heal.loop import Loop, run_round
from steer_heal.presets import FAST_DEV_PRESET, PRESETS
from steer_heal.recipe import Recipe
from steer_heal.runs.results import append_result, read_results
from steer_heal.runs.stored import FolderRun, MemoryRun
from steer_heal.settings import changed

SMALL = {
    "csweep": ["--doses", "0", "1"],
    "axis": [],
    "doses": ["--kappas", "0.5", "1", "--n", "6"],
    "kl_agg": ["--n", "4", "--length", "2", "--epochs", "1"],
    "distil": [
        *[
            "--seeds",
            "1",
            "--n-rounds",
            "2",
            "--kappa",
            "1",
            "0.5",
            "--tuned-steps",
            "2",
            "--scales",
            "-1",
            "0",
            "--heal.lr",
            "2e-3",
            "--arms",
        ],
        *("preference", "contrast of others", "prompt alone", "vector alone", "--filter.n-keep", "8"),
    ],
    "signal": ["--n", "8", "--sizes", "2", "4"],
    "teachable": ["--short"],
    "bet": ["--seeds", "1", "--choose-seed", "2", "--lams", "0.5", "--barriers", "kl_rev-rmse"],
}


HOLDS = {
    "signal": lambda written: written["rows"][3]["agree_4"] > 0.2 > abs(written["rows"][2]["agree_4"]),
    "distil": lambda written: (
        all(row["fit"][-1] < row["fit"][0] for row in written["per_seed"] if "fit" in row)
        and {row["arm"]: row["n_steps"] for row in written["per_seed"] if row["arm"].endswith("chat")}
        == {f"{arm}, then chat": 4 for arm in ("preference", "contrast of others")}
        and all(0.02 < row["kl_base"] < 0.05 for row in written["per_seed"] if row["arm"] == "vector alone")
        and [abs(row["shift"]) < 1e-9 > row["kl_base"] for row in written["per_seed"] if "scale" in row]
        == [False, True, False, True]
    ),
}
"""What else must be so: own tokens agree on nothing, the distribution does; every arm that trains learns what is held
out, is tuned for whole epochs, and is the base where its adapter is scaled by 0."""


def table(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


# --- questions ---------------------------------------------------------------------------------------------------
def test_settings_that_an_arm_of_distil_cannot_have_are_refused_before_any_other_is_run(tmp_path, capsys):
    flags = ["--heal.contrast-kl", "0.05", "--out", str(tmp_path), "--arms", "contrast", "prompt"]
    assert main(["diag", "distil", *flags]) == 2
    told = capsys.readouterr().err
    assert "error: arm 'prompt': heal.contrast_kl is 0.05" in told and "'contrast':" not in told


def test_an_arm_of_distil_is_not_taken_for_one_of_other_settings(tmp_path, capsys):
    flags = {"n_rounds": 1, "kappa": [], "tuned_steps": 0, "scales": []}
    row = {"arm": "contrast", "seed": 1, "asked": {"heal.lr": 0.1, **flags}}
    (tmp_path / "distil-toy-authority.jsonl").write_text(json.dumps(row) + "\n")
    flags = ["--arms", "prompt", "contrast", "--seeds", "1", "--out", str(tmp_path)]
    assert main(["diag", "distil", *flags, "--heal.lr", "0.2", "--n-rounds", "2", "--kl", "0.1"]) == 2
    told = capsys.readouterr().err
    assert "holds arm 'contrast' of seed 1 with other settings: files, heal.lr, n_rounds; give --label" in told
    assert main(["diag", "distil", "--arms", "contrast, signed", "--n-rounds", "2", "--out", str(tmp_path)]) == 2
    assert "n-rounds is 2: it must be 1 with arm 'contrast, signed'" in capsys.readouterr().err


@pytest.mark.parametrize("preset", ["toy", "toy-distil", "smol", "smol-distil", "chat", "qwen", "gemma"])
def test_the_gradients_of_a_text_are_asked_of_every_preset(preset, monkeypatch):
    """Whose own teacher, hold and rehearsal are left out."""
    made = []
    monkeypatch.setattr(Lab, "of", lambda cfg: made.append(cfg))
    for teacher in ("prompt+vector", "contrast"):
        with pytest.raises(AttributeError):
            signal.main(signal.Flags(preset=preset, teacher=teacher), {})
        for text in ("steered", "own"):
            assert changed(made[-1], {"heal.text": text}).heal.teacher == teacher


def test_the_default_arms_are_those_that_the_preset_has_prompts_for(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(distil, "done_with", lambda arms, *_: asked.append(set(arms)) or {(arm, 1) for arm in arms})
    row = {"arm": "control", "seed": 1, "round": 0, "shift": 0.0, "degenerate_frac": 0.0}
    for preset, trait in (("toy", "authority"), ("smol-distil", "love")):
        (tmp_path / f"distil-{preset}-{trait}.jsonl").write_text(json.dumps(row) + "\n")
        assert main(["diag", "distil", "--preset", preset, "--seeds", "1", "--out", str(tmp_path)]) == 0
    toy, smol = asked
    assert smol == set(distil.ARMS) and smol - toy == {name for name in smol if name.endswith("t, rehearsed")} | {
        "contrast, held, rehearsed"
    }
    assert main(["diag", "distil", "--arms", "contrast, rehearsed", "--out", str(tmp_path)]) == 2


def test_an_arm_or_a_seed_is_named_once_and_a_dose_is_above_0(tmp_path, capsys):
    assert main(["diag", "distil", "--null", "0.1", "--out", str(tmp_path)]) == 2
    assert "--null is 0.1: it is a shift of contrast_nats, and the metric of the" in capsys.readouterr().err
    assert main(["diag", "distil", "--seeds", "1", "1", "--out", str(tmp_path)]) == 2
    assert "seeds holds 1 twice; name it once" in capsys.readouterr().err
    assert main(["diag", "doses", "--preset", "fast-dev", "--kappas", "0", "--out", str(tmp_path)]) == 2
    assert "dose.kappa is 0.0: it must be > 0" in capsys.readouterr().err


def test_every_question_has_a_test():
    assert SMALL.keys() | {"heal_sweep", "prompting"} == QUESTIONS.keys()


@pytest.mark.parametrize("question", SMALL)
def test_a_diagnostic_answers_on_the_tiny_model(question, tmp_path, capsys, monkeypatch):
    told, cfg = PRESETS["fast-dev"]
    few = replace(cfg.eval, n_vignettes=6, think_tokens=1, n_texts=4, max_new_tokens=12, n_bootstrap=20)
    monkeypatch.setitem(PRESETS, "fast-dev", (told, replace(cfg, eval=few)))
    monkeypatch.setattr("steer_heal.report.console.A_MINUTE", 0.0)
    arguments = ["--preset", "fast-dev", "--out", str(tmp_path), *SMALL[question]]
    assert main(["diag", question, *arguments]) == 0
    printed, told = capsys.readouterr()
    assert re.search(r"diag: (measuring|writing|reading|healing)", told) or question == "signal"
    assert "─" in printed and "\nSHOULD " in printed
    written = table(tmp_path, question)
    assert written["rows"] and written["should"] and written["question"] in printed
    assert HOLDS.get(question, bool)(written)
    if question == "distil":
        (path,) = tmp_path.glob("*-answers.jsonl")
        kept = [json.loads(line) for line in path.read_text().splitlines()]
        assert [(row["arm"], row["round"]) for row in kept] == [(r["arm"], r["round"]) for r in written["per_seed"]]
        assert all(len(row["answers"]) == 4 for row in kept) and "answers" not in written["per_seed"][0]
        assert len({answer["base"] for row in kept for answer in row["answers"][:1]}) == 1
        prompted = next(row for row in kept if row["arm"] == "prompt alone")["answers"]
        assert any(answer["answer"] != answer["base"] for answer in prompted)


def test_heal_sweep_heals_a_finished_run_again_on_its_own_history(two, tmp_path, capsys):
    flags = ["--round", "2", "--lams", "0.5", "--divergences", "kl_rev", "--out", str(tmp_path)]
    assert main(["diag", "heal_sweep", str(two), *flags]) == 0
    rows = table(tmp_path, "heal_sweep")["rows"]
    assert [row["state"] for row in rows][0] == "before"
    arms = {"none lam 0 to prev", "kl_rev lam 0.5 to prev", "kl_rev lam 0.5 to base"}
    assert {row["state"] for row in rows[1:]} == arms
    assert main(["diag", "heal_sweep", str(two), "--divergences", "kl_rev", "kl_rew"]) == 2
    assert "divergences holds 'kl_rew': did you mean 'kl_rev'?" in capsys.readouterr().err


def test_what_needs_no_model_is_refused_before_torch_is_imported(tmp_path):
    write_run(tmp_path / "begun", run_events(1)[:1])
    write_run(tmp_path / "run", run_events(1))
    write_run(tmp_path / "large", with_config(run_events(1), model="large"))
    commands = {
        "diag prompting run large": "runs hold more than one model: run has data/toylm, large has large",
        "diag prompting": "no run was given",
        "diag prompting nowhere": "has no events.jsonl",
        "diag prompting begun": "the run has no healed round",
        "diag prompting run ./run": "a run is given twice",
        "diag heal_sweep nowhere": "has no events.jsonl",
        "diag heal_sweep run --round 9": "has no text of round 9: it has that of round 1",
        "diag teachable --preset toyy": "preset is 'toyy': did you mean 'toy'?",
        "diag signal --preset toyy": "preset is 'toyy': did you mean 'toy'?",
        "diag heal_sweep": "give RUN",
    }
    code = """
import sys
from steer_heal.__main__ import main
for command in sys.argv[1:]:
    assert main(command.split()) == 2, command
    assert "torch" not in sys.modules, command
"""
    argv = [sys.executable, "-c", code, *commands]
    env = os.environ | {"BEARTYPE": "0"}
    done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "", done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == len(commands), done.stderr
    assert all(words in line for words, line in zip(commands.values(), told, strict=True)), told
    assert not (tmp_path / "out").exists()


def test_a_replayed_round_is_the_round_of_the_run(two):
    lab, collected = replay(two, 1, {})
    run = FolderRun.read(two)
    before, after = (run.measured("healed", r).metrics["authority_nats"] for r in (0, 1))
    assert lab.measure().metrics["authority_nats"] == pytest.approx(before, abs=1e-4)
    result, report = lab.healed(collected, lab.bench.cfg.heal, 1)
    recorded = [event.step.fit for event in run.steps if event.round == 1]
    assert [step.fit for step in report.steps] == pytest.approx(recorded, abs=1e-5)
    assert result.metrics["authority_nats"] == pytest.approx(after, abs=1e-4)
    with pytest.raises(UserError, match="it has that of round 1, round 2"):
        replay(two, 9, {})


def test_prompting_measures_the_adapters_of_a_finished_run(two, tmp_path):
    assert main(["diag", "prompting", str(two), "--doses", "0.5", "1", "--out", str(tmp_path)]) == 0
    rows = {row["state"]: row for row in table(tmp_path, "prompting")["rows"]}
    run = FolderRun.read(two)
    base, last = (run.measured(*state)["authority_nats"] for state in (("base",), ("healed", 1)))
    assert rows["healed, last round"]["shift_bare"] == pytest.approx(last - base, abs=1e-4)
    assert rows["prompted"]["shift_bare"] == 0 != rows["prompted"]["shift"]
    assert rows["healed, last round, and prompted"]["shift"] != pytest.approx(rows["prompted"]["shift"], abs=1e-6)
    assert {row["intact"] for row in rows.values()} <= {"0 of 1", "1 of 1"} and rows["base"]["intact"] == "0 of 1"


def test_prompting_averages_runs_of_one_trait_alone(tmp_path, capsys):
    other = changed_events(run_events(1), RunStart, trait=replace(run_events(1)[0].trait, name="love"))
    folders = [str(write_run(tmp_path / "one", run_events(1))), str(write_run(tmp_path / "other", other))]
    assert main(["diag", "prompting", *folders, "--out", str(tmp_path / "out")]) == 2
    assert "runs hold more than one trait: " in capsys.readouterr().err


def test_furthest_is_of_the_intact_rows_or_of_all_if_nothing_is_known_of_them(monkeypatch):
    monkeypatch.setattr(Lab, "is_healthy", lambda lab, row: row["healthy"])
    lab = Lab.__new__(Lab)
    lab.bench = SimpleNamespace(trait=SimpleNamespace(sign=-1))
    rows = [{"shift": shift, "healthy": healthy} for shift, healthy in ((-1, True), (-3, False), (-2, True))]
    assert prompting.furthest(lab, rows)["shift"] == -2
    assert prompting.furthest(lab, [row | {"healthy": None} for row in rows])["shift"] == -3
    assert prompting.furthest(lab, [row | {"healthy": False} for row in rows])["shift"] == -1


def test_the_files_of_an_arm_are_among_its_settings(tmp_path):
    def digest(arm: str, **changes: object) -> str:
        cfg = changed(PRESETS["toy-distil"][1], {name.replace("__", "."): value for name, value in changes.items()})
        _, inputs = distil.with_settings(arm, cfg, distil.Flags(preset="toy-distil"), {})
        return distil.asked_for(arm, distil.Flags(preset="toy-distil"), {}, inputs)["files"]

    attacks = tmp_path / "attacks.toml"
    attacks.write_text((DATA / "attacks/train.toml").read_text(encoding="utf-8") + "\n# another\n", encoding="utf-8")
    assert digest("contrast") == digest("contrast", heal__hold_attacks=attacks)
    assert digest("contrast, held") != digest("contrast, held", heal__hold_attacks=attacks)
    assert digest("contrast") != digest("contrast", trait="love")


def test_a_preset_takes_the_settings_that_were_given(capsys):
    cfg = PresetFlags().settings({"trait": "love", "seed": 7, "heal.lr": 1.0})
    assert (cfg.trait, cfg.seed, cfg.heal.lr, cfg.model) == ("love", 7, 1.0, "data/toylm")
    assert main(["diag", "axis", "--preset", "toi"]) == 2
    assert "preset is 'toi': did you mean 'toy'?" in capsys.readouterr().err
    assert main(["diag", "signals"]) == 2
    assert "unknown question 'signals'; did you mean 'signal'?" in capsys.readouterr().err


def test_a_question_needs_no_eval_that_only_a_repeated_round_needs():
    assert check(PresetFlags(preset="toy").settings({"eval.evals": ("contrast",)})).pairs


def test_text_of_a_dose_is_steered_by_the_vector_alone_whatever_the_recipe():
    recipe = {"heal.text": "own", "heal.teacher": "contrast", "heal.contrast": 2.0, "heal.target": "distribution"}
    lab = Lab.of(changed(FAST_DEV_PRESET, {**recipe, "heal.divergence": "none", "heal.hold": 0.5}))
    few = {"gates": (), "n_keep": 4, "max_attempts": 4, "min_train": 2}
    texts = {kappa: lab.collect(kappa, alphas=(1.0,), **few).completions for kappa in (0.5, 5.0)}
    assert {kappa: {text.dose for text in own} for kappa, own in texts.items()} == {0.5: {0.5}, 5.0: {5.0}}
    assert not any(text.attack for own in texts.values() for text in own)
    assert {text.text for text in texts[0.5]} != {text.text for text in texts[5.0]}


def test_measurements_leave_no_trace_in_the_student(two):
    lab, collected = replay(two, 0, {})
    run = FolderRun.read(two)
    unmeasured = Loop(lab.bench, MemoryRun(), measures_teacher=False)
    run_round(unmeasured, Recipe.of(run.start.config), 0)
    assert unmeasured.run.require(Gathered, 0).collected == collected and not unmeasured.run.each(Measured)
    own = lab.bench.student.factors("history")
    run.restore_student(0, lab.bench.student)
    kept = lab.bench.student.factors("history")
    assert own.keys() == kept.keys() and all(torch.equal(own[name], kept[name]) for name in own)


# --- the fault drill ---------------------------------------------------------------------------------------------
def test_the_fault_drill_stops_runs_and_finds_them_whole(tmp_path):
    flags = ["--n", "3", "--faults", "kill twice", "sigterm", "--out", str(tmp_path)]
    command = [sys.executable, "scripts/fault_drill.py", *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "BEARTYPE": "0", "PYTHONPATH": "src"}
    finished = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    rows = table(tmp_path, "fault_drill")["rows"]
    assert [row["fault"] for row in rows] == ["kill twice", "sigterm"]
    assert [row["tried"] + row["too late"] for row in rows] == [1, 1]
    assert all(row["survived"] == row["tried"] and row["lost"] == 0 for row in rows)


def test_the_fault_drill_records_what_was_lost(tmp_path, monkeypatch):
    def start(_drill, name, _share, _rng):
        (tmp_path / name).mkdir()
        return tmp_path / name

    def finish(run):
        raise fault_drill.Lost("the adapter differs")

    drill = SimpleNamespace(folder=tmp_path, finish=finish)
    monkeypatch.setattr(fault_drill, "Drill", lambda folder, dtype: drill)
    monkeypatch.setitem(fault_drill.CASES, "kill", start)
    assert fault_drill.main(n=2, faults=("kill",), out=tmp_path / "diag") == 1
    written = table(tmp_path / "diag", "fault_drill")
    assert written["rows"][0]["lost"] == 2 and written["why"] == {"kill": ["the adapter differs"] * 2}
    assert (tmp_path / "diag" / "lost" / "kill_0").is_dir()


# --- benchmarks --------------------------------------------------------------------------------------------------
@pytest.fixture(autouse=True)
def log(tmp_path, monkeypatch):
    """The file that benchmarks append to, in place of the published one."""
    monkeypatch.setattr(common, "BENCHMARKS", tmp_path / "benchmarks.jsonl")
    return tmp_path / "benchmarks.jsonl"


def test_a_benchmark_is_recorded_with_its_machine_and_commit(log, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scripts/bench_heal.py", "--tiny"])
    common.show("How fast?", [{"s": 1.0}], [], tmp_path, "heal")
    assert not log.exists()
    monkeypatch.setattr(sys, "argv", ["scripts/bench_heal.py"])
    for seconds in (1.0, float("nan")):
        common.show("How fast?", [{"s": seconds}], [], tmp_path, "heal", n_threads=2)
    first, second = map(json.loads, log.read_text().splitlines())
    assert first["rows"] == [{"s": 1.0}] and second["rows"] == [{"s": "NaN"}]
    assert first["benchmark"] == "heal" and first["n_threads"] == 2 and first["torch"] == torch.__version__
    assert first["cpu"] and first["threads"] and first["date"] and first["command"] == ["scripts/bench_heal.py"]
    head = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True).stdout.strip()
    assert (first["commit"] or "").removesuffix("-dirty") == commit


def test_the_benchmark_of_a_round_does_the_same_both_ways(tmp_path):
    bench_round.main(repeats=1, out=tmp_path, tiny=True)
    found = table(tmp_path, "round")
    assert found["n_texts_the_same"] == found["n_texts"] == 8, "what a row writes depends on its own seed"
    assert 0 < found["largest_relative_difference_of_a_factor"] < 1e-3, "both heals train the same adapter"
    rows = {(row["mode"], row["stage"]): row for row in found["rows"]}
    stages = ("vector", "text", "heal", "evaluate", "total")
    assert rows.keys() == {(mode, stage) for mode in ("built", "plain") for stage in stages}
    assert rows["plain", "heal"]["gflop"] > rows["built", "heal"]["gflop"] > 0
    assert [row["rounds"] for row in table(tmp_path, "round_by_rounds")["rows"]] == [0, 1, 2]


def test_the_benchmark_of_a_whole_run_times_every_stage_in_each_dtype(tmp_path):
    bench_round.main(model="tiny-random", out=tmp_path, tiny=True)
    rows = table(tmp_path, "run")["rows"]
    stages = ["vector", "a completion", "heal", "an evaluation", "run"]
    for dtype in ("float32", "bfloat16"):
        mine = {row["stage"]: row for row in rows if row["dtype"] == dtype}
        assert list(mine) == stages and mine.keys() == bench_round.EARLIER[dtype].keys()
        assert mine["run"]["seconds"] > 4 * mine["an evaluation"]["seconds"] + mine["heal"]["seconds"]
        assert all(row["ratio"] * row["cpu_s"] == pytest.approx(row["earlier_s"]) for row in mine.values())


def flop_of(work) -> int:
    with bench_round.Products() as counted:
        work()
    return counted.flop


def test_products_are_counted_forward_and_backward():
    x, w = torch.randn(3, 2, 10, requires_grad=True), torch.randn(4, 10, requires_grad=True)
    slope, bias = torch.ones(3, 2, 4), torch.zeros(4)
    one = 2 * 6 * 10 * 4
    assert flop_of(lambda: torch.nn.functional.linear(x, w).backward(slope)) == 3 * one, "y, gradients of x and w"
    assert flop_of(lambda: torch.nn.functional.linear(x.detach(), w.detach(), bias)) == one
    assert flop_of(lambda: torch.randn(3, 6, 10) @ torch.randn(3, 10, 4)) == 3 * one
    assert flop_of(lambda: torch.randn(100, 50).exp().sum()) == 0


def test_attention_on_the_cpu_is_counted_forward_and_backward():
    q, k, v = (torch.randn(2, 3, 40, 8, requires_grad=True) for _ in range(3))
    attend = lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v)
    one = 2 * 2 * 3 * 40 * 40 * 8
    assert flop_of(attend) == 2 * one, "queries with keys, weights with values"
    assert flop_of(lambda: attend().sum().backward()) == 7 * one


def test_the_benchmark_of_the_heal_compares_both_heads(tmp_path):
    bench_heal.main(out=tmp_path, tiny=True)
    found = table(tmp_path, "heal")
    peak = {row["head"]: row["peak_mib"] for row in found["rows"]}
    assert peak.keys() == {"whole", "as built"} and peak["as built"] < peak["whole"]
    assert found["stored"]["recomputed float32"] < 0.2 * found["stored"]["stored float32"]
    assert len(table(tmp_path, "heal_by_way")["rows"]) == 4


def test_the_peak_of_a_piece_of_work_is_what_lived_at_once():
    def work():
        first = torch.ones(2**20)
        del first
        second = torch.ones(2**19)
        return second + 1

    assert bench_heal.peak_bytes(work) == pytest.approx(2**22, rel=0.01)


def test_the_gpu_benchmark_runs_on_its_tiny_shape(tmp_path):
    bench_gpu.main(tiny=True, device="cpu", out=tmp_path)
    decoded = table(tmp_path, "decode")["rows"]
    ways = [(row["decode"], row["batch"]) for row in decoded]
    assert ways == [("model.generate", 1), ("as built", 1), ("as built", 2)]
    assert all(row["tokens_per_s"] > 0 and row["limit_per_s"] > 0 for row in decoded)
    heal = table(tmp_path, "heal")["rows"][0]
    assert heal["tokens_per_s"] > 0 and heal["matmul_share"] > 0
    stages = {row["stage"]: row for row in table(tmp_path, "round")["rows"]}
    assert {"vector", "write", "filter", "evaluate steered", "heal", "evaluate healed", "round"} <= stages.keys()
    assert stages["write"]["note"].startswith("32 of 24 tokens") and "16 completions" in stages["heal"]["note"]
    assert not any("cut short" in row["note"] for row in stages.values())


def test_the_gpu_benchmark_ends_when_its_time_is_up(tmp_path):
    bench_gpu.main(tiny=True, budget_s=0.0, device="cpu", out=tmp_path)
    rows = table(tmp_path, "round")["rows"]
    assert all("cut short" in row["note"] for row in rows if row["stage"] != "round")


def test_the_gpu_benchmark_has_gemma_s_shape():
    config = Gemma3TextConfig(**bench_gpu.Size().config, sliding_window_pattern=6)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(3.88e9, rel=0.01)
    assert config.layer_types.count("full_attention") == 5


def test_the_generation_benchmark_runs(tmp_path):
    bench_generation.main(n=1, n_answers=2, sizes=(1, 2), out=tmp_path)
    for name, n_ways in (("sampling", 4), ("decoding", 2), ("reading", 2)):
        rows = table(tmp_path, name)["rows"]
        assert len(rows) == n_ways and all(row["ms"] > 0 for row in rows)


def test_vignettes_read_from_the_cache_are_those_of_a_plain_cache_and_whole_sequences(tmp_path):
    bench_generation.main(
        n=1,
        model="tiny-random",
        dtypes=("float32",),
        n_vignettes=2,
        think_tokens=3,
        max_prompt_tokens=2048,
        out=tmp_path,
    )
    rows = table(tmp_path, "vignettes")["rows"]
    assert [row["way"] for row in rows] == ["plain", "as built"] and all(row["differ"] < 1e-4 for row in rows)


# --- tables of finished runs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["loops", "results", "heal_sweep", "prompting"])
@pytest.mark.parametrize(
    "made",
    [
        lambda folder: None,
        lambda folder: (folder / "events.jsonl").write_text("[]\n{}\n"),
        lambda folder: write_run(folder, run_events()[1:]),
    ],
)
def test_a_folder_that_is_no_run_is_one_line(script, made, tmp_path, capsys):
    made(tmp_path)
    if script in QUESTIONS:
        assert main(["diag", script, str(tmp_path)]) == 2
    else:
        assert common.cli(import_module(script).main, [str(tmp_path)]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1


@pytest.mark.parametrize("content", ["[]", "{", '{"a": 1}', '{"a": {"arm": "b"}}'])
def test_earlier_loops_that_are_none_are_refused_and_kept(content, tmp_path):
    data = tmp_path / "loops.json"
    data.write_text(content)
    with pytest.raises(UserError, match=str(data)):
        loops.main(data=data)
    assert data.read_text() == content


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_loops_puts_runs_together_and_extends_its_data(two, tmp_path, capsys):
    data = tmp_path / "loops.json"
    loops.main((two,), data, rounds=(0, 1))
    known = json.loads(data.read_text())
    first = next(iter(known.values()))
    other = {**first, "seed": 7, "rounds": [{**row, "shift": 1.0} for row in first["rounds"]]}
    data.write_text(json.dumps(known | {"other": other}))
    capsys.readouterr()
    loops.main((), data, rounds=(1,))
    head, _, row = map(cells, capsys.readouterr().out.strip().splitlines())
    found, shifts = dict(zip(head, row, strict=True)), [first["rounds"][1]["shift"], 1.0]
    assert (found["round"], found["n"]) == ("1", "2") and found["shift"].startswith(f"{sum(shifts) / 2:.3f} ± ")
    assert found["interval"] == loops.interval(shifts)
    healed = FolderRun.read(two).measured("healed", 1)
    assert found["coherence"].split()[0] == f"{healed['coherence']:.3f}"


def test_an_interval_is_student_s():
    assert loops.interval([0.0, 1.0]) == "-5.853 to 6.853", "0.5 plus and minus 12.706 standard errors of 0.5"
    assert loops.interval([1.0]) == ""


def test_results_puts_seeds_of_an_arm_together(tmp_path):
    def arms():
        rows = results.over_seeds(results.frame(read_results(tmp_path / "results.tsv")))
        return results.spread(rows, ("shift", "oracle"))

    def finish(arm, seed, shift, settings="aa"):
        row = {"arm": arm, "trait": "t", "n_rounds": 4, "settings": settings, "seed": seed, "shift": shift}
        append_result(tmp_path, row | {"run": f"{arm}{seed}{shift}"})

    for arm, seed, shift in (("a", 1, -1.0), ("a", 2, -2.0), ("a", 2, -3.0), ("b", 1, None)):
        finish(arm, seed, shift)
    rows = arms()
    same = {"arm": "a", "trait": "t", "n_rounds": 4, "settings": "aa"}
    assert rows[0] == {**same, "n": 2, "shift": "-2.000 ± 1.414"}, "the last run of a seed counts"
    assert rows[1]["shift"] == "" and rows[1]["n"] == 1
    finish("b", 2, -1.0)
    assert (arms()[1]["n"], arms()[1]["shift"]) == (2, "-1.000 (1)"), "a run without an intact round has no shift"
    finish("a", 3, -9.0, "bb")
    assert [row["n"] for row in arms() if row["arm"] == "a"] == [2, 1], "other settings are another row"
    with pytest.raises(UserError, match="nowhere"):
        results.main(out=tmp_path / "nowhere")


def test_results_shows_the_states_of_runs(two, capsys):
    results.main((two, two), rounds=1)
    lines = capsys.readouterr().out.splitlines()
    states = [cells(line)[1] for line in lines if line.startswith("|")][2:]
    assert states == ["base", "prompted", "steered round 1", "healed round 1"] * 2
    healed = dict(zip(cells(lines[0]), cells(lines[5]), strict=True))
    measured = FolderRun.read(two).measured("healed", 0)
    assert healed["authority_nats"] == f"{measured['authority_nats']:.3f}"


# --- evidence for the filter -------------------------------------------------------------------------------------
def test_the_best_threshold_parts_what_can_be_parted():
    scores, broken = [1.0, 2.0, 3.0, 4.0], [False, False, True, True]
    cut = filter_evidence.best_threshold(scores, broken)
    assert filter_evidence.quality([score > cut for score in scores], broken) == {"precision": 1, "recall": 1, "F1": 1}


def test_the_table_of_gates_is_the_one_in_the_docs(tmp_path, monkeypatch, capsys):
    rows = lambda path: [cells(line) for line in path.read_text().splitlines() if line.startswith("|")]
    documented = rows(ROOT / filter_evidence.EVIDENCE)
    monkeypatch.setattr(filter_evidence, "EVIDENCE", tmp_path / "filter.md")
    filter_evidence.table()
    written = rows(tmp_path / "filter.md")
    assert [row for row in written if "---" not in row[0]] == [row for row in documented if "---" not in row[0]]


def test_a_sample_is_drawn_once_and_must_be_labelled(two, tmp_path, monkeypatch):
    labels = tmp_path / "labels.jsonl"
    monkeypatch.setattr(filter_evidence, "LABELS", labels)
    filter_evidence.sample(preset="fast-dev", per_dose=2, run=two, per_round=4)
    rows = [json.loads(line) for line in labels.read_text().splitlines()]
    assert [row["round"] for row in rows] == [0] * 2 * len(filter_evidence.KAPPAS) + [1] * 4
    of_run = {row.completion.seed for row in FolderRun.read(two).at(Gathered, 1).collected.scored}
    assert {row["seed"] for row in rows if row["round"] == 1} <= of_run
    with pytest.raises(UserError, match=str(labels)):
        filter_evidence.table()
    labels.write_text(json.dumps({**rows[0], "coherent": True}) + "\n")
    with pytest.raises(UserError, match=str(labels)):
        filter_evidence.sample(preset="fast-dev")
