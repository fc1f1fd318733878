"""One run: hands each stage its own settings and writes what comes back as events, checkpoints and pictures."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from shutil import rmtree
from typing import IO, Any

import torch
from loguru import logger

from steer_heal import console, provenance, readings
from steer_heal.config import RunConfig, inputs
from steer_heal.evals.metrics import Condition
from steer_heal.eval_cache import EvalCache
from steer_heal.events import EventLog, append_result, git_commit, new_run_folder, versions
from steer_heal.files import beside, checksums, sync_folder, verify
from steer_heal.lm import LM, load
from steer_heal.plot import plot
from steer_heal.records import Collected, DoseProbe, EvalResult, HealReport, NotFinite, Starved, Trait, UserError, derive_seed
from steer_heal.report import report
from steer_heal.resume import Past, hold, partial, reopen, run_start
from steer_heal.stages.bake import Student
from steer_heal.stages.cfg import HealCfg
from steer_heal.stages.dose import choose, collect, from_row, to_rows
from steer_heal.stages.evaluate import from_event, load_items
from steer_heal.stages.filter import score
from steer_heal.stages.generate import generate
from steer_heal.stages.heal import heal
from steer_heal.stages.iso_kl import iso_kl_dose
from steer_heal.stages.partial import HealFile, TokenTape, steps_saved
from steer_heal.stages.teacher_vec import cosine, student_vec, teacher_vec
from steer_heal.steering import Vector, load_vector
from steer_heal.terminal import say


def open_session(cfg: RunConfig, preset: str, trait: Trait) -> Session:
    """Loads the model; makes the run folder and writes run_start, or opens the folder that is resumed."""
    if cfg.n_threads:
        torch.set_num_threads(cfg.n_threads)
    console.start(cfg.quiet)
    lock = None if cfg.resume is None else hold(cfg.resume)
    lm = load(
        cfg.model, device=cfg.device, dtype=cfg.dtype, max_prompt_tokens=cfg.max_prompt_tokens, quantize=cfg.quantize, fixed_addresses=cfg.gen.graphs
    )
    weights = provenance.weights_digest(lm.model)
    if cfg.resume is not None:
        provenance.same_weights(run_start(cfg.resume), weights, cfg.resume)
    folder = cfg.resume or new_run_folder(cfg.out, f"{preset}-{cfg.trait}-s{cfg.seed}")
    lock = lock or hold(folder)
    console.start(cfg.quiet, folder / "run.log")
    past = Past([]) if cfg.resume is None else reopen(folder, steps_saved)
    return Session(cfg, preset, trait, lm, weights, folder, past, lock)


class Session:
    """State of a running loop. Each method is one step of run.py and calls one stage, unless the past has its event."""

    save_every_s = 60.0
    """How often a heal puts down how far it has come."""

    def __init__(
        self, cfg: RunConfig, preset: str, trait: Trait, lm: LM, weights: dict[str, str], folder: Path, past: Past, lock: IO[str]
    ) -> None:
        self.cfg, self.preset, self.trait, self.lm, self.folder, self.past, self.lock = cfg, preset, trait, lm, folder, past, lock
        self.student = Student(lm, cfg.heal)
        self.cache = EvalCache(cfg.out / ".cache" / "eval", self.student, load_items(cfg.eval, trait), trait)
        self.log = EventLog(folder, past.before_s)
        self.events: list[dict[str, Any]] = []
        self.base: EvalResult | None = None
        self.first_vector: Vector | None = None
        self.vector: Vector | None = None
        self.seconds: dict[str, float] = {}
        if self.recall("run_start", None) is not None:
            logger.info(f"goes on with {folder} after {past.last}")
            return
        self.write(
            "run_start", None, folder=str(folder), config=asdict(cfg), preset=preset, seed=cfg.seed, trait=asdict(trait), versions=versions(),
            git_commit=git_commit(), weights=weights, inputs=inputs(cfg), command=["python", "-m", "steer_heal.run", *sys.argv[1:]],
        )

    def write(self, stage: str, round_: int | None, **fields: Any) -> None:
        event = self.log.write(stage, round_, **fields)
        self.events.append(event)
        console.show(event, self.events)

    def recall(self, stage: str, round_: int | None) -> dict[str, Any] | None:
        """The event of a step that a resumed run has behind it; None: the step is to be done."""
        event = self.past.take(stage, round_)
        if event is not None:
            self.events.append(event)
        return event

    def _timed(self, stage: str, work: Callable[[], Any]) -> Any:
        began, self.lm.rows_at_once = time.monotonic(), 0
        try:
            return work()
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - began
            logger.debug(f"{stage}: {time.monotonic() - began:.1f} s, at most {self.lm.rows_at_once} rows decoded at once")

    # --- the steps of a round ---------------------------------------------------------------------------------
    def measure(self, stage: str, r: int, *, system: str = "", vector: Vector | None = None, dose: float = 0.0) -> None:
        """One state of the model on all evals, against base."""
        past = [self.recall(each, r) for each in (("adapter_gen", "healed") if stage == "healed" else (stage,))][-1]
        if past is not None:
            self.base = self.base or from_event(past)
            return
        system = system or self.trait.plain_system
        which, condition = "base" if stage in ("base", "prompted") else "full", Condition(system, vector, dose)  # neither has an adapter yet
        result = self._timed("evaluate", lambda: self.cache(which, condition, self.cfg.eval, self.cfg.filter, self.cfg.seed, self.base))
        if self.base is None:
            self.base = result
        if stage == "healed":
            self.write("adapter_gen", r, texts=result.texts)
        texts = {} if stage == "healed" else {"texts": result.texts}
        self.write(stage, r, metrics=result.metrics, items=result.items, dose=dose, **texts)
        if stage != "healed":  # the round's end draws it
            self.draw()

    def teacher_vec(self, r: int) -> Vector:
        past, path = self.recall("vector", r), self.folder / "vectors" / f"r{r}.safetensors"
        if past is not None:
            verify(self.folder, past["files"], "restore the file, or start a new run")
            vector = load_vector(path)
        elif self.first_vector is not None and self.cfg.steer.refresh == "once":
            vector = self.first_vector
        else:
            with self.student.gate("full") as lm:
                vector = self._timed("vector", lambda: teacher_vec(lm, self.trait, self.cfg.steer))
        self.vector, self.first_vector = vector, self.first_vector or vector
        if past is None:
            with beside(path) as part:
                vector.save(part)
            norms = {str(layer): direction.norm().item() for layer, direction in vector.directions.items()}
            self.write("vector", r, norms=norms, cosine_to_first=cosine(vector, self.first_vector), files=checksums(self.folder, path))
        return vector

    def collect(self, r: int, vector: Vector | None) -> Collected:
        """Kept completions at the dose that survives; without a vector, the model's own unsteered text."""
        cfg, trait, stage = self.cfg, self.trait, "control_gen" if vector is None else "gen"
        alphas = cfg.gen.alphas if vector is not None else (0.0,)
        kappa = 1.0 if vector is None else self._timed("generate", lambda: self._known_kappa(r, vector))
        if (past := self._recall_collected(r, stage, alphas)) is not None:
            return past
        system = trait.steered_system if vector is not None else trait.plain_system
        saved = partial(self.folder, stage, r)
        with console.progress(f"round {r}: writing", cfg.filter.max_attempts, cfg.quiet) as advance, closing(TokenTape(saved)) as tape:
            def write(asks):
                with self.student.gate("full") as lm:
                    return generate(lm, asks, vector, system, trait.plain_system, cfg.gen.max_new_tokens, cfg.gen.batch_size, advance, tape)

            def judge(completions):
                with self.student.gate("base") as lm:
                    return score(lm, completions, trait.narration, cfg.filter)

            prompts, seed = trait.prompts[: cfg.gen.n_prompts], (cfg.seed, r, "control" if vector is None else "gen")
            try:
                collected = self._timed("generate", lambda: collect(write, judge, prompts, alphas, cfg.dose, cfg.filter, seed, kappa))
            except Starved as starved:
                self._write_collected(r, stage, starved.collected)
                raise
        self._write_collected(r, stage, collected)
        saved.unlink()
        return collected

    def _recall_collected(self, r: int, stage: str, alphas: Sequence[float]) -> Collected | None:
        dose = self.recall("dose", r) if stage == "gen" else {"kappa": 1.0, "probes": []}
        if (past := self.recall(stage, r)) is None:
            return None
        probes = [DoseProbe(**probe) for probe in dose["probes"]]
        return choose([from_row(row) for row in past["completions"]], probes, dose["kappa"], alphas, self.cfg.dose, self.cfg.filter)

    def _known_kappa(self, r: int, vector: Vector) -> float | None:
        """kappa where it does not depend on what survives the filter; None where it does."""
        cfg, trait = self.cfg, self.trait
        if cfg.dose.mode == "survival":
            return None
        if cfg.dose.mode == "fixed":
            return cfg.dose.kappa
        if (past := self.recall("calibration", r)) is not None:
            return past["dose"] / max(cfg.gen.alphas)
        with self.student.gate("full") as lm:
            prompts = [lm.chat(prompt, trait.steered_system) for prompt in trait.prompts[: min(8, cfg.gen.n_prompts)]]
            dose, probes = iso_kl_dose(lm, vector, prompts, cfg.dose.kl_target, cfg.dose.kl_tokens, cfg.gen.batch_size)
        self.write("calibration", r, dose=dose, probes=probes)
        return dose / max(cfg.gen.alphas)

    def _write_collected(self, r: int, stage: str, collected: Collected) -> None:
        """Every completion with its dose, scores and reasons; of the steered ones also how the dose was found."""
        if stage == "gen":
            self.write("dose", r, mode=self.cfg.dose.mode, kappa=collected.kappa, probes=collected.probes)
        self.write(stage, r, n_train=len(collected.kept), completions=to_rows(collected))

    def top_dose(self, collected: Collected) -> float:
        """The highest effective dose that this round trains on."""
        return max(row.completion.dose for row in collected.kept)

    def heal(self, r: int, collected: Collected, stage: str = "heal") -> HealReport | None:
        """None where a resumed run has this heal behind it. A loss that is not finite costs half the learning rate, once."""
        retried = self.recall("heal_retry", r) if self.past.holds("heal_retry", r) else None
        if self.past.holds(stage, r):
            return None
        cfg = self.cfg.heal
        if retried is None:
            try:
                return self._heal(r, collected, stage, cfg)
            except NotFinite as bad:
                partial(self.folder, stage, r).unlink(missing_ok=True)
                sync_folder(self.folder / "partial")  # once the event is there, the second attempt must not meet the first one's file
                self.student.discard_round()
                self.write("heal_retry", r, step=bad.step, prompt_index=bad.prompt_index, text=bad.text, lr=cfg.lr / 2, error=str(bad))
        try:
            return self._heal(r, collected, stage, replace(cfg, lr=cfg.lr / 2))
        except NotFinite as bad:
            whole = f"ckpt/r{r - 1} holds the rounds before it" if r > 0 else "no round was healed before it"
            raise UserError(f"{bad}; this was the second attempt, at half the learning rate; {whole}") from None

    def _heal(self, r: int, collected: Collected, stage: str, cfg: HealCfg) -> HealReport:
        saved = HealFile(partial(self.folder, stage, r), self.save_every_s)
        kept = [row.completion for row in collected.kept]
        n_steps = cfg.epochs * -(-len(kept) // cfg.batch_size)
        with console.progress(f"round {r}: healing", n_steps, self.cfg.quiet) as advance:
            def on_step(step):
                advance(1)
                if stage == "heal":
                    self.log.write("heal_step", r, **asdict(step))

            return self._timed("heal", lambda: heal(self.student, kept, r, cfg, derive_seed(self.cfg.seed, r, stage), on_step, saved))

    def bake(self, r: int, report: HealReport | None) -> None:
        """The heal counts as done once its checkpoint is on disk: only then is its event written."""
        folder, past = self.folder / "ckpt" / f"r{r}", self.recall("heal", r)
        if past is not None:
            if r == self.past.last_heal:
                verify(self.folder, past["files"], f"restore the file, or delete {folder} to have round {r} healed again")
                self.student.restore(folder, r + 1)
            return
        own = self.student.bake()
        self._timed("bake", lambda: self.student.save(folder, own))
        self.write(
            "heal", r, n_train=report.n_train, n_validation=report.n_validation, n_steps=len(report.steps), lam=report.lam, tau=report.tau,
            lr=report.lr, n_retries=sum((e["stage"], e["round"]) == ("heal_retry", r) for e in self.events), validation=report.validation, validation_prompts=report.validation_prompts, fired=report.fired,
            pressure=report.pressure, files=checksums(self.folder, *folder.iterdir()),
        )
        partial(self.folder, "heal", r).unlink(missing_ok=True)

    def end_round(self, r: int) -> None:
        if self.recall("round", r) is not None:
            return
        reads = readings.readings(self.events)
        base, steered, healed = (next(x for x in reversed(reads) if x.stage == stage) for stage in ("base", "steered", "healed"))
        metric = readings.nats_name(self.trait.target)
        student = self._timed("vector", lambda: student_vec(self.student, self.trait, self.cfg.steer))
        self.seconds["total"] = sum(self.seconds.values())
        self.write(
            "round", r, retain=readings.retain(healed, steered, base, metric), slope=readings.slope(healed, base, metric),
            cosine_student_teacher=cosine(student, self.vector), cosine_student_first=cosine(student, self.first_vector),
            checkpoint=f"ckpt/r{r}", provenance=provenance.of_round(self.events, r), seconds={k: round(v, 2) for k, v in self.seconds.items()},
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
        partial(self.folder, "control", -1).unlink(missing_ok=True)
        self.student.discard_round()
        self.seconds = {}

    def finish(self) -> None:
        """Table, verdict, picture, results.tsv; and the merged model where one was asked for."""
        line = readings.verdict(self.events)
        if self.recall("run_end", None) is None:
            self.write("run_end", None, verdict=line, table=readings.table(self.events))
        self.draw()
        if self.cfg.export is not None:
            self.student.export(self.cfg.export)
        append_result(self.cfg.out, {"run": self.folder.resolve().name, "arm": self.cfg.arm or self.preset, "settings": self.cfg.fingerprint(), **readings.result_row(self.events)})
        rmtree(self.folder / "partial", ignore_errors=True)
        console.print_table(self.events)
        say(f"read {self.folder / 'report.html'} first; picture {self.folder / 'trajectory.png'}, everything else in {self.folder}")
