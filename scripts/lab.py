"""What the diagnostic scripts share: a preset's model with its trait and items, one round's parts, and one table."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import polars as pl
import torch

from steer_heal import console
from steer_heal.config import PRESETS, RunConfig, check, from_dict
from steer_heal.evals.metrics import Condition
from steer_heal.eval_cache import EvalCache
from steer_heal.events import jsonable, of_stage, read_events, reading
from steer_heal.lm import load
from steer_heal.readings import nats_name
from steer_heal.records import Collected, Completion, EvalResult, HealStep, UserError, derive_seed
from steer_heal.stages.bake import Gate, Student, attach_saved
from steer_heal.stages.cfg import DoseCfg, FilterCfg, HealCfg
from steer_heal.stages.dose import collect
from steer_heal.stages.evaluate import load_items
from steer_heal.stages.filter import score
from steer_heal.stages.generate import generate
from steer_heal.stages.heal import heal
from steer_heal.stages.teacher_vec import teacher_vec
from steer_heal.steering import Vector
from steer_heal.terminal import complain, say


@dataclass(frozen=True, kw_only=True)
class LabCfg:
    """Which model a question is asked of."""

    preset: Literal["toy", "gemma", "fast-dev"] = "toy"
    """Settings of `python -m steer_heal.run <preset>`."""
    model: str | None = None
    """A folder or hub id in place of the preset's model."""
    trait: str | None = None
    """In place of the preset's trait."""
    seed: int = 42
    n_threads: int | None = None
    """CPU threads in place of the preset's; 0 leaves torch's choice."""
    out: Path = Path("out/diag")
    """Folder of the JSON file that each table is also written to."""

    def run_config(self) -> RunConfig:
        _, preset = PRESETS[self.preset]
        given = {"model": self.model, "trait": self.trait, "seed": self.seed, "n_threads": self.n_threads}
        return replace(preset, **{name: value for name, value in given.items() if value is not None})


class Lab:
    """One model and its trait; every reading on the same items, against the same base."""

    def __init__(self, cfg: RunConfig) -> None:
        self.cfg, self.trait = cfg, check(cfg)
        if cfg.n_threads:
            torch.set_num_threads(cfg.n_threads)
        console.start(quiet=True)
        self.lm = load(
            cfg.model,
            device=cfg.device,
            dtype=cfg.dtype,
            max_prompt_tokens=cfg.max_prompt_tokens,
            quantize=cfg.quantize,
            fixed_addresses=cfg.gen.graphs,
        )
        self.items = load_items(cfg.eval, self.trait)
        self.student = Student(self.lm, cfg.heal)

    @property
    def target(self) -> str:
        """The metric of the trait's foundation."""
        return nats_name(self.trait.target)

    @cached_property
    def vector(self) -> Vector:
        return teacher_vec(self.lm, self.trait, self.cfg.steer)

    @cached_property
    def base(self) -> EvalResult:
        return self._evaluate("base", Condition(self.trait.plain_system), None)

    def read(
        self, which: Gate = "full", system: str = "", vector: Vector | None = None, dose: float = 0.0
    ) -> EvalResult:
        """All metrics of one state, with intervals against base."""
        return self._evaluate(which, Condition(system or self.trait.plain_system, vector, dose), self.base)

    def _evaluate(self, which: Gate, condition: Condition, base: EvalResult | None) -> EvalResult:
        cache = EvalCache(self.cfg.out / ".cache" / "eval", self.student, self.items, self.trait)
        return cache(which, condition, self.cfg.eval, self.cfg.filter, self.cfg.seed, base)

    def row(self, state: str, result: EvalResult) -> dict[str, Any]:
        """The readings that every table shows: the target, its shift with interval, and coherence three ways."""
        m, base = result.metrics, self.base.metrics
        row = {
            "state": state,
            self.target: m[self.target],
            "shift": m[self.target] - base[self.target],
            "lo": m.get(f"{self.target}_lo"),
            "hi": m.get(f"{self.target}_hi"),
            "log_odds": m["persona_log_odds"],
            "coherence": m["coherence"],
            "text_ppl": m["text_ppl_median"],
            "degenerate": m["degenerate_frac"],
            "kl_base": m["kl_base"],
        }
        return row | ({"oracle": m["oracle"]} if "oracle" in m else {})

    def collect(
        self,
        dose: DoseCfg,
        keep: FilterCfg,
        *,
        kappa: float | None = None,
        alphas: Sequence[float] | None = None,
        unsteered: bool = False,
    ) -> Collected:
        """One round's completions of the untouched model: steered, or its own unsteered text."""
        cfg, trait = self.cfg, self.trait
        vector, system = (None, trait.plain_system) if unsteered else (self.vector, trait.steered_system)

        def write(asks):
            return generate(
                self.lm, asks, vector, system, trait.plain_system, cfg.gen.max_new_tokens, cfg.gen.batch_size
            )

        with self.student.gate("base"):
            return collect(
                write,
                lambda rows: score(self.lm, rows, trait.narration, keep),
                trait.prompts[: cfg.gen.n_prompts],
                (0.0,) if unsteered else alphas or cfg.gen.alphas,
                dose,
                keep,
                (cfg.seed, 0, "control" if unsteered else "gen"),
                1.0 if unsteered else kappa,
            )

    def healed(
        self, kept: Sequence[Completion], cfg: HealCfg, round_: int = 0, n_steps: int | None = None
    ) -> tuple[EvalResult, list[HealStep]]:
        """Heals on `kept` from where the student stands, reads the result and drops it again.

        `n_steps` stops early, on the same schedule.
        """
        self.student.cfg, steps = cfg, []

        def on_step(step: HealStep) -> None:
            steps.append(step)
            if len(steps) == n_steps:
                raise _Enough

        try:
            with suppress(_Enough):
                heal(self.student, kept, round_, cfg, derive_seed(self.cfg.seed, round_, "heal"), on_step)
            return self.read(), steps
        finally:
            self.student.discard_round()


class _Enough(Exception):
    """Ends a heal early."""


@dataclass(frozen=True)
class Replay:
    """A finished run's round: a lab whose student stands where it stood before that round, and what it trained on."""

    lab: Lab
    kept: tuple[Completion, ...]


def replay(folder: Path, round_: int) -> Replay:
    """Loads what round `round_` of a run healed, at which learning rate, and the history of the rounds before it."""
    events = read_events(folder)
    gen = next((e for e in of_stage(events, "gen") if e["round"] == round_), None)
    if gen is None:
        raise UserError(
            f"{folder} has no text of round {round_}: its rounds are {[e['round'] for e in of_stage(events, 'gen')]}"
        )
    with reading(folder):
        cfg = from_dict(RunConfig, events[0]["config"])
        trained = sorted((row for row in gen["completions"] if row["train"]), key=lambda row: row["train_order"])
        kept = tuple(completion(row) for row in trained)
        lr = next((e["lr"] for e in of_stage(events, "heal") if e["round"] == round_), cfg.heal.lr)
    lab = Lab(replace(cfg, heal=replace(cfg.heal, lr=lr)))
    if round_ > 0:
        lab.student = attach_saved(lab.lm, folder / "ckpt" / f"r{round_ - 1}")
    return Replay(lab, kept)


def completion(row: Mapping[str, Any]) -> Completion:
    """The record of one row of a gen event."""
    return from_dict(Completion, {name: row[name] for name in Completion.__dataclass_fields__})


def show(
    question: str, rows: Sequence[Mapping[str, Any]], should: Sequence[str], lab: LabCfg | Path, name: str, **extra: Any
) -> Path:
    """Prints the question, one table and the SHOULD lines; writes the same as JSON to <out>/<name>.json."""
    out = lab.out if isinstance(lab, LabCfg) else lab
    say(f"\n{question}\n")
    with pl.Config(
        tbl_rows=-1,
        tbl_cols=-1,
        tbl_width_chars=200,
        tbl_hide_dataframe_shape=True,
        tbl_hide_column_data_types=True,
        float_precision=3,
        tbl_formatting="ASCII_MARKDOWN",
        fmt_str_lengths=200,
    ):
        say(pl.DataFrame(list(rows), infer_schema_length=None))
    say("\n" + "\n".join(f"SHOULD {line}" for line in should))
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    command = ["python", *sys.argv]
    body, _ = jsonable({"question": question, "command": command, "rows": list(rows), "should": list(should), **extra})
    path.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    say(f"\nalso in {path}")
    return path


def cli(main: Callable[..., None]) -> int:
    """Runs a script's main with arguments from the command line; a mendable error ends it with one line."""
    import tyro

    try:
        tyro.cli(main, description=sys.modules[main.__module__].__doc__)
        return 0
    except (UserError, OSError, ValueError) as error:
        complain(error)
        return 1
