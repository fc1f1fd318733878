"""The library: a class over the plain functions of round.py and the loop of loop.py.

It writes no files but those that it is asked for, prints nothing, and changes neither logging nor warnings.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import polars as pl
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from steer_heal import round as steps
from steer_heal.check import check_inputs, holds_files
from steer_heal.errors import UserError, nearest, validated
from steer_heal.inputs.traits import TraitFile
from steer_heal.loop import Loop, run_loop
from steer_heal.model.lm import LM, Original, wrap
from steer_heal.model.steering import Condition, Vector
from steer_heal.model.student import AdapterState, Factors, Student
from steer_heal.presets import PRESETS
from steer_heal.records import Collected, EvalResult, HealReport, HealStep, derive_seed
from steer_heal.report import measurements
from steer_heal.runs import events
from steer_heal.runs.storage import atomic_folder
from steer_heal.settings import RunConfig, changed
from steer_heal.stages.generate import Ask

Event = Mapping[str, Any]
State = Literal["base", "prompted", "steered", "healed"]
STATES: tuple[State, ...] = ("base", "prompted", "steered", "healed")


def define_trait(
    positive: str,
    negative: str,
    prompts: Sequence[str],
    *,
    target: str | Sequence[str] = "contrast_nats",
    sign: int = 1,
    pairs: Sequence[Mapping[str, str]] = (),
    off_targets: Sequence[str] = (),
    narration: Sequence[str] = (),
    plain_system: str = "",
    steered_system: str = "",
    description: str = "",
) -> TraitFile:
    """A trait without a file; docs/personas.md says what each field is for. UserError naming every invalid one.

    `positive` and `negative` are the two system prompts of the persona pair, `prompts` the questions for training and
    evaluation, `target` the metric that should go up (`sign` 1) or down (-1). `pairs` have `prompt`, `positive` and
    `negative`; the target `contrast_nats` is measured on them.
    """
    fields = {
        "description": description,
        "target": [target] if isinstance(target, str) else list(target),
        "sign": sign,
        "narration": list(narration),
        "prompts": list(prompts),
        "system": {"steered": steered_system, "plain": plain_system},
        "off_targets": list(off_targets),
        "pairs": [dict(pair) for pair in pairs],
        "persona": {"positive": positive, "negative": negative},
    }
    return validated(TraitFile, fields, "trait")


class SteerHeal:
    """A model, a trait and settings; the rounds healed so far; and every step of a round as a method.

        with SteerHeal("data/toylm", trait="authority") as sh:
            print(sh.loop(n_rounds=2))
            sh.save("my_adapter")

    One round by hand is `extract`, `collect`, `heal`, `bake`; `loop` does whole rounds with their measurements, and
    gives the same figures as the command with the same settings and seed.

    Between calls the adapters are off: the model is the untouched base. A model that was handed in stays in eval mode,
    frozen, and wrapped by PEFT until `close` gives it back as it was.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | None = None,
        tokenizer: Any = None,
        trait: str | TraitFile | None = None,
        *,
        settings: RunConfig | Mapping[str, Any] | None = None,
        preset: str = "toy",
        seed: int | None = None,
        name: str = "custom",
    ) -> None:
        """UserError with a line for each thing that is wrong.

        Args:
            model: As `--model`, or a loaded causal language model, which is used where it is and in its dtype. None: as
                the settings say.
            tokenizer: Of a loaded model. It is copied.
            trait: As `--trait`, or one of `define_trait`. None: as the settings say.
            settings: All of them, or changes to the preset by the names of the flags: {"heal.epochs": 2}. `n_threads`,
                `out`, `export` and `quiet` have no effect here.
            preset: Whose settings they are, where `settings` is not a RunConfig.
            seed: In place of that of the settings.
            name: Of a trait that was handed in.
        """
        if preset not in PRESETS:
            raise UserError(f"preset is {preset!r}: {nearest(preset, PRESETS)}")
        given: dict[str, Any] = {} if seed is None else {"seed": seed}
        if model is not None:
            given["model"] = model if isinstance(model, str) else _name_of(model)
        if trait is not None:
            given["trait"] = trait if isinstance(trait, str) else f"{name}.toml"
        base = settings if isinstance(settings, RunConfig) else changed(PRESETS[preset][1], settings or {})
        self.cfg = changed(base, given)
        self.inputs = check_inputs(self.cfg, None if isinstance(trait, str) else trait)
        self._original: Original | None = None
        if model is None or isinstance(model, str):
            with _no_bars():
                lm = steps.load_model(self.cfg)
        else:
            lm = self._wrapped(model, tokenizer)
        self.student = Student(lm, self.cfg.adapter)
        self.vector: Vector | None = None
        """The one that was extracted or used last."""
        self.collected: Collected | None = None
        """What was collected last."""
        self._own: Factors | None = None
        self._start()

    def _wrapped(self, model: PreTrainedModel, tokenizer: Any) -> LM:
        if not hasattr(model, "get_output_embeddings") or hasattr(model, "peft_config"):
            raise UserError(
                f"model is a {type(model).__name__}: give a causal language model of transformers without adapters "
                "(merge_and_unload of PEFT gives one)"
            )
        if tokenizer is None:
            raise UserError(f"tokenizer is None: give that of the loaded model {self.cfg.model!r}")
        original = Original(model)
        cfg = self.cfg
        try:
            lm = wrap(
                model,
                copy.deepcopy(tokenizer),
                cfg.model,
                cfg.max_prompt_tokens,
                temperature=cfg.temperature,
                top_p=cfg.top_p,
            )
            steps.require_bands(lm, cfg)
        except UserError:
            original.restore()
            raise
        self._original = original
        return lm

    def _start(self) -> None:
        self._loop = Loop(self.cfg, self.inputs, self.student)
        self._loop.write("run_start", None, **self._loop.facts())
        self._n_by_loop = 0

    # --- one round by hand -----------------------------------------------------------------------------------------
    @property
    def lm(self) -> LM:
        """The model with its tokenizer."""
        return self.student.lm

    @property
    def n_rounds(self) -> int:
        """Rounds that are baked."""
        return self.student.n_rounds

    def extract(self) -> Vector:
        """The steering vector of the student as it is now: a direction [d] for each block of `steer.layers`."""
        self.vector = steps.extract(self.student, self.inputs, self.cfg)
        return self.vector

    def write(
        self,
        prompts: str | Sequence[str],
        dose: float = 0.0,
        system: str | None = None,
        vector: Vector | None = None,
        adapters: AdapterState = "full",
    ) -> pl.DataFrame:
        """One answer to each prompt: a frame of `prompt`, `text`, `dose`, `n_tokens`.

        Args:
            dose: How much of the vector is added; 0: none.
            system: System prompt. None: the trait's plain one.
            vector: In place of the last one. Where there is none, it is extracted.
            adapters: `base` leaves out the rounds that are baked.
        """
        prompts, plain = [prompts] if isinstance(prompts, str) else list(prompts), self.inputs.trait.plain_system
        condition = Condition(plain if system is None else system, self._used(vector) if dose else None, dose)
        seeds = [derive_seed(self.cfg.seed, "write", i) for i in range(len(prompts))]
        asks = [Ask(i, prompt, seed, alpha=dose) for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))]
        texts = steps.write(self.student, condition, asks, self.inputs, self.cfg, adapters=adapters)
        rows = [(c.prompt, c.text, c.dose, len(c.completion_ids)) for c in texts]
        schema = {"prompt": pl.String, "text": pl.String, "dose": pl.Float64, "n_tokens": pl.Int64}
        return pl.DataFrame(rows, schema=schema, orient="row")

    def collect(self, vector: Vector | None = None, kappa: float | None = None) -> Collected:
        """Text for the heal: written, filtered, and spread over the prompts, with the dose that was found.

        UserError (`Starved`) where the filter keeps too few.

        Args:
            vector: In place of the last one. Where there is none, it is extracted.
            kappa: The multiplier of gen.alphas. None: `dose.mode` chooses it.
        """
        used = self._used(vector)
        self.collected = steps.collect(self.student, used, self.inputs, self.cfg, self.n_rounds, kappa)
        return self.collected

    def heal(
        self,
        collected: Collected | None = None,
        vector: Vector | None = None,
        on_step: Callable[[HealStep], None] = lambda step: None,
    ) -> HealReport:
        """Trains the factor of this round on collected text, the last by default. `bake` keeps it, `discard` drops it.

        `on_step` is called after each optimiser step. A heal that fails, or is interrupted, leaves no factor. UserError
        where a loss is not finite.
        """
        used, collected = self._used(vector), collected or self.collected or self.collect(vector)
        self.discard()
        told = lambda state: on_step(state.steps[-1])
        try:
            return steps.heal(self.student, collected, self.inputs, self.cfg, self.n_rounds, used, told)
        except BaseException:
            self.discard()
            raise

    def bake(self) -> None:
        """Keeps the factor of this round: the next one begins from here. UserError where nothing was healed."""
        if not self.student.is_open:
            raise UserError("nothing was healed since the last round; call heal() first")
        self._own = self.student.bake()

    def discard(self) -> None:
        """Drops what was healed and not baked."""
        self.student.discard_round()

    def reset(self) -> None:
        """Drops every round, and what was measured: the untouched model again."""
        self.student.reset()
        self.vector = self.collected = self._own = None
        self._start()

    def _used(self, vector: Vector | None) -> Vector:
        """The vector given, else the last one, else a new one. UserError where it does not fit the model."""
        if vector is not None:
            n, width = len(self.lm.blocks), self.lm.width
            for layer, direction in vector.directions.items():
                if not 0 <= layer < n or direction.shape != (width,):
                    raise UserError(
                        f"the vector has a direction of shape {list(direction.shape)} for block {layer}: model "
                        f"{self.lm.name!r} has blocks 0 to {n - 1} of width {width}; give a vector of this model"
                    )
            self.vector = vector
        return self.vector or self.extract()

    # --- measurements ------------------------------------------------------------------------------------------------
    @property
    def base(self) -> EvalResult:
        """What was measured of the untouched model, once."""
        self._loop.measure("base", -1)
        assert self._loop.base is not None
        return self._loop.base

    def evaluate(
        self, state: State | Condition = "healed", dose: float | None = None, vector: Vector | None = None
    ) -> EvalResult:
        """Every metric of one state; of all but the base also the 95 percent interval of its difference to it.

        Args:
            state: `base`; `prompted`, the base under the positive persona; `steered`, the student with the vector;
                `healed`, the student under the plain prompt; or a Condition of your own on the student.
            dose: Of `steered`. None: that of the last collected text.
            vector: Of `steered`, in place of the last one.
        """
        if state == "base":
            return self.base
        condition, adapters = None, "full"
        if isinstance(state, Condition):
            condition = state
        elif state == "prompted":
            condition, adapters = self._loop.prompted, "base"
        elif state == "steered":
            if dose is None and self.collected is None:
                raise UserError("dose is None: nothing was collected that chose one; give a dose")
            dose = self.collected.dose if dose is None and self.collected is not None else dose
            condition = steps.teacher(self._used(vector), dose or 0.0, self.inputs, self.cfg)
        elif state != "healed":
            raise UserError(f"state is {state!r}: {nearest(state, STATES)}")
        return steps.measure(self.student, self.inputs, self.cfg, self.base, condition, adapters)

    def loop(
        self,
        n_rounds: int | None = None,
        *,
        on_step: Callable[[int, HealStep], None] = lambda r, step: None,
        on_round: Callable[[Event], None] = lambda event: None,
    ) -> pl.DataFrame:
        """Rounds with all their measurements, as the command does them; returns `table`.

        Rounds are counted in all, so that a second call with a higher number goes on. One that was stopped goes on
        where it was stopped. UserError where a round was baked by hand before.

        Args:
            n_rounds: None: as the settings say.
            on_step: Called with round (-1: the control) and step, after each optimiser step.
            on_round: Called with the event `round` or `backtrack` (spec.md) at the end of each.
        """
        if self.n_rounds != self._n_by_loop:
            raise UserError(
                f"{self.n_rounds} rounds are baked, of which loop did {self._n_by_loop}; call reset(), or go on by hand"
            )
        self.discard()
        loop = self._loop
        loop.cfg = changed(self.cfg, {} if n_rounds is None else {"n_rounds": n_rounds})
        loop.on_step = on_step
        loop.on_event = lambda event: on_round(event) if event["stage"] in ("round", "backtrack") else None
        try:
            run_loop(loop)
        finally:
            self._n_by_loop = self.n_rounds
            self.vector = loop.vectors.get(max(loop.vectors, default=0))
            self._own = loop.own
        return self.table()

    @property
    def events(self) -> list[Event]:
        """Everything that `loop` measured and wrote, as spec.md lists the fields of events.jsonl."""
        return list(self._loop.events)

    def table(self) -> pl.DataFrame:
        """The states that `loop` measured, one a row: the target, its shift from base with the interval, retain, slope,
        and the other metrics that a report shows."""
        return pl.DataFrame(measurements.table(self._loop.events), infer_schema_length=None)

    def verdict(self) -> str:
        """What the measurements of `loop` say, by the rules in spec.md."""
        return measurements.verdict(self._loop.events)

    # --- files -------------------------------------------------------------------------------------------------------
    def save(self, folder: str | Path) -> Path:
        """Writes the baked rounds as a PEFT adapter folder, with the factor of the last round beside it.

        UserError where nothing is baked, or the folder is not empty.
        """
        if self._own is None:
            raise UserError("no round is baked: there is nothing to save; call loop(), or heal() and bake()")
        own = self._own
        return _filled(folder, lambda part: self.student.save(part, own))

    def export(self, folder: str | Path) -> Path:
        """Writes the student, merged, as a plain transformers model. UserError where the folder is not empty."""
        return _filled(folder, self.student.export)

    def close(self) -> None:
        """Drops every round and takes the adapters out; a model that was handed in is as it was before."""
        self.student.detach()
        if self._original is not None:
            self._original.restore()
            self._original = None

    def __enter__(self) -> SteerHeal:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def metrics_frame(results: Mapping[str, EvalResult]) -> pl.DataFrame:
    """Results of `evaluate` by name, one a row: `state` and every metric."""
    rows = [{"state": name, **events.jsonable(result.metrics)[0]} for name, result in results.items()]
    return pl.DataFrame(rows, infer_schema_length=None)


def _name_of(model: Any) -> str:
    """What an adapter of a loaded model names as its base."""
    return getattr(model, "name_or_path", "") or type(model).__name__


def _filled(folder: str | Path, write: Callable[[Path], None]) -> Path:
    path = Path(folder)
    if path.is_file() or holds_files(path):
        raise UserError(f"folder {str(path)!r} is not empty; give a new one, or empty it")
    try:
        with atomic_folder(path) as part:
            write(part)
    except OSError as error:
        raise UserError(f"folder {str(path)!r} cannot be written ({error}); give another one") from None
    return path


@contextmanager
def _no_bars() -> Iterator[None]:
    """No progress bars of transformers while inside."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
