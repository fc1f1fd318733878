"""What the questions share: a bench whose states are measured against one base, the flags, and one kind of table."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from steer_heal.check import check
from steer_heal.errors import UserError, print_safe
from steer_heal.events import Gathered, Run, Trained, plain
from steer_heal.presets import PRESETS, require_preset
from steer_heal.records import Collected, Completion, EvalResult, HealReport, Metric, Scored, round_name
from steer_heal.report import console, tables
from steer_heal.runs.log import read_events, read_start
from steer_heal.settings import HealCfg, RunConfig, changed, settings
from steer_heal.verdict import health_of, shift

if TYPE_CHECKING:  # torch: seconds
    from steer_heal.bench import Bench
    from steer_heal.model.steering import Condition, Vector
    from steer_heal.stages.heal import HealState

Given = Mapping[str, Any]
"""Settings that were given beside the flags of a question, by dotted name."""
Row = dict[str, Any]


@settings("")
class OutFlags:
    """The flags of every question."""

    also: ClassVar[tuple[str, ...]] = ("device", "n_threads", "plugin")
    """Settings that the question takes too."""
    out: Path = Path("out/diag")
    """Folder in which the table is saved as a JSON file."""


@settings("")
class PresetFlags(OutFlags):
    """The flags of a question about the model of a preset."""

    also: ClassVar[tuple[str, ...]] = (
        *OutFlags.also,
        "plugin_set",
        "model",
        "dtype",
        "trait",
        "seed",
        "temperature",
        "top_p",
        "accept_terms",
    )
    preset: str = "toy"
    """Preset of `steer-heal run`. A setting that you leave out keeps the preset's value."""

    def settings(self, given: Given) -> RunConfig:
        """The preset's settings with those that were given. Rounds are not repeated. UserError: unknown preset."""
        require_preset(self.preset)
        return changed(PRESETS[self.preset][1], {"out": self.out, "backtrack.retries": 0, **given})


class Lab:
    """A bench, and what the tables need. Every state is measured on the same items, against the same base."""

    def __init__(self, bench: Bench) -> None:
        from steer_heal.evals import metrics_of

        self.bench = bench
        self.metrics = {metric.name: metric for metric in metrics_of(bench.cfg.eval.evals)}
        self.target = self.metrics[bench.trait.target]
        self.progress = console.Bar(None, quiet=False)

    @contextmanager
    def stage(self, doing: str) -> Iterator[None]:
        """Shows how far the model's work is inside."""
        with self.progress.stage("diag", None, doing), self.bench.student.lm.watched_by(self.progress):
            yield

    @classmethod
    def of(cls, cfg: RunConfig) -> Lab:
        """A lab on the untouched model of these settings. UserError if they or their files are invalid."""
        inputs = check(cfg)
        import torch

        from steer_heal.bench import Bench, load_model
        from steer_heal.model.student import Student

        if cfg.n_threads:
            torch.set_num_threads(cfg.n_threads)
        return cls(Bench(cfg, inputs, Student(load_model(cfg), cfg.adapter)))

    @cached_property
    def vector(self) -> Vector:
        """The steering vector of the student as it was when this was first read."""
        return self.bench.extract()

    @cached_property
    def base(self) -> EvalResult:
        from steer_heal.model.state import base_state

        with self.stage("measuring the base"):
            return self.bench.measure(base_state(self.bench.trait))

    def measure(self, condition: Condition | None = None) -> EvalResult:
        """All metrics of the student, by default under the plain prompt, with intervals against base."""
        from steer_heal.model.state import State

        base = self.base
        with self.stage("measuring a state"):
            return self.bench.measure(State(name="healed", condition=condition or self.bench.plain), base)

    def shift(self, result: EvalResult, metric: Metric | None = None) -> float:
        """Shift of a metric from base, by default of the trait's. UserError if it has no value."""
        metric = metric or self.target
        moved = shift(result, self.base, metric)
        if moved is None:
            raise UserError(f"no item has a value of {metric.name}: this metric cannot measure the model")
        return moved

    def shift_under(self, condition: Condition) -> float:
        """Shift of the trait's metric from base under another condition, without the other evals."""
        from steer_heal.evals.base import collapse
        from steer_heal.model.state import State

        subject = self.bench.subject(State(name="healed", condition=condition), self.base)
        owner = next(each for each in self.bench.evals if self.target.name in [metric.name for metric in each.metrics])
        values = owner.items(subject)[self.target.item]
        return self.shift(EvalResult({self.target.name: collapse(self.target, values)}, {self.target.item: values}))

    def row(self, state: str, result: EvalResult) -> Row:
        """The columns of every table: the trait's metric, its shift from base with interval, and the shown metrics."""
        name = self.target.name
        found = result.metrics
        ends = {end: found.get(f"{name}_{end}") for end in ("lo", "hi")}
        shown = {other: found[other] for other, metric in self.metrics.items() if metric.shown and other != name}
        return {"state": state, name: found[name], "shift": self.shift(result), **ends, **shown}

    def is_healthy(self, row: Row) -> bool | None:
        """Whether every health metric of a row has a value, and is at its `good` limit or better. None: no eval has
        such a metric."""
        values = {metric: row[metric.name] for metric in health_of(self.metrics.values())}
        if not values:
            return None
        return all(value is not None and metric.within(value, metric.good) for metric, value in values.items())

    def collect(
        self, kappa: float | None = None, *, unsteered: bool = False, alphas: Sequence[float] | None = None, **keep: Any
    ) -> Collected:
        """The text of round 0: as the settings say, at `kappa` of the vector alone, or unsteered. `keep` are fields of
        FilterCfg."""
        from steer_heal.recipe import Recipe

        cfg = self.bench.cfg
        dose = (
            cfg.dose
            if kappa is None and not unsteered
            else replace(cfg.dose, mode="fixed", kappa=1.0 if kappa is None else kappa)
        )
        gen = replace(cfg.gen, alphas=tuple(alphas or cfg.gen.alphas))
        bench = replace(self.bench, cfg=replace(cfg, dose=dose, gen=gen, filter=replace(cfg.filter, **keep)))
        recipe = Recipe.control() if unsteered else Recipe.of(cfg)
        if kappa is not None:
            recipe = Recipe(name="round", text="steered", teacher="vector", fit="tokens")
        vector = None if unsteered else self.vector
        with self.stage("writing text"):
            return bench.collect(recipe, 0, vector)

    def healed(
        self, collected: Collected, heal: HealCfg, r: int = 0, n_steps: int | None = None
    ) -> tuple[EvalResult, HealReport]:
        """(metrics after a heal of the student as it is, what is known of that heal). The heal is then dropped again.

        `n_steps` ends it early, on the same schedule.
        """
        from steer_heal.recipe import Recipe

        cfg = replace(self.bench.cfg, heal=heal)
        recipe = Recipe.of(cfg)
        bench = replace(self.bench, cfg=cfg)
        teacher = bench.make_teacher(recipe, self.vector, collected) if recipe.fit == "distribution" else None
        try:
            with self.progress.stage("diag", None, "healing"):
                report = bench.heal(recipe, r, collected, teacher, n_steps=n_steps, on_step=self._on_step)
            return self.measure(), report
        finally:
            self.bench.student.discard_round()

    def _on_step(self, state: HealState) -> None:
        self.progress.at(len(state.steps), state.n_steps)


def unfiltered(completions: Sequence[Completion]) -> Collected:
    """Completions that all train, without a filter."""
    rows = tuple(Scored(completion, scores={}, failed=(), reasons=()) for completion in completions)
    return Collected(scored=rows, train=tuple(range(len(rows))))


def replay(folder: Path, r: int, given: Given) -> tuple[Lab, Collected]:
    """(a lab whose student is that of a run before round r, the text of the round). The learning rate is that of the
    round's heal. UserError if the run has no text of that round."""
    read_start(folder)
    events = Run(read_events(folder))
    gathered = events.at(Gathered, r)
    if gathered is None:
        rounds = [round_name(event.round) for event in events.each(Gathered) if event.round is not None]
        raise UserError(f"{folder} has no text of {round_name(r)}: it has that of {', '.join(rounds) or 'no round'}")
    from steer_heal.runs.opened import open_bench, settings_of
    from steer_heal.runs.stored import FolderRun

    run = FolderRun.read(folder)
    cfg = settings_of(run, **given)
    if (trained := run.at(Trained, r)) is not None:
        cfg = replace(cfg, heal=replace(cfg.heal, lr=trained.lr))
    lab = Lab(open_bench(run, cfg))
    if r > 0:
        run.restore_student(r - 1, lab.bench.student)
    return lab, gathered.collected


# --- tables ------------------------------------------------------------------------------------------------------
def mean_sd(values: Sequence[float]) -> str:
    """`mean ± sd`. A single value has no sd; without a value it is empty."""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}" if values else ""


def show(
    question: str | None, rows: Sequence[Mapping[str, object]], should: Sequence[str], out: Path, name: str, **more: Any
) -> None:
    """Prints the question, one table and what SHOULD hold in it. Writes the same, and `more`, to <out>/<name>.json."""
    question = (question or name).strip().split("\n\n")[0]
    print_safe(f"\n{question}\n")
    tables.show(rows)
    print_safe("\n" + "\n".join(f"SHOULD {line}" for line in should))
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    body = {"question": question, "command": ["python", *sys.argv], "rows": rows, "should": should, **more}
    path.write_text(json.dumps(plain(body), indent=1) + "\n", encoding="utf-8")
    print_safe(f"\nalso in {path}")
