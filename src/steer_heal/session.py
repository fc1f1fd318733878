"""One run: does each step of round.py and records it as an event, or reads it back from a run that was stopped."""

from __future__ import annotations

import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from shutil import rmtree
from typing import IO, Any

import torch
from loguru import logger
from safetensors import SafetensorError

from steer_heal import report
from steer_heal import round as steps
from steer_heal.check import holds_files
from steer_heal.errors import UserError, print_safe
from steer_heal.evals import metrics_of
from steer_heal.inputs import Inputs
from steer_heal.model.lm import LM, weights_digest
from steer_heal.model.memory import ran_out
from steer_heal.model.steering import Condition, Vector, load_vector
from steer_heal.model.student import Student
from steer_heal.model.targets import targets
from steer_heal.records import Collected, EvalResult, HealReport, NotFinite, Starved
from steer_heal.report import console, measurements
from steer_heal.runs import codec, events
from steer_heal.runs.checkpoint import WrittenTexts, load_heal, save_heal
from steer_heal.runs.resume import in_recorded_dtype, partial_path, run_start, same_weights, truncate_events
from steer_heal.runs.signals import handled
from steer_heal.runs.storage import atomic_folder, atomic_write, checksums, damaged_file, lock_run, sync_folder
from steer_heal.settings import HealCfg, RunConfig
from steer_heal.stages import budget
from steer_heal.stages.dose import require_enough
from steer_heal.stages.heal import HealState
from steer_heal.stages.vector import cosine


def open_session(cfg: RunConfig, preset: str, inputs: Inputs, folder: Path | None = None) -> Session:
    """Loads the model; makes a run folder and writes run_start, or opens the `folder` of a run that was stopped."""
    if cfg.n_threads:
        torch.set_num_threads(cfg.n_threads)
    console.start(cfg.quiet)
    lock = None if folder is None else lock_run(folder)
    lm = steps.load_model(cfg if folder is None else in_recorded_dtype(cfg, folder))
    weights = weights_digest(lm.model)
    past: list[events.Event] = []
    if folder is not None:
        same_weights(run_start(folder), weights, folder)
        past = truncate_events(folder)
    else:
        folder = events.new_run_folder(cfg.out, f"{preset}-{inputs.trait.name}-s{cfg.seed}")
    lock = lock or lock_run(folder)
    console.start(cfg.quiet, folder / "run.log")
    session = Session(cfg, inputs, lm, folder, past, lock)
    if past:
        logger.info(f"continues {folder} after {past[-1]['stage']} of round {past[-1]['round']}")
    else:
        logger.info(f"{cfg.model} is in {weights['dtype']} on {lm.device}: {lm.why_dtype}")
        facts = {"versions": events.versions(), "git_commit": events.git_commit(), "weights": weights}
        facts |= {"unadapted": targets(lm, cfg.adapter.layers).left_out}
        facts |= {"metrics": session.metrics, "gates": codec.gate_fields(cfg), "inputs": dict(inputs.sha256)}
        command = ["steer-heal", "run", *sys.argv[1:]]
        own = {"folder": str(folder), "config": asdict(cfg), "preset": preset, "seed": cfg.seed, "command": command}
        session.write("run_start", None, **own, trait=asdict(inputs.trait), **facts)
    return session


class Session:
    """The state of a running loop. Each public method is one step of run.py.

    A step whose event is there is not done again, and a step that was done is read back from its event. So a resumed
    run goes on from the same values as one that was never stopped.
    """

    save_every_s = 60.0
    """Seconds between checkpoints of a running heal."""

    def __init__(
        self, cfg: RunConfig, inputs: Inputs, lm: LM, folder: Path, past: Sequence[events.Event], lock: IO[str]
    ) -> None:
        self.cfg, self.inputs, self.folder, self.lock = cfg, inputs, folder, lock
        self.student = Student(lm, cfg.adapter)
        self.metrics = metrics_of(cfg.eval.evals)
        self.log = events.EventLog(folder, past[-1]["wall_s"] if past else 0.0)
        self.events = events.current([event for event in past if event["stage"] != "heal_step"])
        self.base: EvalResult | None = None
        self.vectors: dict[int, Vector] = {}
        self.seconds: dict[str, float] = {}

    def recorded(self, stage: str, r: int | None) -> events.Event | None:
        """The event of a step; None: the step is still to be done."""
        return next((e for e in reversed(self.events) if (e["stage"], e["round"]) == (stage, r)), None)

    def write(self, stage: str, r: int | None, **fields: Any) -> events.Event:
        event = self.log.write(stage, r, **fields)
        self.events.append(event)
        console.show(event, self.events)
        return event

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - began
        logger.debug(f"{stage}: {time.monotonic() - began:.1f} s")

    # --- the steps of a round --------------------------------------------------------------------------------------
    def measure(self, stage: str, r: int, condition: Condition | None = None, texts_in: str = "") -> None:
        """One state of the model on all evals, without a condition under the plain prompt. Its texts go into the event
        itself, or into one named `texts_in`."""
        if (event := self.recorded(stage, r)) is None:
            with self.timed(stage):
                result = steps.measure(self.student, self.inputs, self.cfg, self.base, condition)
            if texts_in:
                self.write(texts_in, r, texts=result.texts)
            texts = {} if texts_in else {"texts": result.texts}
            dose = condition.dose if condition is not None else 0.0
            event = self.write(stage, r, metrics=result.metrics, items=result.items, dose=dose, **texts)
            if not texts_in:  # the end of the round draws it
                self.draw()
        self.base = self.base or codec.result_from(event, self.metrics)

    def extract(self, r: int) -> Vector:
        path = self.folder / "vectors" / f"r{r}.safetensors"
        if (event := self.recorded("vector", r)) is None:
            with self.timed("vector"):
                frozen = self.cfg.steer.refresh == "once" and r > 0
                vector = self.vectors[0] if frozen else steps.extract(self.student, self.inputs, self.cfg)
            with atomic_write(path) as part:
                vector.save(part)
            norms = {str(layer): direction.norm().item() for layer, direction in vector.directions.items()}
            to_first = cosine(vector, self.vectors.get(0, vector))
            event = self.write("vector", r, norms=norms, cosine_to_first=to_first, files=checksums(self.folder, path))
        self._require_intact(event, "restore the file, or start a new run")
        self.vectors[r] = load_vector(path)
        return self.vectors[r]

    def collect(self, r: int, vector: Vector | None) -> Collected:
        """Kept completions of round r. Every finished batch is on disk before the next one begins."""
        stage = "gen" if vector is not None else "control_gen"
        path, cfg = partial_path(self.folder, stage, r), self.cfg
        kappa, calibrated = None, cfg.dose.mode == "iso_kl" and cfg.heal.teacher != "prompt"
        if self._dropped(r) and vector is not None:
            kappa = self._dropped(r)[-1]["next_kappa"]
        elif calibrated and vector is not None:
            kappa = self._calibrated(r, vector)
        if (event := self.recorded(stage, r)) is None:
            bar = console.progress(f"{_name(r)}: writing", cfg.filter.max_attempts, cfg.quiet)
            with self.timed(stage), bar as advance, closing(WrittenTexts(path, advance)) as written:
                known, on_batch = written.known, written.add
                try:
                    collected = steps.collect(self.student, vector, self.inputs, cfg, r, kappa, known, on_batch)
                except Starved as starved:  # recorded all the same; the run stops below
                    collected = starved.collected
            if vector is not None:
                found = {"kappa": collected.kappa, "dose": collected.dose, "probes": collected.probes}
                self.write("dose", r, mode=cfg.dose.mode, **found)
            rows = codec.collected_rows(collected)
            event = self.write(stage, r, n_train=len(collected.kept), completions=rows)
        path.unlink(missing_ok=True)
        collected = codec.collected_from(event, self.recorded("dose", r))
        require_enough(collected, cfg.filter)
        return collected

    def _calibrated(self, r: int, vector: Vector) -> float:
        """kappa of mode iso_kl."""
        if (event := self.recorded("calibration", r)) is None:
            with self.timed("calibration"):
                calibration = steps.calibrate(self.student, vector, self.inputs, self.cfg, r)
            event = self.write("calibration", r, **asdict(calibration))
        return event["dose"] / max(self.cfg.gen.alphas)

    @property
    def prompted(self) -> Condition:
        """The positive persona as system prompt."""
        return Condition(self.inputs.trait.positive)

    def teacher(self, r: int, collected: Collected) -> Condition:
        """What makes the teacher of round r out of the student."""
        return steps.teacher(self.vectors[r], collected.dose, self.inputs, self.cfg)

    def heal(self, r: int, collected: Collected) -> None:
        """Heals and bakes round r. The event is written once the checkpoint is on disk. Round -1 is the control."""
        name = f"ckpt/r{r}" if r >= 0 else "ckpt/control"
        path = self.folder / name
        if (event := self.recorded("heal", r)) is None:
            with self.timed("heal"):
                report_ = self._heal(r, collected)
            own = self.student.bake()
            with atomic_folder(path) as part:
                self.student.save(part, own)
            n_retries = int(self.recorded("heal_retry", r) is not None)
            files = checksums(self.folder, *path.iterdir())
            fields = codec.heal_fields(report_)
            self.write("heal", r, **fields, n_retries=n_retries, checkpoint=name, files=files)
            partial_path(self.folder, "heal", r).unlink(missing_ok=True)
        elif event is self._last_heal():
            self._require_intact(event, f"restore the file, or delete {path} to have that heal done again")
            self.student.restore(path, max(1, r + 1))

    def _last_heal(self) -> events.Event:
        """The heal whose student the next step needs. The control's is dropped once it was measured."""
        return events.of_stage(self.events, "heal")[-1]

    def _heal(self, r: int, collected: Collected) -> HealReport:
        """After a loss that is not finite, one second attempt at half the learning rate."""
        cfg = self.cfg.heal
        if self._dropped(r):
            cfg = replace(cfg, lr=cfg.lr * self._dropped(r)[-1]["next_lr_share"])
        if self.recorded("heal_retry", r) is None:
            try:
                return self._attempt(r, collected, cfg)
            except NotFinite as bad:
                partial_path(self.folder, "heal", r).unlink(missing_ok=True)
                sync_folder(self.folder / "partial")  # the second attempt must not find the file of the first
                self.student.discard_round()
                at = {"step": bad.step, "prompt_index": bad.prompt_index, "text": bad.text}
                self.write("heal_retry", r, **at, lr=cfg.lr / 2, error=str(bad))
        try:
            return self._attempt(r, collected, replace(cfg, lr=cfg.lr / 2))
        except NotFinite as bad:
            kept = f"ckpt/r{r - 1} holds the rounds before it" if r > 0 else "no round was healed before it"
            message = f"{bad}; this was the second attempt, at half the learning rate; {kept}"
            raise UserError(message, resumable=False) from None

    def _attempt(self, r: int, collected: Collected, heal_cfg: HealCfg) -> HealReport:
        path, saved_at = partial_path(self.folder, "heal", r), time.monotonic()
        cfg, saved = replace(self.cfg, heal=heal_cfg), load_heal(path)
        n_steps = heal_cfg.epochs * -(-len(collected.kept) // heal_cfg.batch_size)
        with console.progress(f"{_name(r)}: healing", n_steps, cfg.quiet) as advance:

            def on_step(state: HealState) -> None:
                nonlocal saved_at
                advance(1)
                self.log.write("heal_step", r, **asdict(state.steps[-1]))
                due = time.monotonic() - saved_at >= self.save_every_s
                between = r < 0 or not heal_cfg.refresh_every or len(state.steps) % heal_cfg.refresh_every == 0
                if due and between:  # the text of the steps since then cannot be written again
                    save_heal(path, state.saved())
                    saved_at = time.monotonic()

            vector = self.vectors[r] if r >= 0 else None
            return steps.heal(self.student, collected, self.inputs, cfg, r, vector, on_step, saved)

    def forget(self) -> None:
        """Drops the control's adapter: the loop starts from the untouched model."""
        self.student.reset()
        self.seconds = {}

    def _dropped(self, r: int) -> list[events.Event]:
        return [event for event in self.events if event["stage"] == "backtrack" and event["round"] == r]

    def attempts_left(self, r: int) -> bool:
        return len(self._dropped(r)) <= self.cfg.backtrack.retries

    def end_round(self, r: int) -> bool:
        """Whether the round stays. One whose student is past a limit is dropped as if it had never been healed."""
        if self.recorded("round", r) is not None:
            return True
        if self.cfg.backtrack.retries and (past := self._past_limits(r)):
            self._drop(r, past)
            return False
        with self.timed("direction"):
            learnt = steps.direction(self.student, self.inputs, self.cfg)
        states = {(m.stage, m.round): m for m in measurements.measurements(self.events)}
        base, steered, healed = states["base", -1], states["steered", r], states["healed", r]
        target, _ = measurements.target_of(self.events)
        retain = measurements.retain(healed, steered, base, target)
        slope = measurements.slope(healed, base, target, self.metrics)
        cosines = {"teacher": cosine(learnt, self.vectors[r]), "first": cosine(learnt, self.vectors[0])}
        self.seconds["total"] = sum(self.seconds.values())
        self.write(
            "round",
            r,
            retain=retain,
            slope=slope,
            checkpoint=f"ckpt/r{r}",
            **{f"cosine_student_{name}": value for name, value in cosines.items()},
            seconds={stage: round(seconds, 2) for stage, seconds in self.seconds.items()},
        )
        self.seconds = {}
        self.draw()
        return True

    def _past_limits(self, r: int) -> list[str]:
        healed, cfg = self.recorded("healed", r), self.cfg
        assert healed is not None and self.base is not None
        limits = budget.limits(self.metrics, self.base, cfg.backtrack, cfg.seed)
        return budget.broken(self.metrics, healed["metrics"], limits)

    def _drop(self, r: int, past: Sequence[str]) -> None:
        dose, heal, healed = (self.recorded(stage, r) for stage in ("dose", "heal", "healed"))
        assert dose is not None and heal is not None and healed is not None
        steered, share = dose["dose"] > 0, heal["lr"] / (2 * self.cfg.heal.lr)
        following = {"next_kappa": dose["kappa"] / 2 if steered else dose["kappa"]}
        following |= {"next_lr_share": 1.0 if steered else share}
        self.write("backtrack", r, past=past, dose=dose["dose"], lr=heal["lr"], metrics=healed["metrics"], **following)
        self.events = events.current(self.events)
        self._forget_round(r)
        self.draw()

    def _forget_round(self, r: int) -> None:
        """The student as it was before round r."""
        if r == 0:
            self.student.reset()
        else:
            self.student.restore(self.folder / "ckpt" / f"r{r - 1}", r)

    def finish(self) -> None:
        """Verdict, pictures, the row of results.tsv and, where one was asked for, the merged model."""
        if self.recorded("run_end", None) is None:
            verdict, table = measurements.verdict(self.events), measurements.table(self.events)
            self.write("run_end", None, verdict=verdict, table=table)
        complete(self.folder, self.cfg)
        if self.cfg.export is not None and not holds_files(self.cfg.export):
            with atomic_folder(self.cfg.export) as part:
                self.student.export(part)
        console.print_table(self.events)
        print_safe(f"read {self.folder / 'report.html'} first; everything of this run is in {self.folder}")

    def draw(self) -> None:
        with self.timed("draw"):
            draw(self.folder)

    def _require_intact(self, event: events.Event, fix: str) -> None:
        if (damage := damaged_file(self.folder, event["files"])) is not None:
            raise UserError(f"{damage}; {fix}")


def _name(r: int) -> str:
    return "control" if r < 0 else f"round {r}"


def draw(folder: Path) -> None:
    """The pictures and the page so far. A drawing that fails must not end the run."""
    try:
        report.draw(folder)
    except Exception as error:
        logger.warning(f"nothing was drawn ({error}); `just plot {folder}` tries again")


def complete(folder: Path, cfg: RunConfig) -> None:
    """What follows from the events of a finished run: its pictures and its row of results.tsv. It can be repeated."""
    draw(folder)
    past = events.current(events.read_events(folder))
    healed = {event["checkpoint"] for event in events.of_stage(past, "heal")}
    for path in (folder / "ckpt").glob("r*"):
        if f"ckpt/{path.name}" not in healed:
            rmtree(path)  # of a round that was dropped
    own = {"run": folder.resolve().name, "arm": cfg.arm or past[0]["preset"], "settings": cfg.fingerprint()}
    row = {**own, **measurements.result_row(past), "last_hash": events.last_hash(folder)}
    events.append_result(folder.resolve().parent, row)
    rmtree(folder / "partial", ignore_errors=True)


def guard(session: Session, loop: Callable[[Session], None]) -> int:
    """Run the loop; return the exit status.

    On a user error, interrupt, out-of-memory or full disk: log why, and print how to resume.
    """
    try:
        loop(session)
        return 0
    except UserError as error:
        return _stop(session, 1, f"error: {error}", str(error), resumable=error.resumable)
    except KeyboardInterrupt as stopped:
        return _stop(session, getattr(stopped, "status", 130), "stopped", "interrupted")
    except RuntimeError as error:
        if not ran_out(error):
            raise
        fix = "lower --gen.batch-size, --eval.batch-size or --heal.tokens-per-pass"
        return _stop(session, 1, f"error: out of memory; {fix} ({str(error).splitlines()[0]})", "out of memory")
    except (OSError, SafetensorError) as error:
        return _stop(session, 1, f"error: could not write to {session.folder}: {error}; free some space", None)
    finally:
        session.log.close()
        session.lock.close()


def _stop(session: Session, status: int, message: str, error: str | None, *, resumable: bool = True) -> int:
    """Prints why the run ends and how to continue, and records why. A disk that is full must not hide the message."""
    command = f"\ncontinue with: steer-heal resume {shlex.quote(str(session.folder))}"
    with handled(signal.SIG_IGN), suppress(OSError):
        print_safe(message + command * resumable, sys.stderr)
        if error is not None and session.recorded("run_end", None) is None:
            session.log.last_hash = events.last_hash(session.folder)  # the write of an event may have been interrupted
            session.log.write("run_end", None, error=error)
    return status
