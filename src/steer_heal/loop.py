"""The loop over rounds: the order of its steps, and the steps themselves in memory.

`session.py` does the same steps with files, so that a run can be resumed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from steer_heal import round as steps
from steer_heal.errors import UserError
from steer_heal.evals import metrics_of
from steer_heal.inputs import Inputs
from steer_heal.model.steering import Condition, Vector
from steer_heal.model.student import Factors, Student
from steer_heal.records import Collected, Completion, EvalResult, HealReport, HealStep, NotFinite, Starved
from steer_heal.report import measurements
from steer_heal.runs import codec, events
from steer_heal.settings import HealCfg, RunConfig
from steer_heal.stages import budget
from steer_heal.stages.dose import require_enough
from steer_heal.stages.generate import Known
from steer_heal.stages.vector import cosine

OnBatch = Callable[[Sequence[Completion]], None]
OnPart = Callable[[int, int], object]


def run_loop(loop: Loop) -> None:
    """The whole experiment, on one screen."""
    loop.measure("base", -1)
    loop.measure("prompted", -1, loop.prompted)
    if loop.cfg.control:
        run_control(loop)
    for r in range(loop.cfg.n_rounds):
        if not run_round(r, loop):
            break
    loop.finish()


def run_round(r: int, loop: Loop) -> bool:
    """Whether the student stayed whole. A round that breaks it is dropped and, while attempts are left, tried again."""
    while loop.attempts_left(r):
        vector = loop.extract(r)
        collected = loop.collect(r, vector)
        loop.measure("steered", r, loop.teacher(r, collected))
        loop.heal(r, collected)
        loop.measure("healed", r, texts_in="adapter_gen")
        if loop.end_round(r):
            return True
    return False


def run_control(loop: Loop) -> None:
    """The same heal on the model's own unsteered text, measured and then dropped."""
    collected = loop.collect(-1, None)
    loop.heal(-1, collected)
    loop.measure("control", -1)
    loop.forget()


class Loop:
    """The state of a running loop, in memory. Each public method is one step of a round.

    A step whose event is in `events` is not done again, and a step that was done is read back from its event. So a
    loop that was stopped goes on when it is run again. The methods that begin with an underscore and take a round are
    what a session does with files.
    """

    def __init__(self, cfg: RunConfig, inputs: Inputs, student: Student) -> None:
        self.cfg, self.inputs, self.student = cfg, inputs, student
        self.metrics = metrics_of(cfg.eval.evals)
        self.events: list[events.Event] = []
        self.base: EvalResult | None = None
        self.vectors: dict[int, Vector] = {}
        self.seconds: dict[str, float] = {}
        self.on_step: Callable[[int, HealStep], None] = lambda r, step: None
        self.on_event: Callable[[events.Event], None] = lambda event: None
        self.own: Factors | None = None
        """The factor of the last round that is baked."""
        self._before: tuple[Factors, Factors | None] = ({}, None)

    def facts(self) -> dict[str, Any]:
        """What readers of the events need to know first."""
        facts = {"config": asdict(self.cfg), "seed": self.cfg.seed, "trait": asdict(self.inputs.trait)}
        read = {metric.of for metric in self.metrics}
        wording = {of: items for of, items in self.inputs.wording.items() if of in read}
        return {**facts, "metrics": self.metrics, "gates": codec.gate_fields(self.cfg), "wording": wording}

    def recorded(self, stage: str, r: int | None) -> events.Event | None:
        """The event of a step; None: the step is still to be done."""
        return next((e for e in reversed(self.events) if (e["stage"], e["round"]) == (stage, r)), None)

    def write(self, stage: str, r: int | None, **fields: Any) -> events.Event:
        """Adds one event. Numbers that are not finite become None."""
        event = {"stage": stage, "round": r, **events.jsonable(fields)[0]}
        self.events.append(event)
        self.on_event(event)
        return event

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - began

    @contextmanager
    def watched(self, stage: str, r: int, doing: str) -> Iterator[OnPart]:
        """Times a stage. Yields what is called with each part of it that begins, from 1, and their number."""
        with self.timed(stage):
            yield lambda part, n_parts: None

    # --- the steps of a round --------------------------------------------------------------------------------------
    def measure(self, stage: str, r: int, condition: Condition | None = None, texts_in: str = "") -> None:
        """One state of the model on all evals, without a condition under the plain prompt. Its texts go into the event
        itself, or into one named `texts_in`."""
        if (event := self.recorded(stage, r)) is None:
            adapters, n_evals = "base" if stage in ("base", "prompted") else "full", len(self.cfg.eval.evals)
            with self.watched(stage, r, stage if r >= 0 else "measuring") as on_part:
                on_eval = lambda i: on_part(i + 1, n_evals)
                result = steps.measure(self.student, self.inputs, self.cfg, self.base, condition, adapters, on_eval)
            if texts_in:
                self.write(texts_in, r, texts=result.texts)
            texts = {} if texts_in else {"texts": result.texts}
            dose = condition.dose if condition is not None else 0.0
            event = self.write(stage, r, metrics=result.metrics, items=result.items, dose=dose, **texts)
            if not texts_in:  # the end of the round draws it
                self.draw()
        self.base = self.base or codec.result_from(event, self.metrics)

    def extract(self, r: int) -> Vector:
        if (event := self.recorded("vector", r)) is None:
            with self.watched("vector", r, "reading the vector"):
                frozen = self.cfg.steer.refresh == "once" and r > 0
                vector = self.vectors[0] if frozen else steps.extract(self.student, self.inputs, self.cfg)
            files = self._keep_vector(r, vector)
            norms = {str(layer): direction.norm().item() for layer, direction in vector.directions.items()}
            to_first = cosine(vector, self.vectors.get(0, vector))
            event = self.write("vector", r, norms=norms, cosine_to_first=to_first, **files)
        self.vectors[r] = self._read_vector(r, event)
        return self.vectors[r]

    def _keep_vector(self, r: int, vector: Vector) -> dict[str, Any]:
        """Fields of the event."""
        self.vectors[r] = vector
        return {}

    def _read_vector(self, r: int, event: events.Event) -> Vector:
        return self.vectors[r]

    def collect(self, r: int, vector: Vector | None) -> Collected:
        """Kept completions of round r. Starved where they are too few."""
        stage, cfg = "gen" if vector is not None else "control_gen", self.cfg
        kappa, calibrated = None, cfg.dose.mode == "iso_kl" and cfg.heal.teacher != "prompt"
        if self._dropped(r) and vector is not None:
            kappa = self._dropped(r)[-1]["next_kappa"]
        elif calibrated and vector is not None:
            kappa = self._calibrated(r, vector)
        if (event := self.recorded(stage, r)) is None:
            with self.watched(stage, r, "writing text"), self._writing(stage, r) as (known, on_batch):
                try:
                    collected = steps.collect(self.student, vector, self.inputs, cfg, r, kappa, known, on_batch)
                except Starved as starved:  # recorded all the same; the run stops below
                    collected = starved.collected
            if vector is not None:
                found = {"kappa": collected.kappa, "dose": collected.dose, "probes": collected.probes}
                self.write("dose", r, mode=cfg.dose.mode, **found)
            event = self.write(stage, r, **codec.gen_fields(collected))
        collected = codec.collected_from(event, self.recorded("dose", r))
        require_enough(collected, cfg.filter)
        return collected

    @contextmanager
    def _writing(self, stage: str, r: int) -> Iterator[tuple[Known, OnBatch]]:
        """(texts that are written already, what is called with each batch of new ones)."""
        yield {}, lambda batch: None

    def _calibrated(self, r: int, vector: Vector) -> float:
        """kappa of mode iso_kl."""
        if (event := self.recorded("calibration", r)) is None:
            with self.watched("calibration", r, "calibrating the dose"):
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
        """Heals and bakes round r. The event is written once the student is kept. Round -1 is the control."""
        if (event := self.recorded("heal", r)) is None:
            with self.watched("heal", r, "healing"):
                report = self._heal(r, collected)
            self.own = self.student.bake()
            kept = self._keep_student(r, self.own)
            n_retries = int(self.recorded("heal_retry", r) is not None)
            self.write("heal", r, **codec.heal_fields(report), n_retries=n_retries, **kept)
        elif event is self._last_heal():
            self._restore_student(r, event)

    def _keep_student(self, r: int, own: Factors) -> dict[str, Any]:
        """Fields of the event. `own` is the factor of round r."""
        return {}

    def _restore_student(self, r: int, event: events.Event) -> None:
        """The student as it was after the heal of round r. In memory it still is."""

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
                at = {"step": bad.step, "prompt_index": bad.prompt_index, "text": bad.text}
                self.write("heal_retry", r, **at, lr=cfg.lr / 2, error=str(bad))
        try:
            return self._attempt(r, collected, replace(cfg, lr=cfg.lr / 2))
        except NotFinite as bad:
            kept = f"ckpt/r{r - 1} holds the rounds before it" if r > 0 else "no round was healed before it"
            message = f"{bad}; this was the second attempt, at half the learning rate; {kept}"
            raise UserError(message, resumable=False) from None

    def _attempt(self, r: int, collected: Collected, heal_cfg: HealCfg) -> HealReport:
        """One heal. NotFinite: the student is as it was before."""
        self._before = self.student.history(), self.own
        vector, cfg = self.vectors[r] if r >= 0 else None, replace(self.cfg, heal=heal_cfg)
        on_step = lambda state: self.on_step(r, state.steps[-1])
        try:
            return steps.heal(self.student, collected, self.inputs, cfg, r, vector, on_step)
        except BaseException:
            self.student.discard_round()
            raise

    def forget(self) -> None:
        """Drops the control's adapter: the loop starts from the untouched model."""
        if self._last_heal()["round"] < 0:
            self.student.reset()
            self.own = None
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
        heal = self.recorded("heal", r)
        assert heal is not None
        with self.watched("direction", r, "reading what was learnt"):
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
            checkpoint=heal.get("checkpoint"),
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
        history, self.own = self._before
        self.student.take(history, r)

    def finish(self) -> None:
        """What follows the last round."""

    def draw(self) -> None:
        """What follows an event that has a picture."""
