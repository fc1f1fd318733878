"""A search proposes trials, learns from their runs, and goes on where it was stopped."""

from importlib.util import find_spec

import polars as pl
import pytest
from made_runs import write_run
from test_sweep import file_of

from steer_heal.__main__ import main
from steer_heal.errors import UserError
from steer_heal.events import RunEnd
from steer_heal.runs.results import append_result
from steer_heal.runs.signals import Stopped
from steer_heal.runs.storage import lock_run
from steer_heal.sweep.engine import drive
from steer_heal.sweep.plan import Range, load
from steer_heal.sweep.search import Trials
from steer_heal.sweep.watch import Watch

BODY = """
preset = "fast-dev"
seeds = [41, 42]
[search]
n_trials = 6
heal.lam = {low = 0.01, high = 1, log = true}
heal.epochs = {low = 1, high = 3}
heal.aggregate = {choices = ["mean", "rmse"]}
"""
optuna_is_there = pytest.mark.skipif(
    find_spec("optuna") is None, reason="optuna is not installed: pip install 'steer-heal[optuna]'"
)


class Learns:
    """Runs that end at once: trait and broken texts both grow with lam. Run number `stop_at` stops the sweep, runs
    number `fails` fail."""

    def __init__(self, slots=1, stop_at=None, fails=()):
        self.slots, self.stop_at, self.fails, self.started, self.stopped = slots, stop_at, fails, [], []

    def start(self, job):
        self.started.append(job)
        return len(self.started) - 1

    def poll(self, i):
        job = self.started[i]
        if i == self.stop_at:
            raise Stopped(15)
        if i in self.fails:
            return 1
        job.folder.mkdir(parents=True)
        write_run(job.folder, [RunEnd()])
        lam, seed = job.cfg.heal.lam, job.cfg.seed
        own = {"run": job.folder.name, "arm": job.cfg.arm, "seed": seed, "trait": "authority", "n_rounds": 2}
        own["settings"] = job.cfg.fingerprint()
        append_result(job.folder.parent, {**own, "shift": -lam - (seed - 41), "degenerate_frac": lam / 2})
        return 0

    def runs(self, i):
        return True

    def stop(self, handles):
        self.stopped = list(handles)


def searched(plan, engine):
    """The trials after as much of a search as the engine lets through."""
    trials = Trials(plan)
    with Watch([]) as watch:
        drive(trials.source(), engine, watch, trials.ended)
    return trials


def facts(trials):
    return [(trial.state.name, trial.params, trial.values) for trial in trials.study.trials]


@optuna_is_there
def test_a_trial_has_the_means_over_its_seeds_and_the_front_is_shown(tmp_path, capsys):
    plan = load(file_of(tmp_path, BODY))
    trials = searched(plan, Learns(slots=3))
    assert len(trials.study.trials) == 6
    for state, params, values in facts(trials):
        assert state == "COMPLETE" and values == pytest.approx([params["heal.lam"] + 0.5, params["heal.lam"] / 2])
        assert 0.01 <= params["heal.lam"] <= 1 and params["heal.epochs"] in (1, 2, 3)
    capsys.readouterr()
    trials.show()
    printed = capsys.readouterr().out
    assert "complete: 6 of 6 trials" in printed and printed.count("heal") == 0
    assert printed.count("lam=") == 6, "more trait costs more: no trial beats another"
    assert (plan.out / "pareto.png").read_bytes().startswith(b"\x89PNG") and str(plan.out / "arms.tsv") in printed
    arms = pl.read_csv(plan.out / "arms.tsv", separator="\t")
    for row, (_, params, values) in zip(arms.iter_rows(named=True), facts(trials), strict=True):
        assert (row["n"], -row["shift"], row["degenerate_frac"]) == (2, *map(pytest.approx, values))
        assert f"lam={params['heal.lam']:.4g}" in row["arm"]
    assert [arm.split()[1] for arm in arms["arm"]] == [str(trial.number) for trial in trials.study.trials]


@optuna_is_there
def test_only_complete_trials_are_arms_and_none_is_no_table(tmp_path, capsys):
    plan = load(file_of(tmp_path, BODY.replace("= 6", "= 2")))
    Trials(plan).show()
    assert "0 of 2 trials" in capsys.readouterr().out and not (plan.out / "arms.tsv").exists()
    searched(plan, Learns(fails=[1])).show()
    (arm,) = pl.read_csv(plan.out / "arms.tsv", separator="\t")["arm"]
    assert arm.startswith("trial 1 ")


@optuna_is_there
def test_a_stopped_search_takes_up_its_open_trial_and_a_finished_one_does_nothing(tmp_path):
    plan = load(file_of(tmp_path, BODY))
    first = Learns(stop_at=5)
    with pytest.raises(Stopped):
        searched(plan, first)
    open_trial = Trials(plan).study.trials[-1]
    assert (open_trial.number, open_trial.state.name) == (2, "RUNNING") and first.stopped == [5]
    second = Learns(fails=[2])
    states = [state for state, *_ in facts(searched(plan, second))]
    assert [job.cfg for job in second.started[:1]] == [job.cfg for job in first.started[5:]]
    assert states == ["COMPLETE"] * 3 + ["FAIL"] + ["COMPLETE"] * 2
    third = Learns()
    assert facts(searched(plan, third))[:3] == facts(Trials(plan))[:3] and third.started == []
    lams = [params["heal.lam"] for _, params, _ in facts(Trials(plan))]
    assert len({*lams}) == 6, "one that goes on does not propose the same again"


@optuna_is_there
def test_a_run_in_use_leaves_its_trial_open(tmp_path):
    plan = load(file_of(tmp_path, BODY.replace("[41, 42]", "[41]").replace("= 6", "= 1")))
    with pytest.raises(Stopped):
        searched(plan, first := Learns(stop_at=0))
    first.started[0].folder.mkdir(parents=True)
    with lock_run(first.started[0].folder):
        assert facts(searched(plan, Learns()))[0][0] == "RUNNING"
    first.started[0].folder.joinpath(".lock").unlink()
    first.started[0].folder.rmdir()
    assert facts(searched(plan, Learns()))[0][0] == "COMPLETE"


@optuna_is_there
def test_other_fixed_settings_and_other_ranges_are_another_search(tmp_path):
    plan = load(file_of(tmp_path, BODY))
    searched(plan, Learns())
    wider = BODY.replace("0.01", "0.02")
    assert wider != BODY
    for body in (BODY + "[fixed]\nheal.tau = 0.2\n", wider):
        assert facts(Trials(load(file_of(tmp_path, body)))) == []


def test_a_search_that_cannot_be_is_refused_by_its_line(tmp_path, capsys):
    bad = BODY.replace("low = 1, high = 3", "low = 3, high = 1").replace("= 6", "= 0").replace("rmse", "rmsd")
    bad = bad.replace("low = 0.01", "low = 0").replace("heal.lam", "heal.lan")
    with pytest.raises(UserError) as error:
        load(file_of(tmp_path, bad))
    for words in ("n_trials is 0", "'heal.lan'; did you mean 'heal.lam'?", "low < high", "'rmsd': did you mean"):
        assert words in str(error.value)
    with pytest.raises(UserError, match="add text_quality"):
        load(file_of(tmp_path, BODY + "[fixed]\neval.evals = ['persona', 'moral_foundations']\n"))
    with pytest.raises(ValueError):
        Range(low=0.0, high=1.0, log=True)
    assert main(["sweep", str(file_of(tmp_path, BODY)), "--engine", "print"]) == 2
    assert "a search proposes" in capsys.readouterr().err
