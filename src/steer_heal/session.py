"""One run: records each step of round.py as an event, or replays it from the events of a run that was stopped."""

from __future__ import annotations

import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from shutil import rmtree
from typing import IO, Any, TypeVar

import torch
from loguru import logger
from safetensors import SafetensorError

from steer_heal import report
from steer_heal import round as steps
from steer_heal.check import check_export
from steer_heal.errors import UserError, print_safe
from steer_heal.evals import metrics_of
from steer_heal.evals.base import from_event
from steer_heal.inputs import Inputs
from steer_heal.model.lm import LM, weights_digest
from steer_heal.model.steering import Vector, load_vector
from steer_heal.model.student import Student
from steer_heal.records import (
    Calibration,
    Collected,
    Completion,
    DoseProbe,
    EvalResult,
    HealReport,
    KlProbe,
    NotFinite,
    Scored,
    Starved,
)
from steer_heal.report import console, measurements
from steer_heal.runs.checkpoint import WrittenTexts, load_heal, save_heal
from steer_heal.runs.events import (
    Event,
    EventLog,
    append_result,
    git_commit,
    last_hash,
    new_run_folder,
    read_events,
    versions,
)
from steer_heal.runs.resume import partial_path, run_start, same_weights, truncate_events
from steer_heal.runs.signals import handled
from steer_heal.runs.storage import atomic_folder, atomic_write, checksums, damaged_file, lock_run, sync_folder
from steer_heal.settings import HealCfg, RunConfig
from steer_heal.stages.filter import GATES
from steer_heal.stages.heal import HealState
from steer_heal.stages.vector import cosine

Result = TypeVar("Result")


def open_session(cfg: RunConfig, preset: str, inputs: Inputs, folder: Path | None = None) -> Session:
    """Loads the model; makes a run folder and writes run_start, or opens the `folder` of a run that was stopped."""
    if cfg.n_threads:
        torch.set_num_threads(cfg.n_threads)
    console.start(cfg.quiet)
    lock = None if folder is None else lock_run(folder)
    lm = steps.load_model(cfg)
    weights = weights_digest(lm.model)
    past: list[Event] = []
    if folder is not None:
        same_weights(run_start(folder), weights, folder)
        past = truncate_events(folder)
    else:
        folder = new_run_folder(cfg.out, f"{preset}-{cfg.trait}-s{cfg.seed}")
    lock = lock or lock_run(folder)
    console.start(cfg.quiet, folder / "run.log")
    session = Session(cfg, inputs, lm, folder, past, lock)
    if past:
        logger.info(f"continues {folder} after {past[-1]['stage']} of round {past[-1]['round']}")
        return session
    session.write(
        "run_start",
        None,
        folder=str(folder),
        config=asdict(cfg),
        preset=preset,
        seed=cfg.seed,
        trait=asdict(inputs.trait),
        metrics=metrics_of(cfg.eval.evals),
        gates=_gates(cfg),
        versions=versions(),
        git_commit=git_commit(),
        weights=weights,
        inputs=dict(inputs.sha256),
        command=["python", "-m", "steer_heal.run", *sys.argv[1:]],
    )
    return session


def _gates(cfg: RunConfig) -> dict[str, dict[str, Any]]:
    """What readers of the events need to know of each gate."""
    return {
        name: {
            "measures": gate.measures,
            "limit": gate.limit_in(cfg.filter),
            "at_least": gate.at_least,
            "broken": gate.broken,
            "on": name in cfg.filter.gates,
        }
        for name, gate in GATES.items()
    }


class Session:
    """The state of a running loop. Each method is one step of run.py."""

    save_every_s = 60.0
    """Seconds between checkpoints of a running heal."""

    def __init__(
        self, cfg: RunConfig, inputs: Inputs, lm: LM, folder: Path, past: Sequence[Event], lock: IO[str]
    ) -> None:
        self.cfg, self.inputs, self.folder, self.lock = cfg, inputs, folder, lock
        self.student = Student(lm, cfg.adapter)
        self.metrics = metrics_of(cfg.eval.evals)
        self.log = EventLog(folder, past[-1]["wall_s"] if past else 0.0)
        self.events = [event for event in past if event["stage"] != "heal_step"]
        self.past = {(event["stage"], event["round"]): event for event in self.events}
        self.base: EvalResult | None = None
        self.vectors: dict[int, Vector] = {}
        self.seconds: dict[str, float] = {}

    # --- one step: compute it and write its event, or load it from the event ---------------------------------------
    def step(
        self,
        stage: str,
        r: int | None,
        compute: Callable[[], Result],
        fields: Callable[[Result], dict[str, Any]],
        load: Callable[[Event], Result],
    ) -> Result:
        """`load` of the event that a stopped run left, else `compute`, whose result is written as `fields`."""
        if (event := self.past.get((stage, r))) is not None:
            return load(event)
        began = time.monotonic()
        result = compute()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - began
        logger.debug(f"{stage}: {time.monotonic() - began:.1f} s")
        self.write(stage, r, **fields(result))
        return result

    def write(self, stage: str, r: int | None, **fields: Any) -> None:
        event = self.log.write(stage, r, **fields)
        self.events.append(event)
        console.show(event, self.events)

    # --- the steps of a round --------------------------------------------------------------------------------------
    def measure(self, stage: str, r: int, *, texts_in: str = "", **state: Any) -> None:
        """One state of the model on all evals, against base. Its texts go into the event, or into one named `texts_in`."""

        def fields(result: EvalResult) -> dict[str, Any]:
            texts = {"texts": result.texts}
            if texts_in:
                self.write(texts_in, r, **texts)
            own = {} if texts_in else texts
            return {"metrics": result.metrics, "items": result.items, "dose": state.get("dose", 0.0), **own}

        compute = partial(steps.measure, self.student, self.inputs, self.cfg, self.base, **state)
        done = (stage, r) in self.past
        result = self.step(stage, r, compute, fields, partial(from_event, metrics=self.metrics))
        self.base = self.base or result
        if not done and not texts_in:  # the end of the round draws it
            self.draw()

    def extract(self, r: int) -> Vector:
        path = self.folder / "vectors" / f"r{r}.safetensors"

        def compute() -> Vector:
            if self.cfg.steer.refresh == "once" and r > 0:
                return self.vectors[0]
            return steps.extract(self.student, self.inputs, self.cfg)

        def fields(vector: Vector) -> dict[str, Any]:
            with atomic_write(path) as part:
                vector.save(part)
            norms = {str(layer): direction.norm().item() for layer, direction in vector.directions.items()}
            to_first = cosine(vector, self.vectors.get(0, vector))
            return {"norms": norms, "cosine_to_first": to_first, "files": checksums(self.folder, path)}

        def load(event: Event) -> Vector:
            self._intact(event, "restore the file, or start a new run")
            return load_vector(path)

        self.vectors[r] = self.step("vector", r, compute, fields, load)
        return self.vectors[r]

    def collect(self, r: int, vector: Vector | None) -> Collected:
        """Kept completions of round r. Every finished batch is on disk before the next one begins."""
        stage, kappa = "gen" if vector is not None else "control_gen", None
        if vector is not None and self.cfg.dose.mode == "iso_kl":
            kappa = self._calibrated(r, vector) / max(self.cfg.gen.alphas)

        def compute() -> Collected:
            written, total = WrittenTexts(partial_path(self.folder, stage, r)), self.cfg.filter.max_attempts
            with closing(written), console.progress(f"{_name(r)}: writing", total, self.cfg.quiet) as advance:

                def on_batch(batch: Sequence[Completion]) -> None:
                    written.add(batch)
                    advance(len(batch))

                try:
                    return steps.collect(self.student, vector, self.inputs, self.cfg, r, kappa, written.known, on_batch)
                except Starved as starved:
                    self.write(stage, r, **fields(starved.collected))
                    raise

        def fields(collected: Collected) -> dict[str, Any]:
            if vector is not None:
                mode, probes = self.cfg.dose.mode, collected.probes
                self.write("dose", r, mode=mode, kappa=collected.kappa, probes=probes)
            return {"n_train": len(collected.kept), "completions": _rows(collected)}

        def load(event: Event) -> Collected:
            return _collected(event, self.past.get(("dose", r), {"kappa": 1.0, "probes": []}))

        collected = self.step(stage, r, compute, fields, load)
        partial_path(self.folder, stage, r).unlink(missing_ok=True)
        return collected

    def _calibrated(self, r: int, vector: Vector) -> float:
        compute = partial(steps.calibrate, self.student, vector, self.inputs, self.cfg)
        load = lambda e: Calibration(e["dose"], tuple(KlProbe(**probe) for probe in e["probes"]))
        return self.step("calibration", r, compute, asdict, load).dose

    def heal(self, r: int, collected: Collected) -> None:
        """Heals and bakes round r. The event is written once the checkpoint is on disk. Round -1 is the control."""
        name = f"ckpt/r{r}" if r >= 0 else "ckpt/control"
        path = self.folder / name

        def fields(report: HealReport) -> dict[str, Any]:
            own = self.student.bake()
            with atomic_folder(path) as part:
                self.student.save(part, own)
            told = {key: value for key, value in asdict(report).items() if key != "steps"}
            return {
                **told,
                "n_steps": len(report.steps),
                "fired": report.fired,
                "pressure": report.pressure,
                "n_retries": sum((e["stage"], e["round"]) == ("heal_retry", r) for e in self.events),
                "checkpoint": name,
                "files": checksums(self.folder, *path.iterdir()),
            }

        def load(event: Event) -> None:
            if (("heal", r + 1) if r >= 0 else ("vector", 0)) not in self.past:  # the last one: the next steps need it
                self._intact(event, f"restore the file, or delete {path} to have that heal done again")
                self.student.restore(path, max(1, r + 1))

        self.step("heal", r, partial(self._heal, r, collected), fields, load)
        partial_path(self.folder, "heal", r).unlink(missing_ok=True)

    def _heal(self, r: int, collected: Collected) -> HealReport:
        """A loss that is not finite is met once, by a second attempt at half the learning rate."""
        cfg = self.cfg.heal
        if ("heal_retry", r) not in self.past:
            try:
                return self._attempt(r, collected, cfg)
            except NotFinite as bad:
                partial_path(self.folder, "heal", r).unlink(missing_ok=True)
                sync_folder(self.folder / "partial")  # the second attempt must not find the file of the first
                self.student.discard_round()
                at = {"step": bad.step, "prompt_index": bad.prompt_index, "text": bad.text}
                self.write("heal_retry", r, **at, lr=steps.at_half_rate(cfg).lr, error=str(bad))
        try:
            return self._attempt(r, collected, steps.at_half_rate(cfg))
        except NotFinite as bad:
            kept = f"ckpt/r{r - 1} holds the rounds before it" if r > 0 else "no round was healed before it"
            raise UserError(f"{bad}; this was the second attempt, at half the learning rate; {kept}") from None

    def _attempt(self, r: int, collected: Collected, cfg: HealCfg) -> HealReport:
        path, saved_at = partial_path(self.folder, "heal", r), time.monotonic()
        n_steps = cfg.epochs * -(-len(collected.kept) // cfg.batch_size)
        with console.progress(f"{_name(r)}: healing", n_steps, self.cfg.quiet) as advance:

            def on_step(state: HealState) -> None:
                nonlocal saved_at
                advance(1)
                self.log.write("heal_step", r, **asdict(state.steps[-1]))
                if time.monotonic() - saved_at >= self.save_every_s:
                    save_heal(path, state.saved())
                    saved_at = time.monotonic()

            heal = partial(steps.heal, self.student, collected, self.cfg, r, heal_cfg=cfg)
            return heal(on_step=on_step, saved=load_heal(path))

    def forget(self) -> None:
        """Drops the control's adapter: the loop starts from the untouched model."""
        self.student.reset()
        self.seconds = {}

    def end_round(self, r: int) -> None:
        if ("round", r) in self.past:
            return
        metric, _ = measurements.target_of(self.events)
        reads = {(m.stage, m.round): m for m in measurements.measurements(self.events)}
        base, steered, healed = reads["base", -1], reads["steered", r], reads["healed", r]
        learnt = steps.direction(self.student, self.inputs, self.cfg)
        self.seconds["total"] = sum(self.seconds.values())
        self.write(
            "round",
            r,
            retain=measurements.retain(healed, steered, base, metric),
            slope=measurements.slope(healed, base, metric, self.metrics),
            checkpoint=f"ckpt/r{r}",
            cosine_student_teacher=cosine(learnt, self.vectors[r]),
            cosine_student_first=cosine(learnt, self.vectors[0]),
            seconds={stage: round(seconds, 2) for stage, seconds in self.seconds.items()},
        )
        self.seconds = {}
        self.draw()

    def finish(self) -> None:
        """The merged model where one was asked for, verdict, pictures, and the row of results.tsv."""
        if ("run_end", None) not in self.past:
            if self.cfg.export is not None:
                check_export(self.cfg.export)
                with atomic_folder(self.cfg.export) as part:
                    self.student.export(part)
            verdict, table = measurements.verdict(self.events), measurements.table(self.events)
            self.write("run_end", None, verdict=verdict, table=table)
        complete(self.folder, self.cfg)
        console.print_table(self.events)
        print_safe(f"read {self.folder / 'report.html'} first; everything of this run is in {self.folder}")

    def draw(self) -> None:
        began = time.monotonic()
        draw(self.folder)
        self.seconds["draw"] = self.seconds.get("draw", 0.0) + time.monotonic() - began

    def _intact(self, event: Event, fix: str) -> None:
        if (damage := damaged_file(self.folder, event["files"])) is not None:
            raise UserError(f"{damage}; {fix}")


def draw(folder: Path) -> None:
    """The pictures and the page so far. A drawing that fails must not cost the run."""
    try:
        report.draw(folder)
    except Exception as error:
        logger.warning(f"nothing was drawn ({error}); `just plot {folder}` tries again")


def complete(folder: Path, cfg: RunConfig) -> None:
    """What follows from the events of a finished run: its pictures and its row of results.tsv. It can be repeated."""
    draw(folder)
    events = read_events(folder)
    row = {
        "run": folder.resolve().name,
        "arm": cfg.arm or events[0]["preset"],
        "settings": cfg.fingerprint(),
        **measurements.result_row(events),
        "last_hash": last_hash(folder),
    }
    append_result(folder.resolve().parent, row)
    rmtree(folder / "partial", ignore_errors=True)


def _name(r: int) -> str:
    return "control" if r < 0 else f"round {r}"


def _rows(collected: Collected) -> list[dict[str, Any]]:
    """Every completion for an event, with its scores, whether it trains, and why not."""
    order = {id(row): i for i, row in enumerate(collected.kept)}
    return [
        {
            **asdict(row.completion),
            "scores": row.scores,
            "keep": row.kept,
            "train": id(row) in order,
            "train_order": order.get(id(row)),
            "failed": row.failed,
            "reasons": row.reasons,
        }
        for row in collected.scored
    ]


def _collected(gen: Event, dose: Event) -> Collected:
    """What `_rows` wrote. A score that is null was infinite."""
    scored, kept = [], {}
    for row in gen["completions"]:
        own = {name: row[name] for name in Completion.__dataclass_fields__}
        own |= {name: tuple(own[name]) for name in ("prompt_ids", "completion_ids")}
        scores = {name: float("inf") if score is None else score for name, score in row["scores"].items()}
        scored.append(Scored(Completion(**own), scores, tuple(row["failed"]), tuple(row["reasons"])))
        if row["train"]:
            kept[row["train_order"]] = scored[-1]
    probes = tuple(DoseProbe(**probe) for probe in dose["probes"])
    return Collected(tuple(kept[i] for i in sorted(kept)), tuple(scored), dose["kappa"], probes)


def guard(session: Session, loop: Callable[[Session], None]) -> int:
    """Run the loop. On a user error, interrupt, out-of-memory or full disk, log why, print how to resume, and return the
    exit status."""

    def stop(status: int, error: str | None, message: str) -> int:
        with handled(signal.SIG_IGN):
            command = f"python -m steer_heal.run --resume {shlex.quote(str(session.folder))}"
            try:
                print_safe(f"{message}\ncontinue with: {command}", sys.stderr)
                if error is not None:
                    session.log.write("run_end", None, error=error)
            except OSError:
                pass  # a full disk must not hide the message
        return status

    try:
        loop(session)
        return 0
    except UserError as error:
        return stop(1, str(error), f"error: {error}")
    except KeyboardInterrupt as stopped:
        return stop(getattr(stopped, "status", 130), "interrupted", "stopped")
    except torch.OutOfMemoryError as error:
        fix = "lower --gen.batch-size, --eval.batch-size or --heal.tokens-per-pass"
        return stop(1, "out of memory", f"error: out of memory; {fix} ({error})")
    except (OSError, SafetensorError) as error:
        return stop(1, None, f"error: could not write to {session.folder}: {error}; free some space")
    finally:
        session.log.close()
        session.lock.close()
