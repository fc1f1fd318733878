"""What the questions and scripts share: a preset's model with its inputs, the steps of one round on it, one table."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from transformers import AutoModelForCausalLM, PreTrainedConfig

from steer_heal import round as steps
from steer_heal.check import check
from steer_heal.errors import UserError, print_error, print_safe, validated
from steer_heal.evals import metrics_of
from steer_heal.model.lm import LM, load
from steer_heal.model.steering import Condition, Vector
from steer_heal.model.student import Student
from steer_heal.presets import PRESETS
from steer_heal.records import Collected, Completion, EvalResult, HealStep, Metric, Scored
from steer_heal.report import console
from steer_heal.report.measurements import Measurement, health_of, shift, within
from steer_heal.runs.codec import collected_from
from steer_heal.runs.events import current, jsonable, of_stage, read_events, schema_errors
from steer_heal.settings import HealCfg, RunConfig
from steer_heal.stages.heal import HealState


@dataclass(frozen=True, kw_only=True)
class LabCfg:
    """Which model a question is asked of."""

    preset: Literal["toy", "toy-distil", "smol", "smol-distil", "gemma", "fast-dev"] = "toy"
    """Settings of `steer-heal run <preset>`."""
    model: str | None = None
    """A folder or hub id in place of the preset's model."""
    trait: str | None = None
    """In place of the preset's trait."""
    seed: int = 42
    n_threads: int | None = None
    """CPU threads in place of the preset's; 0 leaves torch's choice."""
    temperature: float | None = None
    """Of writing, in place of the preset's."""
    top_p: float | None = None
    """Of writing, in place of the preset's."""
    out: Path = Path("out/diag")
    """Folder of the JSON file that each table is also written to."""

    def run_config(self) -> RunConfig:
        given = {name: value for name, value in vars(self).items() if name != "preset"}
        return replace(PRESETS[self.preset][1], **{name: value for name, value in given.items() if value is not None})


LabFlags = Annotated[LabCfg, tyro.conf.arg(name="")]
"""Its fields as flags of a script."""


class Lab:
    """One model and its inputs. Every state is measured on the same items, against the same base."""

    def __init__(self, cfg: RunConfig) -> None:
        self.cfg, self.inputs = cfg, check(cfg)
        self.trait = self.inputs.trait
        if cfg.n_threads:
            torch.set_num_threads(cfg.n_threads)
        self.lm = steps.load_model(cfg)
        self.student = Student(self.lm, cfg.adapter)
        self.metrics = {metric.name: metric for metric in metrics_of(cfg.eval.evals)}
        self.target = self.metrics[self.trait.target]

    @cached_property
    def vector(self) -> Vector:
        """Of the student as it is when this is first asked for."""
        return steps.extract(self.student, self.inputs, self.cfg)

    @cached_property
    def base(self) -> EvalResult:
        return steps.measure(self.student, self.inputs, self.cfg, adapters="base")

    def read(self, condition: Condition | None = None) -> EvalResult:
        """All metrics of the student under a condition, with intervals against base."""
        return steps.measure(self.student, self.inputs, self.cfg, self.base, condition)

    def shift(self, result: EvalResult, metric: Metric | None = None) -> float:
        """Of the target, or of another metric, from base."""
        moved = shift(measurement(result), measurement(self.base), metric or self.target)
        if moved is None:
            raise UserError(
                f"no item has a value of {(metric or self.target).name}: the model cannot be measured by it"
            )
        return moved

    def row(self, state: str, result: EvalResult) -> dict[str, Any]:
        """The columns of every table: the target, its shift from base with interval, and the shown metrics."""
        name, found = self.target.name, result.metrics
        shown = {other: found[other] for other, metric in self.metrics.items() if metric.shown and other != name}
        ends = {end: found.get(f"{name}_{end}") for end in ("lo", "hi")}
        return {"state": state, name: found[name], "shift": self.shift(result), **ends, **shown}

    def is_whole(self, row: Mapping[str, Any]) -> bool:
        """Whether every health metric of a row is known, and at its `good` limit or better."""
        health = [(metric, row[metric.name]) for metric in health_of(self.metrics.values())]
        return all(value is not None and within(metric, value, metric.good or 0.0) for metric, value in health)

    def collect(
        self, kappa: float | None = None, *, unsteered: bool = False, alphas: Sequence[float] | None = None, **keep: Any
    ) -> Collected:
        """Completions of round 0, at a given kappa or at the one that survives. `keep`: fields of FilterCfg."""
        cfg = self.cfg
        dose = cfg.dose if kappa is None and not unsteered else replace(cfg.dose, mode="fixed", kappa=kappa or 1.0)
        gen = replace(cfg.gen, alphas=tuple(alphas or cfg.gen.alphas))
        cfg = replace(cfg, gen=gen, dose=dose, filter=replace(cfg.filter, **keep))
        return steps.collect(self.student, None if unsteered else self.vector, self.inputs, cfg, 0)

    def healed(
        self, collected: Collected, heal: HealCfg, r: int = 0, n_steps: int | None = None
    ) -> tuple[EvalResult, list[HealStep]]:
        """Heals from where the student stands, measures the result and drops it again.

        `n_steps` stops early, on the same schedule.
        """
        done: list[HealStep] = []

        def on_step(state: HealState) -> None:
            done.append(state.steps[-1])
            if len(done) == n_steps:
                raise _Enough

        try:
            with suppress(_Enough):
                vector = self.vector if heal.target == "distribution" else None
                steps.heal(self.student, collected, self.inputs, replace(self.cfg, heal=heal), r, vector, on_step)
            return self.read(), done
        finally:
            self.student.discard_round()


class _Enough(Exception):
    """Ends a heal early."""


def measurement(result: EvalResult) -> Measurement:
    """A result as the functions of steer_heal.report.measurements take it."""
    return Measurement("", -1, result.metrics)


def kept(completions: Sequence[Completion]) -> Collected:
    """Completions that train as they are, without a filter."""
    rows = tuple(Scored(completion, {}, (), ()) for completion in completions)
    return Collected(rows, rows, 1.0, (), 0.0)


def replay(folder: Path, r: int) -> tuple[Lab, Collected]:
    """(a lab whose student stands where a run's stood before round r, what it trained on). The learning rate is that
    of the round's heal."""
    events = current(read_events(folder))
    mine = {e["stage"]: e for e in events if e["round"] == r}
    if "gen" not in mine:
        raise UserError(
            f"{folder} has no text of round {r}: its rounds are {[e['round'] for e in of_stage(events, 'gen')]}"
        )
    with schema_errors(folder):
        cfg = validated(RunConfig, events[0]["config"], f"{folder}/events.jsonl config")
        collected = collected_from(mine["gen"], mine["dose"])
        lr = mine.get("heal", {"lr": cfg.heal.lr})["lr"]
    lab = Lab(replace(cfg, out=folder.resolve().parent, export=None, heal=replace(cfg.heal, lr=lr)))
    if r > 0:
        lab.student.restore(folder / "ckpt" / f"r{r - 1}", r)
    return lab, collected


def random_lm(
    config: PreTrainedConfig, seed: int, device: str | torch.device = "cpu", dtype: Any = torch.float32
) -> LM:
    """Random weights of any shape, behind the tokenizer of the toy model."""
    torch.manual_seed(seed)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.name_or_path = "random"
    lm = load("tiny-random", device="cpu")
    return replace(lm, model=model.eval().requires_grad_(False), name="random", max_prompt_tokens=4096)


def seconds_of(work: Callable[[], object]) -> float:
    """Wall-clock seconds of a piece of work."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


# --- tables ------------------------------------------------------------------------------------------------------
def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table. A column is there where any row has it; what a row lacks, or is None, is empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = lambda value: "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
    table = [columns, *([text(row.get(name)) for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [" | ".join(cell.ljust(n) for cell, n in zip(line, widths, strict=True)) for line in table]
    lines.insert(1, " | ".join("-" * n for n in widths))
    return "\n".join(f"| {line} |" for line in lines)


def mean_sd(values: Sequence[float]) -> str:
    """`mean ± sd`, without sd of one value; empty of none."""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}" if values else ""


def show(
    question: str | None, rows: Sequence[Mapping[str, Any]], should: Sequence[str], out: Path, name: str, **extra: Any
) -> None:
    """Prints the question, one table and the SHOULD lines; writes the same as JSON to <out>/<name>.json."""
    question = (question or name).strip().split("\n\n")[0]
    print_safe(f"\n{question}\n\n{markdown(rows)}\n\n" + "\n".join(f"SHOULD {line}" for line in should))
    out.mkdir(parents=True, exist_ok=True)
    path, command = out / f"{name}.json", ["python", *sys.argv]
    body, _ = jsonable({"question": question, "command": command, "rows": list(rows), "should": list(should), **extra})
    path.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    print_safe(f"\nalso in {path}")


def cli(main: Callable[..., object], argv: Sequence[str] | None = None, program: str | None = None) -> int:
    """Runs a main with arguments from the command line. A user error ends it with one line and status 1."""
    console.start(quiet=True)
    try:
        tyro.cli(main, args=argv, prog=program, description=sys.modules[main.__module__].__doc__)
        return 0
    except (UserError, OSError, ValueError) as error:
        print_error(error)
        return 1
