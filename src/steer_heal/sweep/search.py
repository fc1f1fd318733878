"""[search]: trials that Optuna proposes, for the most trait at the fewest broken texts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import Any

from steer_heal.errors import UserError, plural, print_safe
from steer_heal.report import tables
from steer_heal.runs.storage import atomic_write
from steer_heal.settings import changed
from steer_heal.sweep.engine import End
from steer_heal.sweep.plan import Arm, Job, Plan, Range, arm_of, is_whole, label_of
from steer_heal.sweep.results import ARMS, finished_runs, write_arms

DATABASE = "search.db"
PARETO = "pareto.png"


class Trials:
    """The trials of a search. They are kept in a database beside the runs, so that a stopped search can be continued.

    A trial is an arm: one run per seed. Its values are means over seeds.
    """

    def __init__(self, plan: Plan) -> None:
        """UserError if Optuna is not installed."""
        if find_spec("optuna") is None:
            raise UserError(f"{plan.path} holds search: its package is not installed; pip install 'steer-heal[optuna]'")
        optuna: Any = import_module("optuna")
        assert plan.search is not None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.optuna = optuna
        self.plan = plan
        self.search = plan.search
        self.base = plan.arms[0]
        self.open: dict[tuple[str, Path], int] = {}
        """Number of the trial of each run that has not ended, by label and folder, since two trials may share a run."""
        self.failed: set[int] = set()
        plan.out.mkdir(parents=True, exist_ok=True)
        self.study = self._study()

    def _study(self) -> Any:
        """The study of these fixed settings, files, seeds and ranges. Others have a study of their own in the same
        database."""
        space = hashlib.sha256(repr(sorted(self.search.space.items())).encode()).hexdigest()[:8]
        name = "-".join([self.base.cfg.fingerprint(), self.plan.inputs, space, *map(str, self.plan.seeds)])
        storage = f"sqlite:///{(self.plan.out / DATABASE).resolve()}"
        study = self.optuna.create_study(
            storage=storage, study_name=name, directions=["maximize", "minimize"], load_if_exists=True
        )
        seed = (self.plan.seeds[0] + len(study.trials)) % 2**32  # a continued search must not repeat its proposals
        study.sampler = self.optuna.samplers.TPESampler(seed=seed, multivariate=True)
        return study

    def arm(self, trial: Any) -> Arm:
        """The arm of a trial, with the settings that were proposed."""
        cfg = changed(self.base.cfg, trial.params, f"trial {trial.number}")
        return arm_of(f"trial {trial.number}", cfg, self.plan.out)

    def source(self) -> Iterator[Job]:
        """Runs to make: first those of stopped trials, then those of new trials, each proposed when it is needed."""
        running = self.optuna.trial.TrialState.RUNNING
        for trial in self.study.get_trials(states=[running]):
            if trial.params.keys() == self.search.space.keys():
                yield from self._begin(trial)
            else:  # the search was killed while the trial was proposed
                self._tell(trial.number, None)
        while len(self.study.trials) < self.search.n_trials:
            trial = self.study.ask()
            for name, each in self.search.space.items():
                self._suggest(trial, name, each)
            yield from self._begin(trial)

    def _suggest(self, trial: Any, name: str, each: Range) -> None:
        if each.choices:
            trial.suggest_categorical(name, each.choices)
        elif is_whole(name):
            trial.suggest_int(name, int(each.low or 0), int(each.high or 0), log=each.log)
        else:
            trial.suggest_float(name, each.low, each.high, log=each.log)

    def _begin(self, trial: Any) -> Iterator[Job]:
        try:
            arm = self.arm(trial)
            jobs = [self.plan.job(arm, seed) for seed in self.plan.seeds]
        except UserError:  # two settings exclude each other
            self._tell(trial.number, None)
            return
        self.open |= {(job.arm.label, job.folder): trial.number for job in jobs}
        yield from jobs

    def ended(self, job: Job, end: End) -> None:
        """Tells Optuna about a trial once all its runs have ended. The trial has failed if one of them failed. A trial
        with a run that another process works on is left for the next time."""
        if end == "in use":
            return
        number = self.open.pop((job.arm.label, job.folder))
        if end == "failed":
            self.failed.add(number)
        if number not in self.open.values():
            self._tell(number, None if number in self.failed else self.values(job.arm))

    def _tell(self, number: int, values: tuple[float, float] | None) -> None:
        state = self.optuna.trial.TrialState
        self.study.tell(number, values, state=state.FAIL if values is None else state.COMPLETE)

    def values(self, arm: Arm) -> tuple[float, float] | None:
        """(shift in the wanted direction, share of broken texts). None if a run has no such measurement."""
        runs = finished_runs(self.plan.out, [self.plan.job(arm, seed) for seed in self.plan.seeds])
        assert arm.broken_texts is not None
        if runs is None or len(runs) < len(self.plan.seeds):
            return None
        both = runs.select("shift", arm.broken_texts)
        if sum(both.null_count().row(0)):
            return None
        return arm.sign * mean(both["shift"]), mean(both[arm.broken_texts])

    def show(self) -> None:
        """Prints the Pareto front: the trials that no other trial beats in both values. Draws it together with all
        complete trials, and writes these to arms.tsv."""
        complete = self.study.get_trials(states=[self.optuna.trial.TrialState.COMPLETE])
        front = sorted(self.study.best_trials, key=lambda trial: trial.values[1])
        n = f"complete: {len(complete)} of {plural(self.search.n_trials, 'trial')}"
        if not complete:
            print_safe(n)
            return
        columns = ("trial", "trait shift", "broken texts", "settings")
        rows = [(trial.number, *trial.values, _settings(trial)) for trial in front]
        tables.show([dict(zip(columns, row, strict=True)) for row in rows])
        path = self.plan.out / PARETO
        with atomic_write(path) as part:
            picture(complete, front).savefig(part, format="png", dpi=130)
        arms = [replace(self.arm(trial), label=f"trial {trial.number} {_settings(trial)}") for trial in complete]
        runs = finished_runs(self.plan.out, [self.plan.job(arm, seed) for arm in arms for seed in self.plan.seeds])
        if runs is not None:
            write_arms(self.plan.out, runs)
            n += f", their arms in {self.plan.out / ARMS}"
        print_safe(f"{n}; above are those that no other trial beats in both values; the picture is {path}")


def _settings(trial: Any) -> str:
    """The settings of the trial in words."""
    return label_of({name: f"{v:.4g}" if isinstance(v, float) else v for name, v in trial.params.items()})


def picture(complete: Sequence[Any], front: Sequence[Any]) -> Any:
    """All trials as points, the Pareto front as a line with their numbers."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from steer_heal.report.plot import STYLE

    figure = Figure(figsize=(7.5, 5.5), layout="constrained")
    with rc_context(STYLE):
        axes = figure.add_subplot()
    shift, broken = zip(*(trial.values for trial in complete), strict=True)
    axes.scatter(broken, shift, s=14, color="#9a9a9a", label="trials")
    shift, broken = zip(*(trial.values for trial in front), strict=True)
    axes.plot(broken, shift, "o-", color="#1f8a5b", label="Pareto front")
    for trial in front:
        axes.annotate(str(trial.number), (trial.values[1], trial.values[0]), (3, 3), textcoords="offset points")
    axes.set_xlabel("share of broken texts")
    axes.set_ylabel("shift from base in the wanted direction")
    axes.legend(frameon=False)
    return figure
