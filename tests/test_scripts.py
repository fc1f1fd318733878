"""Every diagnostic runs on the tiny random model, prints its table and SHOULD lines, and leaves its JSON."""

import importlib.util
import json
import os
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import tyro
from scipy import stats

from steer_heal.events import append_result, read_results
from steer_heal.files import ROOT
from steer_heal.lab import LabCfg, cli, replay
from steer_heal.records import UserError

QUESTIONS = sorted(path.stem.removeprefix("diag_") for path in (ROOT / "scripts").glob("diag_*.py"))
SMALL = {
    "csweep": ["--doses", "0", "1"],
    "axis": [],
    "stages": [],
    "barrier": ["--lams", "0", "1", "--kappa", "1"],
    "seeds": ["--seeds", "1", "2"],
    "doses": ["--kappas", "0.5", "1", "--n", "6"],
    "kl_agg": ["--n", "4", "--length", "2", "--epochs", "1"],
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
    assert set(QUESTIONS) == SMALL.keys() | {"heal_sweep", "prompting"}


@pytest.mark.parametrize("question", SMALL)
def test_a_diagnostic_answers_on_the_tiny_model(question, tmp_path, capsys):
    arguments = ["--preset", "fast-dev", "--out", str(tmp_path), *SMALL[question]]
    tyro.cli(load_script(f"diag_{question}").main, args=arguments)
    printed = capsys.readouterr().out
    assert printed.count("\n|") >= 3 and "\nSHOULD " in printed
    written = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert written["rows"] and written["should"] and written["question"] in printed


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of two rounds."""
    out = tmp_path_factory.mktemp("out")
    command = [
        sys.executable,
        "-m",
        "steer_heal.run",
        "fast-dev",
        "--out",
        str(out),
        "--quiet",
        "--no-control",
        "--filter.n-keep",
        "8",
        "--eval.no-cache",
    ]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT, env={**os.environ, "BEARTYPE": "0"})
    return next(p for p in out.iterdir() if (p / "events.jsonl").exists())


def test_heal_sweep_heals_a_finished_run_again_on_its_own_history(run, tmp_path):
    tyro.cli(
        load_script("diag_heal_sweep").main,
        args=[str(run), "--round", "1", "--lams", "0.5", "--divergences", "kl_rev", "--out", str(tmp_path / "diag")],
    )
    rows = json.loads((tmp_path / "diag" / "heal_sweep.json").read_text())["rows"]
    assert [row["state"] for row in rows][0] == "before"
    assert {row["state"] for row in rows[1:]} == {
        "nll lam 0 to prev",
        "kl_rev lam 0.5 to prev",
        "kl_rev lam 0.5 to base",
    }
    again = replay(run, 1)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    healed = next(e for e in events if e["stage"] == "healed" and e["round"] == 0)["metrics"]
    assert again.lab.read().metrics["auth_nats"] == pytest.approx(healed["auth_nats"], abs=1e-4)
    result, steps = again.lab.healed(
        again.kept, again.lab.cfg.heal, 1
    )  # the same texts in the same order: the run's own heal
    assert [step.sft for step in steps] == pytest.approx(
        [e["sft"] for e in events if e["stage"] == "heal_step" and e["round"] == 1], abs=1e-5
    )
    assert result.metrics["auth_nats"] == pytest.approx(
        next(e for e in events if e["stage"] == "healed" and e["round"] == 1)["metrics"]["auth_nats"], abs=1e-4
    )
    with pytest.raises(UserError, match=r"no text of round 9: its rounds are \[0, 1\]"):
        replay(run, 9)


def test_prompting_reads_a_finished_run_s_adapters(run, tmp_path, capsys):
    tyro.cli(load_script("diag_prompting").main, args=[str(run), "--doses", "0.5", "1", "--out", str(tmp_path)])
    assert "SHOULD shift_bare be 0" in capsys.readouterr().out
    rows = {row["state"]: row for row in json.loads((tmp_path / "prompting.json").read_text())["rows"]}
    healed = [
        json.loads(line)["metrics"]
        for line in (run / "events.jsonl").read_text().splitlines()
        if '"stage": "healed"' in line
    ]
    base = next(
        json.loads(line)["metrics"]
        for line in (run / "events.jsonl").read_text().splitlines()
        if '"stage": "base"' in line
    )
    assert rows["healed, last round"]["shift_bare"] == pytest.approx(
        healed[-1]["auth_nats"] - base["auth_nats"], abs=1e-4
    )
    assert rows["prompted"]["shift_bare"] == 0 != rows["prompted"]["shift"]
    assert rows["healed, last round, and prompted"]["shift"] != pytest.approx(rows["prompted"]["shift"], abs=1e-6)


def test_the_fault_drill_kills_a_run_and_finds_it_whole(tmp_path):
    command = [
        sys.executable,
        "scripts/fault_drill.py",
        "--n",
        "3",
        "--faults",
        "kill",
        "kill twice",
        "--out",
        str(tmp_path),
    ]
    finished = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "BEARTYPE": "0"}
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    rows = json.loads((tmp_path / "fault_drill.json").read_text())["rows"]
    assert [row["fault"] for row in rows] == ["kill", "kill twice"]
    assert [row["tried"] + row["too late"] for row in rows] == [2, 1]
    assert (
        all(row["survived"] == row["tried"] and row["lost"] == 0 for row in rows) and "| kill twice " in finished.stdout
    )


def test_the_fault_drill_says_what_was_lost(tmp_path, capsys, monkeypatch):
    drill = load_script("fault_drill")

    def lose(_drill, name, share, rng):
        (tmp_path / name).mkdir()
        raise drill.Lost("the adapter differs")

    monkeypatch.setattr(drill, "Drill", lambda folder, draw: SimpleNamespace(folder=tmp_path))
    monkeypatch.setitem(drill.CASES, "kill", lose)
    with pytest.raises(UserError, match="2 runs were lost; they are in"):
        drill.main(n=2, faults=("kill",), out=tmp_path / "diag")
    written = json.loads((tmp_path / "diag" / "fault_drill.json").read_text())
    assert written["rows"][0]["lost"] == 2 and written["why"] == {"kill": ["the adapter differs"] * 2}


def test_the_benchmark_of_a_round_does_the_same_both_ways(tmp_path, capsys):
    tyro.cli(load_script("bench_round").main, args=["--tiny", "--repeats", "1", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "round.json").read_text())
    assert found["n_texts_the_same"] == found["n_texts"] == 8, "what a row writes depends on its own seed"
    assert 0 < found["largest_relative_difference_of_a_factor"] < 1e-3, "both heals train the same adapter"
    assert {(row["mode"], row["stage"]) for row in found["rows"]} == {
        (mode, stage)
        for mode in ("built", "plain")
        for stage in ("vector", "generate", "heal", "bake", "evaluate", "total")
    }
    for name in ("rounds", "batch", "length"):
        assert len(json.loads((tmp_path / f"round_by_{name}.json").read_text())["rows"]) >= 2
    counted = {
        (row["mode"], row["stage"]): row for row in json.loads((tmp_path / "round_account.json").read_text())["rows"]
    }
    assert counted["plain", "heal"]["gflop"] > counted["built", "heal"]["gflop"] > 0
    assert capsys.readouterr().out.count("SHOULD") == 7


def test_the_benchmark_of_the_heal_compares_every_head(tmp_path):
    tyro.cli(load_script("bench_heal").main, args=["--tiny", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "heal.json").read_text())
    peak = {row["head"]: row["peak_mib"] for row in found["rows"]}
    assert peak.keys() == {"whole", "chunks, twice", "as built"} and peak["as built"] < peak["whole"]
    assert found["stored"]["recomputed float32"] < 0.2 * found["stored"]["stored float32"]
    assert len(json.loads((tmp_path / "heal_by_way.json").read_text())["rows"]) == 4


def test_a_preset_takes_what_the_lab_is_given():
    cfg = LabCfg(preset="toy", trait="love", seed=7, n_threads=1).run_config()
    assert (cfg.trait, cfg.seed, cfg.n_threads, cfg.model) == ("love", 7, 1, "data/toylm")


@pytest.mark.parametrize("script", ["loops", "table", "diag_seeds", "diag_heal_sweep"])
@pytest.mark.parametrize(
    "content", [None, "", "[]\n{}\n", '{"stage": "run_start", "round": null}\n{"stage": "round", "round": 0}\n']
)
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
        append_result(
            tmp_path,
            {
                "arm": arm,
                "trait": "t",
                "n_rounds": 4,
                "settings": "aa",
                "seed": seed,
                "shift": shift,
                "run": f"{arm}{seed}{shift}",
            },
        )
    rows = load_script("results").arms(read_results(tmp_path / "results.tsv"), ("shift",))
    assert rows[0] == {
        "arm": "a",
        "trait": "t",
        "rounds": "4",
        "settings": "aa",
        "n": "2",
        "shift": "-2.000 ± 1.414",
    }, "the last run of a seed counts"
    append_result(
        tmp_path, {"arm": "a", "trait": "t", "n_rounds": 4, "settings": "bb", "seed": 3, "shift": -9.0, "run": "other"}
    )
    again = load_script("results").arms(read_results(tmp_path / "results.tsv"), ("shift",))
    assert [row["n"] for row in again if row["arm"] == "a"] == ["2", "1"], "other settings are another row"
    assert rows[1]["shift"] == "" and rows[1]["n"] == "1"
    assert load_script("results").main(tmp_path / "nowhere") == 1
    assert "finish a run first" in capsys.readouterr().err


def test_loops_puts_runs_together_and_extends_its_data(run, tmp_path, capsys):
    loops, data = load_script("loops"), tmp_path / "loops.json"
    loops.main((run,), data, rounds=(0, 1))
    known = json.loads(data.read_text())
    other = {
        **next(iter(known.values())),
        "seed": 7,
        "rounds": [{**row, "shift": 1.0} for row in next(iter(known.values()))["rounds"]],
    }
    data.write_text(json.dumps(known | {"other": other}))
    capsys.readouterr()
    loops.main((), data, rounds=(1,))
    cells = [cell.strip() for cell in capsys.readouterr().out.splitlines()[-1].split("|")]
    shifts = [next(iter(known.values()))["rounds"][1]["shift"], 1.0]
    assert (
        cells[2:4] == ["1", "2"]
        and cells[4].startswith(f"{sum(shifts) / 2:.3f}")
        and cells[5] == loops.interval(shifts)
    )


@pytest.mark.parametrize("n", range(2, 11))
def test_an_interval_is_student_s(n):
    values = [float(i * i) for i in range(n)]
    low, high = map(float, load_script("loops").interval(values).split(" to "))
    expected = stats.t.interval(0.95, n - 1, loc=sum(values) / n, scale=stats.sem(values))
    assert (low, high) == pytest.approx(expected, rel=2e-3)


def test_the_gpu_benchmark_runs_on_its_tiny_shape(tmp_path, capsys):
    bench = load_script("bench_gpu")
    bench.main(tiny=True, device="cpu", out=tmp_path)
    assert capsys.readouterr().out.count("SHOULD") == 5
    table = {path.stem: json.loads(path.read_text())["rows"] for path in tmp_path.iterdir()}
    assert [(row["decode"], row["batch"]) for row in table["decode"]] == [
        ("model.generate", 1),
        ("growing", 1),
        ("fixed", 1),
        ("growing", 2),
        ("fixed", 2),
    ]
    assert all(row["tokens_per_s"] > 0 and row["limit_per_s"] > 0 for row in table["decode"])
    assert table["heal"][0]["tokens_per_s"] > 0 and table["heal"][0]["matmul_share"] > 0
    stages = {row["stage"]: row for row in table["round"]}
    assert {"vector", "write", "filter", "evaluate steered", "heal", "evaluate healed", "round"} <= stages.keys()
    assert stages["write"]["note"].startswith("6 of 8 tokens") and "4 completions" in stages["heal"]["note"]
    assert not any("cut short" in row["note"] for row in table["round"])


def test_the_gpu_benchmark_ends_when_its_time_is_up(tmp_path):
    load_script("bench_gpu").main(tiny=True, budget_s=0.0, device="cpu", out=tmp_path)
    rows = json.loads((tmp_path / "round.json").read_text())["rows"]
    assert all("cut short" in row["note"] for row in rows if row["stage"] != "round")


def test_the_gpu_benchmark_has_gemma_s_shape():
    bench = load_script("bench_gpu")
    config = bench.Gemma3TextConfig(**bench.Size().config, sliding_window_pattern=6)
    with bench.torch.device("meta"):
        model = bench.AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(3.88e9, rel=0.01)
    assert config.layer_types.count("full_attention") == 5


def test_the_generation_benchmark_runs(tmp_path, capsys, monkeypatch):
    bench = load_script("bench_generation")
    monkeypatch.setattr(bench, "decoding", lambda lm, rows, n: [{"way": "growing", "ms": 1.0}])
    bench.main(n=1, out=tmp_path)
    table = {path.stem: json.loads(path.read_text())["rows"] for path in tmp_path.iterdir()}
    assert (
        table.keys() == {"sampling", "decoding", "reading", "prefixes"} and capsys.readouterr().out.count("SHOULD") == 5
    )
    assert all(0 < row["saved_by_all"] < row["saved_by_frames"] < 0.5 for row in table["prefixes"])
    assert not bench.certain("one two three " * 5, 0.5) and bench.certain("one two three " * 9, 0.5)
    words = " ".join(f"word{i}" for i in range(40))
    assert not bench.certain(words, 0.5)
