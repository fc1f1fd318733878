"""The loop over rounds: the order of its steps, and each step with its event.

A step whose event is recorded is not done again: its result is read from the event. So a run that was stopped goes on
when the loop is run again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from steer_heal.bench import Bench, Teacher
from steer_heal.errors import UserError
from steer_heal.evals.base import evaluate
from steer_heal.events import (
    Calibrated,
    Contrasted,
    Dropped,
    Extracted,
    Gathered,
    HealRetried,
    HealStepped,
    Measured,
    Preflight,
    RoundDone,
    Trained,
)
from steer_heal.model.state import State, base_state, control_state, healed_state, prompted_state, steered_state
from steer_heal.model.steering import Vector
from steer_heal.progress import SILENT, Progress
from steer_heal.recipe import Recipe
from steer_heal.records import NOTHING, Collected, EvalResult, HealReport, NotFinite, Starved, round_name
from steer_heal.runs.stored import StoredRun
from steer_heal.settings import TINY_RANDOM, HealCfg
from steer_heal.stages.dose import require_enough
from steer_heal.stages.heal import HealState
from steer_heal.stages.vector import cosine
from steer_heal.teachable import teachable
from steer_heal.verdict import limits, past_limits, retain, slope


def run_loop(loop: Loop) -> None:
    """The whole experiment, on one screen. A round that breaks the student is dropped and, while attempts are left,
    repeated."""
    trait = loop.bench.trait
    loop.require_teachable()
    loop.measure(base_state(trait))
    loop.measure(prompted_state(trait))
    if loop.bench.cfg.control:
        run_round(loop, Recipe.control(), None)
        loop.measure(control_state(trait))
    r = 0
    while r < loop.bench.cfg.n_rounds and loop.attempts_left(r):
        loop.rewind(r)
        run_round(loop, Recipe.of(loop.bench.cfg), r)
        loop.measure(healed_state(r, trait))
        if loop.end_round(r):
            r += 1


def run_round(loop: Loop, recipe: Recipe, r: int | None) -> None:
    """Vector, text, heal and bake. The teacher is measured before the student changes. Round None is the control."""
    vector = None
    if recipe.teacher is not None and r is not None:
        vector = loop.extract(r)
    collected = loop.collect(recipe, r, vector)
    teacher = None
    if vector is not None and r is not None:
        teacher = loop.make_teacher(recipe, r, vector, collected)
        if loop.measures_teacher:
            loop.measure(steered_state(r, teacher.condition))
    loop.heal(recipe, r, collected, teacher)


class Loop:
    """The steps of a run. Each public method is one step, recorded in `run`."""

    def __init__(
        self, bench: Bench, run: StoredRun, progress: Progress = SILENT, *, measures_teacher: bool = True
    ) -> None:
        self.bench = bench
        self.run = run
        self.progress = progress
        self.measures_teacher = measures_teacher

    @contextmanager
    def _stage(self, stage: str, r: int | None, doing: str) -> Iterator[None]:
        """A stage behind a bar that the model's batches advance."""
        with self.progress.stage(stage, r, doing), self.bench.student.lm.watched_by(self.progress):
            yield

    def require_teachable(self) -> None:
        """UserError if the personas give the model nothing to teach, unless cfg.teach_anyway. An untrained model and a
        trait without pairs are not asked."""
        cfg = self.bench.cfg
        if cfg.model == TINY_RANDOM or not self.bench.inputs.pairs:
            return
        if (event := self.run.at(Preflight, None)) is None:
            with self._stage("preflight", None, "reading the personas"):
                event = Preflight(found=teachable(self.bench, short=True, progress=self.progress))
            self.run.add(event)
        if event.found.verdict == NOTHING and not cfg.teach_anyway:
            raise UserError(
                f"{NOTHING}: {event.found.reason}; give other personas or another model, or try it all the same with "
                "--teach-anyway",
                resumable=False,
            )

    # --- measurements --------------------------------------------------------------------------------------------
    @property
    def base(self) -> EvalResult | None:
        """What was measured of the base."""
        event = self.run.measured("base")
        return None if event is None else event.result

    def measure(self, state: State) -> EvalResult:
        """One state of the model on all evals."""
        if (event := self.run.measured(state.name, state.round)) is None:
            with self._stage(state.name, state.round, "measuring" if state.round is None else state.name):
                result = evaluate(self.bench.subject(state, self.base), self.bench.evals, self.progress)
            event = Measured(
                round=state.round,
                state=state.name,
                metrics=result.metrics,
                items=result.items,
                dose=state.condition.dose,
                texts=tuple(result.texts),
            )
            self.run.add(event)
        return event.result

    # --- vector and text -----------------------------------------------------------------------------------------
    def extract(self, r: int) -> Vector:
        """The steering vector of round r."""
        if self.run.at(Extracted, r) is None:
            with self._stage("vector", r, "reading the vector"):
                vector = self.bench.extract()
            files = self.run.keep_vector(r, vector)
            norms = {str(layer): direction.norm().item() for layer, direction in vector.directions.items()}
            to_first = cosine(vector, self.run.vector(0) if r > 0 else vector)
            self.run.add(Extracted(round=r, norms=norms, cosine_to_first=to_first, files=files))
        return self.run.vector(r)

    def collect(self, recipe: Recipe, r: int | None, vector: Vector | None = None) -> Collected:
        """The text of a heal. Starved where the filter keeps too little of it."""
        mode = "none" if recipe.teacher is None else self.bench.cfg.dose.mode
        kappa = self._kappa(recipe, r, vector)
        if (event := self.run.at(Gathered, r)) is None:
            with self._stage("text", r, "writing text"), self.run.writing(r) as (known, on_batch):
                try:
                    collected = self.bench.collect(recipe, r, vector, kappa=kappa, known=known, on_batch=on_batch)
                except Starved as starved:  # recorded all the same; the run stops below
                    collected = starved.collected
            event = Gathered(round=r, mode=mode, collected=collected)
            self.run.add(event)
        require_enough(event.collected, self.bench.cfg.filter, own=recipe.text == "own")
        return event.collected

    def _kappa(self, recipe: Recipe, r: int | None, vector: Vector | None) -> float | None:
        """kappa where a dropped attempt or the calibration has set it; None: the text decides."""
        if vector is None or r is None:
            return None
        if dropped := self._dropped(r):
            return dropped[-1].next_kappa
        if self.bench.cfg.dose.mode != "iso_kl" or not recipe.uses_vector:
            return None
        if (event := self.run.at(Calibrated, r)) is None:
            with self._stage("calibration", r, "calibrating the dose"):
                event = Calibrated(round=r, calibration=self.bench.calibrate(recipe, r, vector))
            self.run.add(event)
        return event.calibration.dose / max(self.bench.cfg.gen.alphas)

    # --- heal ----------------------------------------------------------------------------------------------------
    def make_teacher(self, recipe: Recipe, r: int, vector: Vector, collected: Collected) -> Teacher:
        """What the heal of round r learns from."""
        event = self.run.at(Contrasted, r)
        if event is not None or not recipe.uses_contrast:
            return self.bench.make_teacher(recipe, vector, collected, None if event is None else event.found)
        with self._stage("contrast", r, "reading the personas"):
            teacher = self.bench.make_teacher(recipe, vector, collected)
        assert teacher.strength is not None
        self.run.add(Contrasted(round=r, found=teacher.strength))
        return teacher

    def heal(self, recipe: Recipe, r: int | None, collected: Collected, teacher: Teacher | None = None) -> None:
        """Heals and bakes. The event is written once the student is kept."""
        event = self.run.at(Trained, r)
        if event is None:
            with self._stage("heal", r, "healing"):
                report = self._heal(recipe, r, collected, teacher)
            own = self.bench.student.bake()
            checkpoint, files = self.run.keep_student(r, self.bench.student, own)
            n_retries = int(self.run.at(HealRetried, r) is not None)
            self.run.add(Trained.of(report, r=r, n_retries=n_retries, checkpoint=checkpoint, files=files))
        elif event is self.run.each(Trained)[-1] and (r is not None or self.run.measured("control") is None):
            self.run.restore_student(r, self.bench.student)  # the next step needs it

    def _heal(self, recipe: Recipe, r: int | None, collected: Collected, teacher: Teacher | None) -> HealReport:
        """After a loss that is not finite, one second attempt at half the learning rate."""
        cfg = self.bench.cfg.heal
        if r is not None and (dropped := self._dropped(r)):
            cfg = replace(cfg, lr=cfg.lr * dropped[-1].next_lr_share)
        halved = replace(cfg, lr=cfg.lr / 2)
        if self.run.at(HealRetried, r) is None:
            try:
                return self._attempt(recipe, r, collected, teacher, cfg)
            except NotFinite as bad:
                self.run.add(
                    HealRetried(
                        round=r,
                        step=bad.step,
                        prompt_index=bad.prompt_index,
                        text=bad.text,
                        lr=halved.lr,
                        error=str(bad),
                    )
                )
        try:
            return self._attempt(recipe, r, collected, teacher, halved)
        except NotFinite as bad:
            kept = f"{round_name(r - 1)} and those before it are kept" if r else "no round was healed before it"
            message = f"{bad}; this was the second attempt, at half the learning rate; {kept}"
            raise UserError(message, resumable=False) from None

    def _attempt(
        self, recipe: Recipe, r: int | None, collected: Collected, teacher: Teacher | None, cfg: HealCfg
    ) -> HealReport:
        """One heal. Where it fails, the student is as it was before."""

        def on_step(state: HealState) -> None:
            self.progress.at(len(state.steps), state.n_steps)
            self.run.add(HealStepped(round=r, step=state.steps[-1]))
            self.run.save_heal(r, state)

        saved = self.run.saved_heal(r)
        try:
            with self.bench.student.lm.watched_by(SILENT):  # the bar counts steps, not the rows that they read
                return self.bench.heal(recipe, r, collected, teacher, settings=cfg, on_step=on_step, saved=saved)
        except BaseException as error:
            if isinstance(error, NotFinite):
                self.run.forget_heal(r)  # the second attempt must not find the file of the first
            self.bench.student.discard_round()
            raise

    def rewind(self, r: int) -> None:
        """The student as it was before the heal of round r, if that is not recorded: without the control, a round that
        was dropped, and a round that was stopped before it was recorded."""
        student = self.bench.student
        student.discard_round()
        if self.run.at(Trained, r) is None and student.n_rounds != r:
            if r:
                self.run.restore_student(r - 1, student)
            else:
                student.reset()

    # --- the end of a round --------------------------------------------------------------------------------------
    def _dropped(self, r: int) -> list[Dropped]:
        return [event for event in self.run.each(Dropped) if event.round == r]

    def attempts_left(self, r: int) -> bool:
        return len(self._dropped(r)) <= self.bench.cfg.backtrack.retries

    def end_round(self, r: int) -> bool:
        """Whether the round stays. One whose student is past a limit is dropped as if it had never been healed."""
        if self.run.at(RoundDone, r) is not None:
            return True
        if self.bench.cfg.backtrack.retries and (past := self._past_limits(r)):
            self._drop(r, past)
            return False
        with self._stage("direction", r, "reading what was learnt"):
            learnt = self.bench.direction()
        base, steered, healed = (self._measured(name, r) for name in ("base", "steered", "healed"))
        target = self.run.trait_metric
        self.run.add(
            RoundDone(
                round=r,
                retain=retain(healed, steered, base, target),
                slope=slope(healed, base, target, self.run.start.metrics),
                checkpoint=self.run.require(Trained, r).checkpoint,
                cosine_student_teacher=cosine(learnt, self.run.vector(r)),
                cosine_student_first=cosine(learnt, self.run.vector(0)),
            )
        )
        return True

    def _measured(self, state: str, r: int) -> Measured:
        event = self.run.measured(state, None if state == "base" else r)
        assert event is not None
        return event

    def _past_limits(self, r: int) -> Sequence[str]:
        cfg = self.bench.cfg
        assert self.base is not None
        metrics = self.run.start.metrics
        allowed = limits(metrics, self.base, cfg.backtrack, cfg.seed)
        return past_limits(metrics, self._measured("healed", r).metrics, allowed)

    def _drop(self, r: int, past: Sequence[str]) -> None:
        """Drops the round: the next attempt has half the dose or, without a vector or with a contrast, half the
        learning rate."""
        collected = self.run.require(Gathered, r).collected
        trained = self.run.require(Trained, r)
        steered = collected.dose > 0 and not Recipe.of(self.bench.cfg).uses_contrast
        self.run.add(
            Dropped(
                round=r,
                past=tuple(past),
                dose=collected.dose,
                lr=trained.lr,
                metrics=self._measured("healed", r).metrics,
                next_kappa=collected.kappa / 2 if steered else collected.kappa,
                next_lr_share=1.0 if steered else trained.lr / (2 * self.bench.cfg.heal.lr),
            )
        )
