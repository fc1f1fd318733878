"""One run: hands each stage its own settings and writes what comes back as events, checkpoints and pictures."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from safetensors import SafetensorError

from steer_heal import console, readings
from steer_heal.config import RunConfig
from steer_heal.evals.metrics import Condition
from steer_heal.events import EventLog, append_result, new_run_folder, of_stage
from steer_heal.files import ROOT
from steer_heal.lm import LM, load
from steer_heal.plot import plot
from steer_heal.records import Collected, EvalResult, Starved, Trait, UserError, derive_seed
from steer_heal.report import report
from steer_heal.stages.bake import Student
from steer_heal.stages.dose import collect
from steer_heal.stages.evaluate import evaluate, load_items
from steer_heal.stages.filter import score
from steer_heal.stages.generate import generate
from steer_heal.stages.heal import heal
from steer_heal.stages.iso_kl import iso_kl_dose
from steer_heal.stages.teacher_vec import cosine, student_vec, teacher_vec
from steer_heal.steering import Vector


def open_session(cfg: RunConfig, preset: str, trait: Trait) -> Session:
    """Loads the model, makes the run folder and writes run_start."""
    if cfg.n_threads:
        torch.set_num_threads(cfg.n_threads)
    console.start(cfg.quiet)
    lm = load(cfg.model, device=cfg.device, dtype=cfg.dtype, max_prompt_tokens=cfg.max_prompt_tokens)
    folder = new_run_folder(cfg.out, f"{preset}-{cfg.trait}-s{cfg.seed}")
    console.start(cfg.quiet, folder / "run.log")
    return Session(cfg, preset, trait, lm, folder)


class Session:
    """State of a running loop. Each method is one step of run.py and calls one stage."""

    def __init__(self, cfg: RunConfig, preset: str, trait: Trait, lm: LM, folder: Path) -> None:
        self.cfg, self.preset, self.trait, self.lm, self.folder = cfg, preset, trait, lm, folder
        self.student = Student(lm, cfg.heal)
        self.items = load_items(cfg.eval, trait)
        self.log = EventLog(folder)
        self.events: list[dict[str, Any]] = []
        self.base: EvalResult | None = None
        self.first_vector: Vector | None = None
        self.vector: Vector | None = None
        self.seconds: dict[str, float] = {}
        self.write(
            "run_start", None, folder=str(folder), config=asdict(cfg), preset=preset, seed=cfg.seed, trait=asdict(trait), versions=_versions(),
            git_commit=_git_commit(), command=["python", "-m", "steer_heal.run", *sys.argv[1:]],
        )

    def write(self, stage: str, round_: int | None, **fields: Any) -> None:
        event = self.log.write(stage, round_, **fields)
        self.events.append(event)
        console.show(event, self.events)

    def guard(self, loop: Callable[[Session], None]) -> int:
        """Runs the loop; a mendable error, Ctrl-C, no memory or no disk ends it with valid events and a word on what to do."""
        try:
            loop(self)
            return 0
        except UserError as error:
            self.write("run_end", None, error=str(error))
            print(f"error: {error}\nwhat was finished is in {self.folder}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            self.write("run_end", None, error="interrupted")
            print(f"interrupted; what was finished is in {self.folder}", file=sys.stderr)
            return 130
        except torch.OutOfMemoryError as error:
            self.log.write("run_end", None, error="out of memory")
            print(f"error: out of memory; lower --gen.batch-size, --eval.batch-size or --heal.batch-size ({error})", file=sys.stderr)
            return 1
        except (OSError, SafetensorError) as error:
            print(f"error: could not write to {self.folder}: {error}; free some space or give another --out", file=sys.stderr)
            return 1
        finally:
            self.log.close()

    def _timed(self, stage: str, work: Callable[[], Any]) -> Any:
        began = time.monotonic()
        try:
            return work()
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - began

    # --- the steps of a round ---------------------------------------------------------------------------------
    def measure(self, stage: str, r: int, *, system: str = "", vector: Vector | None = None, dose: float = 0.0) -> None:
        """One state of the model on all evals, against base."""
        system = system or self.trait.plain_system
        result = self._timed("evaluate", lambda: evaluate(
            self.student, "full", Condition(system, vector, dose), self.items, self.trait, self.cfg.eval, self.cfg.filter, self.cfg.seed, self.base
        ))
        if self.base is None:
            self.base = result
        if stage == "healed":
            self.write("adapter_gen", r, texts=result.texts)
        texts = {} if stage == "healed" else {"texts": result.texts}
        self.write(stage, r, metrics=result.metrics, items=result.items, dose=dose, **texts)
        if stage != "healed":  # the round's end draws it
            self.draw()

    def teacher_vec(self, r: int) -> Vector:
        def work() -> Vector:
            if self.first_vector is not None and self.cfg.steer.refresh == "once":
                return self.first_vector
            with self.student.gate("full") as lm:
                return teacher_vec(lm, self.trait, self.cfg.steer)

        vector = self.vector = self._timed("vector", work)
        self.first_vector = vector if self.first_vector is None else self.first_vector
        norms = {str(layer): direction.norm().item() for layer, direction in vector.directions.items()}
        self.write("vector", r, norms=norms, cosine_to_first=cosine(vector, self.first_vector))
        return vector

    def collect(self, r: int, vector: Vector | None) -> Collected:
        """Kept completions at the dose that survives; without a vector, the model's own unsteered text."""
        cfg, trait = self.cfg, self.trait
        system = trait.steered_system if vector is not None else trait.plain_system
        with console.progress(f"round {r}: writing", cfg.filter.max_attempts, cfg.quiet) as advance:
            def write(asks):
                with self.student.gate("full") as lm:
                    return generate(lm, asks, vector, system, trait.plain_system, cfg.gen.max_new_tokens, cfg.gen.batch_size, advance)

            def judge(completions):
                with self.student.gate("base") as lm:
                    return score(lm, completions, trait.narration, cfg.filter)

            name = "control" if vector is None else "gen"
            alphas = cfg.gen.alphas if vector is not None else (0.0,)
            prompts = trait.prompts[: cfg.gen.n_prompts]
            kappa = 1.0 if vector is None else self._timed("generate", lambda: self._known_kappa(r, vector))
            try:
                collected = self._timed(
                    "generate", lambda: collect(write, judge, prompts, alphas, cfg.dose, cfg.filter, (cfg.seed, r, name), kappa)
                )
            except Starved as starved:
                self._write_collected(r, name, starved.collected)
                raise
        self._write_collected(r, name, collected)
        return collected

    def _known_kappa(self, r: int, vector: Vector) -> float | None:
        """kappa where it does not depend on what survives the filter; None where it does."""
        cfg, trait = self.cfg, self.trait
        if cfg.dose.mode == "survival":
            return None
        if cfg.dose.mode == "fixed":
            return cfg.dose.kappa
        with self.student.gate("full") as lm:
            prompts = [lm.chat(prompt, trait.steered_system) for prompt in trait.prompts[: min(8, cfg.gen.n_prompts)]]
            dose, probes = iso_kl_dose(lm, vector, prompts, cfg.dose.kl_target, cfg.dose.kl_tokens, cfg.gen.batch_size)
        self.write("calibration", r, dose=dose, probes=probes)
        return dose / max(cfg.gen.alphas)

    def _write_collected(self, r: int, name: str, collected: Collected) -> None:
        """Every completion with its dose, scores and reasons; of the steered ones also how the dose was found."""
        if name == "gen":
            self.write("dose", r, mode=self.cfg.dose.mode, kappa=collected.kappa, probes=collected.probes)
        order = {id(row): i for i, row in enumerate(collected.kept)}
        rows = [
            {
                **asdict(row.completion), "scores": row.scores, "keep": row.kept, "train": id(row) in order, "train_order": order.get(id(row)), "failed": row.failed,
                "reasons": row.reasons,
            }
            for row in collected.scored
        ]
        self.write("gen" if name == "gen" else "control_gen", r, n_train=len(collected.kept), completions=rows)

    def top_dose(self, collected: Collected) -> float:
        """The highest effective dose that this round trains on."""
        return max(row.completion.dose for row in collected.kept)

    def heal(self, r: int, collected: Collected, stage: str = "heal") -> None:
        cfg = self.cfg.heal
        kept = [row.completion for row in collected.kept]
        n_steps = cfg.epochs * -(-len(kept) // cfg.batch_size)
        with console.progress(f"round {r}: healing", n_steps, self.cfg.quiet) as advance:
            def on_step(step):
                advance(1)
                if stage == "heal":
                    self.log.write("heal_step", r, **asdict(step))

            report = self._timed("heal", lambda: heal(self.student, kept, r, cfg, derive_seed(self.cfg.seed, r, stage), on_step))
        if stage == "heal":
            self.write(
                "heal", r, n_train=report.n_train, n_validation=report.n_validation, n_steps=len(report.steps), lam=report.lam,
                tau=report.tau,
                validation=report.validation, validation_prompts=report.validation_prompts,
                fired=report.fired, pressure=report.pressure,
            )

    def bake(self, r: int) -> None:
        own = self.student.bake()
        self._timed("bake", lambda: self.student.save(self.folder / "ckpt" / f"r{r}", own))

    def end_round(self, r: int) -> None:
        reads = readings.readings(self.events)
        base, steered, healed = (next(x for x in reversed(reads) if x.stage == stage) for stage in ("base", "steered", "healed"))
        metric = readings.nats_name(self.trait.target)
        student = self._timed("vector", lambda: student_vec(self.student, self.trait, self.cfg.steer))
        self.seconds["total"] = sum(self.seconds.values())
        self.write(
            "round", r, retain=readings.retain(healed, steered, base, metric), slope=readings.slope(healed, base, metric),
            cosine_student_teacher=cosine(student, self.vector), cosine_student_first=cosine(student, self.first_vector),
            checkpoint=f"ckpt/r{r}", seconds={k: round(v, 2) for k, v in self.seconds.items()},
        )
        self.seconds = {}
        self.draw()

    def draw(self) -> None:
        """The pictures and the page so far; a drawing that fails must not cost the run."""
        for name, drawing in (("trajectory.png", plot), ("report.html", report)):
            try:
                self._timed("draw", lambda: drawing(self.folder))
            except Exception as error:
                logger.warning(f"{name} was not drawn ({error}); `just plot {self.folder}` tries again")

    def run_control(self) -> None:
        """The same heal on the model's own unsteered text, read and then dropped."""
        collected = self.collect(-1, None)
        self.heal(-1, collected, stage="control")
        self.measure("control", -1)
        self.student.discard_round()
        self.seconds = {}

    def finish(self) -> None:
        """Table, verdict, picture, results.tsv; and the merged model where one was asked for."""
        line = readings.verdict(self.events)
        self.write("run_end", None, verdict=line, table=readings.table(self.events))
        self.draw()
        last = readings.table(self.events)[-1]
        append_result(self.cfg.out, {
            "run": self.folder.name, "arm": self.cfg.arm or self.preset, "preset": self.preset, "model": self.cfg.model, "trait": self.trait.name, "seed": self.cfg.seed,
            "n_rounds": self.cfg.n_rounds, "divergence": self.cfg.heal.divergence, "aggregate": self.cfg.heal.aggregate, "lam": self.cfg.heal.lam,
            "tau": self.cfg.heal.tau, "reference": self.cfg.heal.reference, "settings": self.cfg.fingerprint(), **last,
            "cosine_to_first": of_stage(self.events, "vector")[-1]["cosine_to_first"],
            "cosine_student_first": of_stage(self.events, "round")[-1]["cosine_student_first"],
            "wall_s": self.events[-1]["wall_s"], "verdict": line,
        })
        if self.cfg.export is not None:
            self.student.export(self.cfg.export)
        console.print_table(self.events)
        print(f"read {self.folder / 'report.html'} first; picture {self.folder / 'trajectory.png'}, everything else in {self.folder}")


def _versions() -> dict[str, str]:
    names = ("torch", "transformers", "peft", "tokenizers")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def _git_commit() -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5)
        return done.stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
