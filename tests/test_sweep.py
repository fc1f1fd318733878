"""A sweep file is checked as a whole; each of its runs is made once, wherever and however often it is started."""

import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pytest
from made_runs import run_events, write_run
from places import ROOT
from rich.console import Console
from runs import assert_same, rewritten, started, undrawn

from steer_heal.__main__ import main
from steer_heal.check import TRIAL
from steer_heal.commands.run import parse
from steer_heal.errors import UserError
from steer_heal.events import Measured, Run
from steer_heal.inputs.files import DATA
from steer_heal.presets import FAST_DEV_PRESET, PRESETS
from steer_heal.runs.log import read_start
from steer_heal.runs.results import append_result, read_results
from steer_heal.runs.signals import Stopped
from steer_heal.runs.storage import lock_run
from steer_heal.settings import RunConfig, leaves
from steer_heal.sweep import cluster, task
from steer_heal.sweep.engine import Local, drive, last_line, log_of
from steer_heal.sweep.plan import as_flags, load
from steer_heal.sweep.progress import Follower, Seen, run_status
from steer_heal.sweep.results import finished_runs, show_results
from steer_heal.sweep.watch import Watch

GRID = """
preset = "fast-dev"
seeds = [41, 42]
[fixed]
heal.lam = 0.3
n-rounds = 1
[grid]
"heal.tau" = [0.1, 0.2]
gen.alphas = [[1.0], [0.5, 1.0]]
"""


@pytest.fixture
def plan(tmp_path):
    return load(file_of(tmp_path))


def file_of(folder, body=GRID) -> Path:
    path = folder / "s.toml"
    path.write_text(f"out = {json.dumps(str(folder / 'out'))}\n{body}")
    return path


# --- the file ----------------------------------------------------------------------------------------------------
def test_a_grid_is_a_product_over_seeds_with_a_folder_for_each_run(plan):
    cfgs = [job.cfg for job in plan.jobs]
    assert [(cfg.seed, cfg.heal.tau, cfg.gen.alphas) for cfg in cfgs] == [
        (seed, tau, alphas) for seed in (41, 42) for tau in (0.1, 0.2) for alphas in ((1.0,), (0.5, 1.0))
    ]
    assert {(cfg.heal.lam, cfg.n_rounds, cfg.steer) for cfg in cfgs} == {(0.3, 1, FAST_DEV_PRESET.steer)}
    names = [job.folder.name for job in plan.jobs]
    assert len({*names}) == 8 and {job.folder.parent for job in plan.jobs} == {plan.out}
    ends = [f"_{job.cfg.fingerprint()}_{job.arm.inputs}_s{job.cfg.seed}" for job in plan.jobs]
    assert all(name.endswith(end) for name, end in zip(names, ends, strict=True))
    assert names[1].startswith("tau=0.1-alphas=0.5-1.0_") and plan.jobs[1].cfg.arm == "tau=0.1 alphas=0.5+1.0"


def test_runs_have_names_and_no_table_is_the_preset_alone(tmp_path):
    body = 'preset = "toy"\nseeds = [1]\n'
    (only,) = load(file_of(tmp_path, body)).jobs
    assert replace(only.cfg, folder=None, arm="", seed=42, chat=True, share_base=False) == PRESETS["toy"][1]
    body += '[[runs]]\nname = "a b"\nheal.divergence = "none"\n[[runs]]\nname = "c"\ntrait = "love"\n'
    a, c = load(file_of(tmp_path, body)).jobs
    assert (a.arm.label, a.cfg.heal.divergence, c.cfg.trait) == ("a b", "none", "love")
    assert (a.arm.sign, c.arm.sign) == (-1, 1) and a.arm.broken_texts == "degenerate_frac"
    assert a.folder.name.startswith("a-b_")


def test_every_run_is_made_at_every_point_of_a_grid(tmp_path):
    body = 'preset = "toy"\nseeds = [1]\n[grid]\ntrait = ["authority", "love"]\n'
    body += '[[runs]]\nname = "a"\n[[runs]]\nname = "b"\nheal.divergence = "none"\n'
    plan = load(file_of(tmp_path, body))
    found = {arm.label: (arm.cfg.trait, arm.cfg.heal.divergence) for arm in plan.arms}
    assert found == {
        "a trait=authority": ("authority", "kl_rev"),
        "b trait=authority": ("authority", "none"),
        "a trait=love": ("love", "kl_rev"),
        "b trait=love": ("love", "none"),
    }


def test_a_folder_is_found_again_by_its_settings_whatever_its_label(tmp_path, plan):
    made = plan.jobs[0].folder
    made.mkdir(parents=True)
    renamed = GRID.replace('[grid]\n"heal.tau" = [0.1, 0.2]', "[grid]\nheal.lr = [1e-4]\nheal.tau = [0.1]")
    assert made in {job.folder for job in load(file_of(tmp_path, renamed)).jobs}
    made.with_name(f"a-copy-of-{made.name}").mkdir()
    assert made == load(file_of(tmp_path)).jobs[0].folder


def test_a_trait_file_that_was_changed_makes_other_runs(tmp_path):
    trait = tmp_path / "calm.toml"
    body = f'preset = "fast-dev"\nseeds = [1]\n[fixed]\ntrait = "{trait}"\neval.evals = ["persona", "text_quality"]\n'
    folders = []
    for persona in ("calm", "loud"):
        trait.write_text(f'[persona]\npositive = "You are {persona}."\nnegative = "You are sly."\n')
        folders.append(load(file_of(tmp_path, body)).jobs[0].folder)
    assert folders[0] != folders[1]


SEVEN = ("lr", "tau", "lam", "epochs", "batch_size", "rehearsal", "spectral")
BAD = {
    'preset = "toi"\nseeds = [1]': ["preset is 'toi': did you mean 'toy'?"],
    'preset = "toy"\nseeds = []\nfixd.x = 1': ["'seeds' is []: it must hold at least 1", "did you mean 'fixed'?"],
    'preset = "toy"\nseeds = [1, 1]\n[fixed]\nheal.lamb = 1\nseed = 3\nxyz = 2\n"heal.tau" = -1': [
        "seeds is [1, 1]: a seed is listed twice",
        "unknown setting 'heal.lamb'; did you mean 'heal.lam'?",
        "seed cannot be set here; list it in seeds",
        "unknown setting 'xyz'; `steer-heal run",
        "s.toml: fixed: heal.tau is -1: it must be >= 0",
    ],
    'preset = "toy"\nseeds = [1]\n[grid]\nheal.lam = [0.1]\n[search]\nn_trials = 1\nheal.tau = {low = 0.1, high = 1}': [
        "holds search and grid"
    ],
    'preset = "toy"\nseeds = [1]\n[grid]\nheal.lam = [0.1]\n[[runs]]\nname = "a"\nheal.lam = 1': [
        "a: heal.lam is given twice, here and in grid"
    ],
    'preset = "toy"\nseeds = [1]\n[grid]\nheal.lam = 0.1\nheal.tau = []': ["lam is 0.1: it must be", "tau is []: it"],
    'preset = "toy"\nseeds = [1]\n[grid]\n' + "".join(f"heal.{name} = {[*range(40)]}\n" for name in SEVEN): [
        "holds 163840000000 arms, at most 1000 are made"
    ],
    'preset = "toy"\nseeds = [1]\n[grid]\nheal.lam = [1, 1.0]': ["'lam=1' and 'lam=1.0' have the"],
    'preset = "toy"\nseeds = [1]\n[[runs]]\nname = "a"\n[[runs]]\nname = "b"\nquiet = true': ["quiet cannot be set"],
    'preset = "toy"\nseeds = [1]\n[[runs]]\nname = "a"\n[[runs]]\nname = "a"\nn_rounds = 2': ["two arms are named 'a'"],
    'preset = "toy"\nseeds = [1]\n[[runs]]\nname = "a"\n[[runs]]\nname = "b"\nn_threads = 2': [
        "have the same settings"
    ],
    'preset = "toy"\nseeds = [-1]\n[fixed]\nheal.tau = -1\n[grid]\nheal.lr = [5, 0.1]\n[[runs]]\nn_rounds = 0': [
        "s.toml: run 1 has the name None",
        "s.toml: seeds: 'seed' is -1: it must be >= 0",
        "s.toml: fixed: heal.tau is -1: it must be >= 0",
        "s.toml: grid: heal.lr is 5: it must be <= 1",
        "s.toml: runs: n_rounds is 0: it must be >= 1",
    ],
    'preset = "toy"\nseeds = [1]\n[search]\nn_trials = 1\nheal.lr = {low = 0.1, high = 5}': [
        "s.toml: search: heal.lr is 5.0: it must be <= 1"
    ],
    "description = 'x'\nprompts = []": [
        "s.toml looks like a file of a trait, not of a sweep: steer-heal run PRESET --"
    ],
    "trait = 'care'\nn_rounds = 2": ["s.toml looks like a file of settings, not of a sweep: steer-heal run --config "],
    'preset = "toy"\nseeds = [1]\n[[runs]]\nname = "a"\ntrait = "x"\n[[runs]]\nname = "b"\nsteer.method = "men"': [
        "trait is 'x'",
        "steer.method is 'men': ",
    ],
    "preset": ["is not valid TOML"],
    ".".join("a" * 200) + " = 1": ["tables nested more than 20 deep"],
}


@pytest.mark.parametrize("body", BAD)
def test_everything_that_is_wrong_is_one_message_and_nothing_starts(body, tmp_path, capsys):
    with pytest.raises(UserError) as error:
        load(file_of(tmp_path, body))
    assert len(error.value.problems) == len(BAD[body]), error.value.problems
    assert all(any(words in line for line in error.value.problems) for words in BAD[body]), error.value.problems
    assert main(["sweep", str(tmp_path / "s.toml")]) == 2 and "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags, told", [
    (["--cpus", "2", "--gpus", "0"], ["cpus is 2.0: only --engine ray", "gpus is 0.0: only --engine ray"]),
    (["--address", "auto"], ["address is auto: only --engine ray"]),
    (["--engine", "print", "--jobs", "2"], ["jobs is 2: --engine print starts no run"]),
    (["--results", "--engine", "print"], ["engine is 'print': --results prints no commands"]),
])  # fmt: skip
def test_a_flag_without_effect_is_refused(flags, told, tmp_path, capsys):
    assert main(["sweep", str(file_of(tmp_path)), *flags]) == 2
    err = capsys.readouterr().err
    assert all(words in err for words in told) and err.count("leave") == len(told)


def test_a_sweep_file_is_refused_without_torch(tmp_path):
    file_of(tmp_path, 'preset = "toy"\nseeds = [1]\n[grid]\n"heal.lrr" = [5]')
    code = "import sys; from steer_heal.__main__ import main; print(main(['sweep', 's.toml']), 'torch' in sys.modules)"
    env = os.environ | {"BEARTYPE": "0"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout == "2 False\n" and "s.toml: grid: unknown setting 'heal.lrr'; did you mean" in done.stderr


# --- commands ----------------------------------------------------------------------------------------------------
CHANGED = {
    "trait": "-odd",
    "seed": 7,
    "control": False,
    "temperature": 0.5,
    "gen.alphas": (0.25, 1e-7),
    "gen.prompts": Path("a b"),
    "filter.gates": (),
    "filter.relevance_min": -1e-07,
    "heal.lam_power": -0.5,
    "backtrack.limits": {"kl_base": 0.2, "coherence": -1e-09},
    "steer.normalize": True,
    "eval.evals": ("text_quality",),
}


def test_a_command_line_makes_the_settings_that_it_was_made_of():
    for name, value in CHANGED.items():
        section, _, key = name.rpartition(".")
        inner = {section: replace(getattr(FAST_DEV_PRESET, section), **{key: value})} if section else {key: value}
        cfg = replace(FAST_DEV_PRESET, **inner)
        assert parse(["fast-dev", *as_flags(cfg, FAST_DEV_PRESET)])[:2] == ("fast-dev", cfg), name
    assert as_flags(FAST_DEV_PRESET, FAST_DEV_PRESET) == []
    assert {*CHANGED} <= leaves(RunConfig()).keys()


def test_print_writes_a_command_for_each_run(plan, capsys):
    assert main(["sweep", str(plan.path), "--engine", "print"]) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [parse(line[2:])[1] for line in lines] == [job.cfg for job in plan.jobs]
    assert not any(job.cfg.chat for job in plan.jobs), "lines may be run in a terminal, where nobody answers"
    assert {tuple(line[:3]) for line in lines} == {("steer-heal", "run", "fast-dev")}
    assert not plan.out.exists()


# --- a run with a folder of its own ------------------------------------------------------------------------------
TWO = ["--n-rounds", "2", "--no-control"]


def test_the_same_command_continues_a_stopped_run_and_leaves_a_finished_one_alone(settings, two, after_round_0, capsys):
    command = ["run", "fast-dev", "--folder", str(after_round_0), *settings, *TWO]
    with undrawn():
        assert run_status(after_round_0) == "stopped"
        assert main(command) == 0
        assert_same(after_round_0, two)
        assert run_status(after_round_0) == "done"
        before = {path: path.read_bytes() for path in after_round_0.rglob("*") if path.is_file()}
        capsys.readouterr()
        assert main(command) == 0
    assert "is finished" in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in after_round_0.rglob("*") if path.is_file()}
    assert main([*command, "--heal.tau", "7", "--seed", "3"]) == 2
    assert "it holds a run with another seed, heal.tau" in capsys.readouterr().err
    with lock_run(after_round_0):
        assert run_status(after_round_0) == "in use"


def test_a_new_run_takes_its_folder_if_no_other_files_are_there(settings, two, tmp_path, capsys):
    own = tmp_path / "a" / "mine"
    own.mkdir(parents=True)
    for name in (".lock", "events.jsonl"):  # of a process that was killed before its first event
        (own / name).touch()
    (own / f"{TRIAL}x").mkdir()  # of one that was killed while it looked whether it may write there
    assert run_status(own) == "new"
    command = ["run", "fast-dev", "--folder", str(own), *settings, *TWO]
    (own / "thesis.txt").touch()
    assert main(command) == 2 and "it holds 'thesis.txt' and no run" in capsys.readouterr().err
    (own / "thesis.txt").unlink()
    with undrawn():
        assert main(command) == 0
    assert_same(own, two)
    assert read_start(own).folder == str(own)


# --- the loop ----------------------------------------------------------------------------------------------------
class Made:
    """An engine whose runs end at once, with a status by folder; a status of None never ends."""

    def __init__(self, slots, statuses):
        self.slots, self.statuses, self.started, self.stopped, self.most, self.going = slots, statuses, [], [], 0, 0

    def start(self, job):
        self.started.append(job)
        self.going += 1
        self.most = max(self.most, self.going)
        return job

    def poll(self, job):
        status = self.statuses.get(job.folder.name, 0)
        self.going -= status is not None
        return status

    def runs(self, job):
        return True

    def stop(self, handles):
        self.stopped = list(handles)


def finished_copy(job, run_):
    shutil.copytree(run_, job.folder)
    append_result(job.folder.parent, {"run": job.folder.name, "arm": "x", "seed": job.cfg.seed})


def test_finished_runs_are_skipped_locked_ones_left_alone_and_a_failure_stops_no_other(plan, two, capsys):
    done, in_use, fails, *rest = plan.jobs
    finished_copy(done, two)
    in_use.folder.mkdir()
    engine, ends = Made(3, {fails.folder.name: 1}), {}
    fails.folder.with_name(f"{fails.folder.name}.log").write_text("a\nerror: why\ncontinue with: x\n")
    with lock_run(in_use.folder), Watch(plan.jobs) as watch:
        drive(iter(plan.jobs), engine, watch, lambda job, end: ends.update({job.folder.name: end}))
    assert engine.started == [fails, *rest] and engine.most == 3 and engine.stopped == []
    told = {job.folder.name: "done" for job in plan.jobs}
    assert ends == told | {fails.folder.name: "failed", in_use.folder.name: "in use"}
    assert [row.message for row in watch.having("failed")] == ["error: why"]
    assert [row.job for row in watch.having("in use")] == [in_use]
    printed = capsys.readouterr().out
    assert f"failed   {fails.folder.name}" in printed and f"in use   {in_use.folder.name}" in printed


def test_the_next_job_is_asked_for_when_a_slot_is_free(plan):
    asked, ended = [], []

    def source():
        for job in plan.jobs:
            assert len(asked) - len(ended) < 2
            asked.append(job)
            yield job

    with Watch([]) as watch:
        drive(source(), Made(2, {}), watch, lambda job, end: ended.append(job))
    assert ended == plan.jobs


def test_what_is_running_is_stopped_when_the_sweep_is(plan):
    never = dict.fromkeys(job.folder.name for job in plan.jobs)
    engine = Made(2, never)
    engine.poll = lambda job: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped) as stopped, Watch(plan.jobs) as watch:
        drive(iter(plan.jobs), engine, watch)
    assert stopped.value.status == 143 and engine.stopped == engine.started == plan.jobs[:2]


def test_a_second_ctrl_c_kills_what_does_not_stop():
    code = """
import os, signal, time
tell = lambda *_: os.write(1, b"\\n")
signal.signal(signal.SIGTERM, tell)
tell()
time.sleep(60)
"""
    runs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, process_group=0) for _ in range(2)]
    told = lambda: [each.stdout.readline() for each in runs]
    told()
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs without
    again = threading.Thread(target=lambda: told() and os.kill(os.getpid(), signal.SIGINT))  # both had SIGTERM
    again.start()
    Local(2).stop(runs)
    again.join()
    signal.signal(signal.SIGINT, previous)
    assert [each.returncode for each in runs] == [-signal.SIGKILL] * 2
    for each in runs:
        each.stdout.close()


def test_progress_is_read_as_events_come_and_again_where_they_were_cut(two, tmp_path):
    shutil.copytree(two, tmp_path / "run")
    path, content = tmp_path / "run/events.jsonl", (two / "events.jsonl").read_bytes()
    follower, seen = Follower(path.parent, "degenerate_frac"), []
    path.write_bytes(b"")
    for at in range(0, len(content), 5000):
        with path.open("ab") as file:
            file.write(content[at : at + 5000])
        seen.append(follower.read())
    (row,) = read_results(two.parent / "results.tsv")
    last = seen[-1]
    assert (f"{last.shift}", f"{last.broken_texts}") == (row["shift"], row["degenerate_frac"])
    assert not seen[0].began or seen[0].wall_s > 0
    assert {each.round for each in seen} == {None, 0, 1} and last.round == 1 and last.wall_s == float(row["wall_s"])
    rewritten(path.parent, lambda events: events.__delitem__(slice(2, None)))  # written in place
    path.rename(path.with_suffix(".old"))
    path.write_bytes(path.with_suffix(".old").read_bytes())
    seen = follower.read()
    assert seen.began and seen.round is None and seen.shift is None
    assert Follower(tmp_path / "none", None).read() == Seen()


def test_the_shift_of_the_live_table_is_over_the_items_that_both_states_have(tmp_path):
    events, values = run_events(1), {"base": [1.0, math.nan, math.nan], "healed": [2.0, 5.0, 5.0]}
    item = Run(events).trait_metric.item
    events = [
        replace(e, items={**e.items, item: values[e.state]}) if isinstance(e, Measured) and e.state in values else e
        for e in events
    ]
    assert Follower(write_run(tmp_path / "run", events), None).read().shift == pytest.approx(math.log(2.0))


def test_the_live_table_fits_the_terminal_and_shows_what_runs_first(plan, two):
    console = Console(force_terminal=True, width=120, height=10, file=io.StringIO())
    with Watch(plan.jobs, console) as watch:
        finished_copy(plan.jobs[3], two)
        watch.going(plan.jobs[3], "running")
        watch.show()
    text = console.file.getvalue()
    assert "1 running, 7 waiting" in text and plan.jobs[3].folder.name in text
    assert plan.jobs[7].folder.name not in text
    shown = Follower(two, "degenerate_frac").read()
    assert f"{shown.shift:+.3f}" in text


def test_the_last_line_of_a_log_is_what_went_wrong(tmp_path):
    (tmp_path / "log").write_bytes(b"x\nerror: \xff\n\ncontinue with: steer-heal resume x\n")
    assert last_line(tmp_path / "log") == "error: \ufffd" and last_line(tmp_path / "none") == ""


# --- results -----------------------------------------------------------------------------------------------------
def test_results_are_those_of_the_finished_runs_under_the_labels_of_the_file(plan, capsys):
    plan.out.mkdir()
    assert finished_runs(plan.out, plan.jobs) is None
    for i, job in enumerate(plan.jobs[:8]):
        if i != 6:  # as if it were deleted
            job.folder.mkdir()
        own = {"run": job.folder.name, "arm": "old", "trait": "authority", "n_rounds": 1, "seed": job.cfg.seed}
        own |= {"settings": job.cfg.fingerprint(), "shift": -float(i), "degenerate_frac": 0.1 * i, "wall_s": 2}
        own |= {"n_rounds": 3} if i == 7 else {}
        append_result(plan.out, own | {"verdict": "GOOD: so", "oracle": None})
    append_result(plan.out, {"run": "another", "arm": "x", "seed": 1})
    runs = finished_runs(plan.out, plan.jobs)
    assert runs is not None and len(runs) == 6 and runs["shift"].to_list() == [0.0, -1.0, -2.0, -3.0, -4.0, -5.0]
    show_results(plan.out, plan.jobs)
    printed = capsys.readouterr().out
    assert f"left out: {plan.jobs[7].folder.name}, which has 3 rounds in place of 1" in printed
    assert "finished: 6 of 8 runs" in printed and "-2.000 ± 2.828" in printed
    arms = pl.read_csv(plan.out / "arms.tsv", separator="\t")
    assert arms["arm"].to_list() == [job.arm.label for job in plan.jobs[:4]] and arms["n"].to_list() == [2, 2, 1, 1]
    assert arms["shift"].to_list() == [-2.0, -3.0, -2.0, -3.0]
    assert arms["shift_sd"].to_list()[:2] == pytest.approx([8**0.5] * 2) and arms["shift_sd"][2] is None
    assert (plan.out / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_every_trait_of_a_sweep_has_a_frontier_of_its_own(tmp_path):
    model = shutil.copytree(DATA / "toylm", tmp_path / ("m" * 60))
    body = f'preset = "toy"\nseeds = [1]\n[grid]\nmodel = ["data/toylm", "{model}"]\ntrait = ["authority", "love"]\n'
    plan = load(file_of(tmp_path, body))
    plan.out.mkdir()
    for job in plan.jobs:
        job.folder.mkdir()
        own = {"run": job.folder.name, "trait": job.cfg.trait, "seed": 1, "settings": "", "arm": ""}
        own["n_rounds"] = job.cfg.n_rounds
        append_result(plan.out, own | {"shift": 1.0, "degenerate_frac": 0.1, "wall_s": 2, "verdict": "GOOD: so"})
    show_results(plan.out, plan.jobs)
    names = sorted(path.name for path in plan.out.glob("*.png"))
    cut = f"frontier_{'m' * 60}"
    assert names == sorted([*(f"frontier_toylm_{t}.png" for t in ("authority", "love")), f"{cut}.png", f"{cut}_2.png"])


# --- processes ---------------------------------------------------------------------------------------------------
SHORT = """
preset = "fast-dev"
seeds = [42]
[fixed]
n_threads = 1
n_rounds = 1
control = false
steer.n_contexts = 4
gen.max_new_tokens = 6
gen.batch_size = 4
eval.think_tokens = 1
eval.n_vignettes = 3
eval.n_texts = 2
eval.n_prompts = 2
eval.max_new_tokens = 6
eval.n_bootstrap = 10
"""


def test_a_sweep_stopped_by_ctrl_c_goes_on_and_one_that_fails_does_not_stop_the_other(tmp_path, capsys):
    starves = "filter.ppl_max = 1.01\nfilter.gates = ['perplexity']\ndose.mode = 'fixed'"
    file = file_of(tmp_path, f"{SHORT}[[runs]]\nname = 'works'\n[[runs]]\nname = 'starves'\n{starves}\n")
    works, fails = load(file).jobs

    def interrupt():
        while not measured(works.folder):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    assert main(["sweep", str(file)]) == 130
    assert capsys.readouterr().err.endswith(f"continue with: {shlex.join(['steer-heal', 'sweep', str(file)])}\n")
    assert run_status(works.folder) == "stopped", "its process has ended"
    assert main(["sweep", str(file), "--jobs", "2"]) == 1
    out, err = capsys.readouterr()
    assert f"failed: {fails.folder}" in err and "filter.min_train" in err
    assert run_status(works.folder) == "done" and "finished: 1 of 2 runs" in out
    with undrawn():
        whole = started(tmp_path / "plain", as_flags(replace(works.cfg, folder=None), FAST_DEV_PRESET))
    assert_same(works.folder, whole)


def measured(folder) -> list[dict]:
    """The states that a run has measured so far."""
    path = folder / "events.jsonl"
    events = map(json.loads, path.read_bytes().split(b"\n")[:-1]) if path.exists() else ()
    return [event for event in events if event["event"] == "measured"]


# --- a cluster, of which only its answers are here; tests/test_ray.py has a real one -------------------------------
class Ray:
    """Stands for the package: a cluster of one node with two CPUs."""

    class exceptions:
        RayError = type("RayError", (Exception,), {})

    def __init__(self, error=None):
        self.error, self.cancelled = error, []

    def is_initialized(self):
        return False

    def init(self, **_):
        if self.error:
            raise self.error

    def nodes(self):
        return [{"Alive": True, "Resources": {"CPU": 2.0}}]

    def cluster_resources(self):
        return {"CPU": 7.0, "GPU": 1.0}

    def remote(self, **_):
        return lambda function: function

    def cancel(self, task):
        self.cancelled.append(task)

    def wait(self, *_, **__):
        raise KeyboardInterrupt


@pytest.fixture
def joined(monkeypatch):
    """Makes the engine with a Ray of its own."""
    monkeypatch.setattr(cluster, "find_spec", lambda name: True)

    def make(ray, **shares):
        monkeypatch.setattr(cluster, "import_module", lambda name: ray)
        return cluster.Cluster(None, **{"address": "host:1", "cpus": 1.0, "gpus": 0.0, "ahead": True, **shares})

    return make


def test_a_cluster_that_cannot_be_joined_or_has_no_room_is_named(joined):
    asks = ConnectionError("failed to connect")
    asks.__cause__ = RuntimeError("Unauthenticated: InvalidAuthToken")
    for error, told in (
        (ConnectionError("nobody"), r"address is 'host:1': no Ray cluster answers there \(nobody\)"),
        (asks, "address is 'host:1': .* asks for its token; set RAY_AUTH_MODE=token"),
        (Ray.exceptions.RayError("no authentication token was found"), "asks for its token"),
    ):
        with pytest.raises(UserError, match=told):
            joined(Ray(error))
    for shares, told in (
        ({"cpus": 4.0}, "cpus is 4: no node has more than 2"),
        ({"gpus": 0.5}, "gpus is 0.5: no node"),
    ):
        with pytest.raises(UserError, match=told):
            joined(Ray(), **shares)


def test_ray_is_given_no_more_trials_of_a_search_than_the_cluster_runs_at_once(joined):
    assert joined(Ray()).slots > 1000
    assert joined(Ray(), ahead=False).slots == 7 and joined(Ray(), ahead=False, cpus=2.0).slots == 3


def test_a_second_ctrl_c_does_not_wait_for_the_runs_of_a_cluster(joined):
    ray = Ray()
    joined(ray).stop([("first", None, None), ("second", None, None)])
    assert ray.cancelled == ["first", "second"]


def test_a_run_that_waits_for_its_share_of_a_cluster_is_shown_as_waiting(joined, plan, monkeypatch, capsys):
    tasks, ends, shown = {}, {}, []
    begun, waits, resumed = (job.folder.name for job in plan.jobs[:3])
    log_of(plan.jobs[2]).parent.mkdir(parents=True, exist_ok=True)
    log_of(plan.jobs[2]).write_text("of an earlier attempt\n")
    os.utime(log_of(plan.jobs[2]), (0, 0))
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: SimpleNamespace(poll=lambda: 0))
    engine = joined(Ray())
    engine.task = SimpleNamespace(remote=lambda *arguments: tasks.setdefault(arguments[1].name, arguments))
    engine.poll = lambda handle: ends.get(handle[1].folder.name)

    class Sees(Watch):
        def show(self):
            shown.append({name: row.state for name, row in self.rows.items()})
            if len(shown) == 1:
                for name in (begun, resumed):
                    task.make(*tasks[name])
            else:
                ends.update(dict.fromkeys(tasks, 0))

    with Sees([]) as watch:
        drive(iter(plan.jobs[:3]), engine, watch)
    first, second, _ = shown
    assert first == dict.fromkeys((begun, waits, resumed), "waiting")
    assert second == first | dict.fromkeys((begun, resumed), "running")
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["running", "running", *["done"] * 3]


def test_a_run_that_begins_while_it_is_handed_to_a_cluster_is_seen(joined, plan):
    engine = joined(Ray())
    engine.task = SimpleNamespace(remote=lambda arguments, folder, log, cwd: log.touch())
    assert engine.runs(engine.start(plan.jobs[0]))


# --- files of this repository -------------------------------------------------------------------------------------
EXAMPLES = [*re.findall(r"```toml\n(preset.*?)```", (ROOT / "docs/sweeps.md").read_text(encoding="utf-8"), re.DOTALL)]


@pytest.mark.parametrize("text", EXAMPLES)
def test_the_examples_of_the_docs_are_sweep_files(text, tmp_path):
    (tmp_path / "s.toml").write_text(text)
    plan = load(tmp_path / "s.toml")
    assert len(plan.jobs) == 18 or plan.search and len(plan.search.space) == 4


def test_the_arms_of_the_results_are_a_sweep_file():
    plan = load(ROOT / "studies/toy_arms.toml")
    arms = {arm.label: arm.cfg for arm in plan.arms}
    toy = replace(PRESETS["toy"][1], n_rounds=8)
    assert arms["kl_rev-rmse"] == toy and arms["love"] == replace(toy, trait="love")
    off = replace(toy, control=False)
    assert arms["none"] == replace(off, heal=replace(off.heal, divergence="none"))
    decay = replace(off.heal, aggregate="mean", lam_power=0.5)
    assert arms["kl_rev-mean-decay"] == replace(off, heal=decay)
    assert (len(arms), plan.seeds, len(plan.jobs)) == (6, (41, 42, 43), 18)


def test_the_study_of_real_models_has_every_arm_for_every_model_and_trait():
    plan = load(ROOT / "studies/real.toml")
    models, traits = {arm.cfg.model for arm in plan.arms}, {arm.cfg.trait for arm in plan.arms}
    assert len(plan.arms) == 5 * len(models) * len(traits) == 40
    held = next(arm.cfg for arm in plan.arms if arm.label.startswith("contrast, held"))
    assert (held.heal.teacher, held.heal.contrast_kl) == ("contrast", 0.1)
    assert {(arm.cfg.heal.hold, arm.cfg.heal.rehearsal) for arm in plan.arms} == {(0.5, 48), (0.0, 0)}
    assert (held.heal.hold, held.heal.rehearsal) == (0.5, 48)
    tokens = next(arm.cfg.heal for arm in plan.arms if arm.label.startswith("tokens"))
    assert (tokens.target, tokens.text, tokens.teacher, tokens.contrast_kl) == ("tokens", "steered", "prompt", 0.0)
