"""The library: a class that does the steps of a run on a model in memory.

It writes only the files that it is asked for, prints nothing, and changes neither logging nor warnings.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from steer_heal.bench import Bench, Teacher, load_model, require_bands, weights_of
from steer_heal.check import check_inputs
from steer_heal.errors import UserError, nearest, plural, validated
from steer_heal.events import AnyEvent, Dropped, Extended, Extracted, HealStepped, RoundDone, RunEnd, Trained
from steer_heal.inputs.traits import TraitFile
from steer_heal.loop import Loop, run_loop
from steer_heal.model.lm import LM, Original, wrap
from steer_heal.model.state import State, base_state, healed_state, prompted_state, steered_state
from steer_heal.model.steering import Condition, Vector
from steer_heal.model.student import ROUND_FILE, AdapterState, Factors, Student
from steer_heal.plugins import load
from steer_heal.presets import PRESETS, require_preset
from steer_heal.progress import SILENT
from steer_heal.recipe import Recipe
from steer_heal.records import Collected, EvalResult, HealReport, HealStep, derive_seed
from steer_heal.runs.begin import start_event
from steer_heal.runs.resume import recorded_settings, same_inputs, same_weights
from steer_heal.runs.storage import atomic_write
from steer_heal.runs.stored import FolderRun, MemoryRun
from steer_heal.settings import Form, Quantization, RoundName, RunConfig, changed
from steer_heal.share.export import export, write_folder
from steer_heal.stages.generate import Ask
from steer_heal.verdict import chosen_round, table, verdict

STATES = ("base", "prompted", "steered", "healed")


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

        with SteerHeal("data/toylm", trait="authority", preset="toy") as sh:
            print(sh.loop(n_rounds=2))
            sh.save("my_adapter")

    One round by hand is `extract`, `collect`, `heal`, `bake`; `loop` does whole rounds with their measurements, and
    gives the same figures as the command with the same settings and seed.

    Between calls the adapters are off: the model is the untouched base. A model that was handed in stays in eval mode,
    frozen, and wrapped by PEFT until `close` gives it back as it was.
    """

    def __init__(
        self,
        model: str | nn.Module | None = None,
        tokenizer: Any = None,
        trait: str | TraitFile | None = None,
        *,
        settings: RunConfig | Mapping[str, Any] | None = None,
        preset: str = "chat",
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
                `out`, `folder`, `arm`, `track`, `chat` and `quiet` have no effect here.
            preset: Whose settings they are, where `settings` is not a RunConfig. Logged as an info of `steer_heal`.
            seed: In place of that of the settings.
            name: Of a trait that was handed in.
        """
        given: dict[str, Any] = {} if seed is None else {"seed": seed}
        if model is not None:
            named = getattr(model, "name_or_path", "") or type(model).__name__
            given["model"] = model if isinstance(model, str) else named  # what an adapter names as its base
        if trait is not None:
            given["trait"] = trait if isinstance(trait, str) else f"{name}.toml"
        self.cfg = cfg = changed(_base_settings(settings, preset), given)
        """The settings."""
        self.inputs = check_inputs(cfg, None if isinstance(trait, str) else trait)
        """The parsed data."""
        self._plugins = load(cfg)
        self._original: Original | None = None
        if model is None or isinstance(model, str):
            with _no_bars():
                lm = load_model(cfg)
        else:
            lm = self._wrapped(model, tokenizer, cfg)
        self.lm = lm
        """The model with its tokenizer."""
        self.student = Student(lm, cfg.adapter)
        """The model with the rounds that are baked."""
        try:
            self._bench = Bench(cfg, self.inputs, self.student)
        except UserError:
            if self._original is not None:
                self._original.restore()
            raise
        self.vector: Vector | None = None
        """The vector that was extracted or used last."""
        self.collected: Collected | None = None
        """The text that was collected last."""
        self.teacher: Teacher | None = None
        """What the last heal learnt from."""
        self._own: Factors | None = None
        self._start()

    @classmethod
    def open(
        cls, folder: str | Path, round: RoundName = "best", *, allow_broken: bool = False, plugin: Sequence[str] = ()
    ) -> SteerHeal:
        """A run of the command after one of its rounds: model, data, settings, student and measurements. `loop` goes on
        from that round. Nothing is written to the folder.

        UserError where the model, a data file or a checkpoint is not as the run recorded it.

        Args:
            folder: Of the run.
            round: `best` as the verdict says, `last`, or a number, from 1.
            allow_broken: Whether the model of the round may be broken.
            plugin: The plugins of the run. They run only if they are given here.
        """
        run = FolderRun.read(Path(folder))
        r = chosen_round(run, round, allow_broken=allow_broken)
        sh = cls(settings=recorded_settings(run.folder, plugin))
        try:
            same_inputs(run.folder, sh.inputs)
            same_weights(run.folder, weights_of(sh.lm))
            run.restore_student(r, sh.student)
            sh._own = load_file(run.checkpoint(r) / ROUND_FILE)
            sh._run = MemoryRun(e for e in run.events if not isinstance(e, RunEnd | Extended) and (e.round or 0) <= r)
            for k in range(r + 1):
                sh._run.keep_vector(k, run.vector(k))
            sh._run.keep_student(r, sh.student, sh._own)
            sh.vector = run.vector(r)
            sh.bench.cache = dict(run.cache)
        except BaseException:
            sh.close()
            raise
        sh._n_by_loop = r + 1
        return sh

    def _wrapped(self, model: nn.Module, tokenizer: Any, cfg: RunConfig) -> LM:
        Original.require_free(model)
        if not isinstance(model, PreTrainedModel) or hasattr(model, "peft_config"):
            raise UserError(
                f"model is a {type(model).__name__}: give a causal language model of transformers without adapters "
                "(merge_and_unload of PEFT gives one)"
            )
        if model.get_output_embeddings() is None:
            raise UserError(
                f"model is a {type(model).__name__}, which has no head over the vocabulary: give a causal language "
                "model (AutoModelForCausalLM)"
            )
        away = {str(parameter.device) for parameter in model.parameters() if parameter.device.type == "meta"}
        if away or len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
            raise UserError(
                f"the weights of model {type(model).__name__} are spread over devices or offloaded: load it on one "
                "device, without device_map"
            )
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise UserError(
                f"tokenizer is {tokenizer!r:.80}: give the tokenizer of the loaded model {cfg.model!r} "
                "(AutoTokenizer.from_pretrained)"
            )
        original = Original(model)
        try:
            lm = wrap(
                model,
                copy.deepcopy(tokenizer),
                cfg.model,
                cfg.max_prompt_tokens,
                temperature=cfg.temperature,
                top_p=cfg.top_p,
                date=cfg.date,
            )
            require_bands(lm, cfg)
        except BaseException:
            original.restore()
            raise
        self._original = original
        return lm

    def _start(self) -> None:
        self._run = MemoryRun([start_event(self.cfg, self.inputs)])
        self._n_by_loop = 0

    # --- one round by hand -----------------------------------------------------------------------------------------
    @property
    def bench(self) -> Bench:
        """Every step of a round, with the plugins of these settings."""
        self._plugins.use()  # another object may have put its own in the tables
        return self._bench

    @property
    def n_rounds(self) -> int:
        """Number of rounds that are baked."""
        return self.student.n_rounds

    def extract(self) -> Vector:
        """The steering vector of the student as it is now: a direction [d] for each block of `steer.layers`."""
        self.vector = self.bench.extract()
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
        asked = [prompts] if isinstance(prompts, str) else list(prompts)
        plain = self.inputs.trait.plain_system
        condition = Condition(plain if system is None else system, self._used(vector) if dose else None, dose)
        seeds = [derive_seed(self.cfg.seed, "write", i) for i in range(len(asked))]
        asks = [Ask(i, prompt, seed, alpha=dose) for i, (prompt, seed) in enumerate(zip(asked, seeds, strict=True))]
        texts = self.bench.write(condition, asks, adapters=adapters)
        rows = [(c.prompt, c.text, c.dose, len(c.completion_ids)) for c in texts]
        schema = {"prompt": pl.String, "text": pl.String, "dose": pl.Float64, "n_tokens": pl.Int64}
        return pl.DataFrame(rows, schema=schema, orient="row")

    def collect(self, vector: Vector | None = None, kappa: float | None = None) -> Collected:
        """Text for the heal: written, filtered, and spread over the prompts, with the dose that was found. What was
        healed and not baked is dropped.

        UserError (`Starved`) where the filter keeps too few, and for a `vector` or `kappa` that heal.teacher does not
        use.

        Args:
            vector: In place of the last one. Where there is none, it is extracted.
            kappa: The multiplier of gen.alphas. None: `dose.mode` chooses it.
        """
        self._require_steered(vector=vector, kappa=kappa)
        self._require_fits(vector)
        self.discard()
        used = self._used(vector)
        self.teacher = None
        self.collected = self.bench.collect(Recipe.of(self.cfg), self.n_rounds, used, kappa=kappa)
        return self.collected

    def heal(
        self,
        collected: Collected | None = None,
        vector: Vector | None = None,
        on_step: Callable[[int | None, HealStep], object] = lambda r, step: None,
    ) -> HealReport:
        """Trains the factor of this round on collected text, the last by default. `bake` keeps it. `discard`, the next
        `heal` and the next `collect` drop it.

        `on_step` is called with round, from 0, and step after each optimiser step. A heal that fails, or is
        interrupted, leaves no factor. UserError where a loss is not finite, and for a `vector` that heal.teacher does
        not use.
        """
        self._require_steered(vector=vector)
        self._require_fits(vector)
        self.discard()
        used = self._used(vector)
        collected = collected or self.collected or self.collect(vector)
        recipe = Recipe.of(self.cfg)
        self.teacher = self.bench.make_teacher(recipe, used, collected)
        try:
            r = self.n_rounds
            return self.bench.heal(
                recipe, r, collected, self.teacher, on_step=lambda state: on_step(r, state.steps[-1])
            )
        except BaseException:
            self.discard()
            raise
        finally:
            self.teacher = replace(self.teacher, states=None)

    def bake(self) -> None:
        """Keeps the factor of this round: the next one begins from here. UserError where nothing was healed."""
        if not self.student.is_open:
            raise UserError("nothing was healed since the last round; call heal() first")
        self._own = self.student.bake()
        self.teacher = self.collected = None  # of the student before

    def discard(self) -> None:
        """Drops what was healed and not baked."""
        self.student.discard_round()

    def reset(self) -> None:
        """Drops every round, and what was measured: the untouched model again."""
        self.student.reset()
        self.vector = self.collected = self.teacher = self._own = None
        self._start()

    def _strength(self, vector: Vector) -> float:
        """The strength of the contrast that teaches in this round: of its heal, else of its collected text. UserError
        where it is not known yet."""
        recipe = Recipe.of(self.cfg)
        if not recipe.uses_contrast or not self.cfg.heal.contrast_kl:
            return self.cfg.heal.contrast
        if self.teacher is None and self.collected is not None:
            self.teacher = self.bench.make_teacher(recipe, vector, self.collected)
        if self.teacher is None or self.teacher.strength is None:
            raise UserError("heal.contrast_kl chooses the strength of the contrast along collected text; collect first")
        return self.teacher.strength.strength

    def _require_steered(self, **given: object) -> None:
        """UserError if one of these is given and the teacher of the settings is not steered."""
        for name in [name for name, value in given.items() if value is not None]:
            Recipe.of(self.cfg).require_vector(name)

    def _require_fits(self, vector: Vector | None) -> None:
        """UserError where the vector has another shape than the model."""
        n, width = len(self.lm.blocks), self.lm.width
        for layer, direction in vector.directions.items() if vector is not None else ():
            if not 0 <= layer < n or direction.shape != (width,):
                raise UserError(
                    f"the vector has a direction of shape {list(direction.shape)} for block {layer}: model "
                    f"{self.lm.name!r} has blocks 0 to {n - 1} of width {width}; give a vector of this model"
                )

    def _used(self, vector: Vector | None) -> Vector:
        """The vector given, else the last one, else a new one. UserError where it does not fit the model."""
        self._require_fits(vector)
        self.vector = vector or self.vector
        return self.vector or self.extract()

    # --- measurements ------------------------------------------------------------------------------------------------
    @property
    def base(self) -> EvalResult:
        """The measurement of the untouched model, made once."""
        return Loop(self.bench, self._run).measure(base_state(self.inputs.trait))

    def evaluate(
        self, state: str | Condition = "healed", dose: float | None = None, vector: Vector | None = None
    ) -> EvalResult:
        """Every metric of one state; of all but the base also the 95 percent interval of its difference to it.

        UserError for a `dose` or `vector` of another state, or if heal.teacher uses no vector.

        Args:
            state: `base`; `prompted`, the base under the positive persona; `steered`, the teacher of the round (once
                it is baked, of the next one); `healed`, the student under the plain prompt; or a Condition of your own
                on the student, such as Condition("", vector, 0.3).
            dose: Dose of the vector of `steered`. None: that of the last collected text.
            vector: Vector of `steered`, in place of the last one.
        """
        trait = self.inputs.trait
        last = self.n_rounds if self.student.is_open else max(0, self.n_rounds - 1)
        if state != "steered" and (dose is not None or vector is not None):
            raise UserError(f"state is {state!r}: only steered has a dose and a vector; leave them out")
        if state == "base":
            return self.base
        if isinstance(state, Condition):
            asked = State(name="healed", round=last, condition=state)
        elif state == "prompted":
            asked = prompted_state(trait)
        elif state == "healed":
            asked = healed_state(last, trait)
        elif state == "steered":
            self._require_steered(dose=dose, vector=vector)
            if dose is None:
                if self.collected is None and Recipe.of(self.cfg).uses_vector:
                    raise UserError("dose is None: nothing was collected that chose one; give a dose")
                dose = self.collected.dose if self.collected else 0.0
            used = self._used(vector)
            teacher = Recipe.of(self.cfg).teacher_condition(trait, used, dose, self._strength(used))
            asked = steered_state(self.n_rounds, teacher)
        else:
            raise UserError(f"state is {state!r}: {nearest(state, STATES)}")
        return self.bench.measure(asked, self.base)

    def loop(
        self,
        n_rounds: int | None = None,
        *,
        on_step: Callable[[int | None, HealStep], object] = lambda r, step: None,
        on_round: Callable[[RoundDone | Dropped], object] = lambda event: None,
        bar: bool = False,
    ) -> pl.DataFrame:
        """Rounds with all their measurements, as the command does them; returns `table`.

        Rounds are counted in all, so that a second call with a higher number goes on. One that was stopped goes on
        where it was stopped. UserError where a round was baked by hand before.

        Args:
            n_rounds: None: as the settings say.
            on_step: Called with round, from 0 (None: the control), and step, after each optimiser step.
            on_round: Called with the event of a round that was kept or dropped.
            bar: Whether a progress bar is drawn on stderr, in a notebook too.
        """
        if self.n_rounds != self._n_by_loop:
            raise UserError(
                f"{self.n_rounds} rounds are baked, of which loop did {self._n_by_loop}; call reset(), or go on by hand"
            )
        self.discard()
        cfg = self.cfg if n_rounds is None else changed(self.cfg, {"n_rounds": n_rounds})
        self._run.asked_rounds = cfg.n_rounds
        progress = SILENT
        if bar:
            from steer_heal.report.console import Bar

            progress = Bar(self._run, quiet=False, always=True)
        loop = Loop(replace(self.bench, cfg=cfg), self._run, progress)

        def tell(event: AnyEvent) -> None:
            if isinstance(event, HealStepped):
                on_step(event.round, event.step)
            elif isinstance(event, RoundDone | Dropped):
                on_round(event)

        self._run.subscribers = [tell]
        try:
            run_loop(loop)
        finally:
            self._run.subscribers = []
            rounds = [event.round for event in self._run.each(Trained) if event.round is not None]
            loop.rewind(len(rounds))
            self._n_by_loop = self.n_rounds
            if vectors := self._run.each(Extracted):
                self.vector = self._run.vector(vectors[-1].round or 0)
            if rounds:
                self._own = self._run.own_factors(rounds[-1])
        return self.table()

    @property
    def events(self) -> list[AnyEvent]:
        """Everything that `loop` measured and wrote, but for the steps of heals. spec.md lists the fields."""
        return list(self._run.events)

    def table(self) -> pl.DataFrame:
        """The states that `loop` measured, one a row: the target, its shift from base with the interval, retain, slope,
        and the other metrics that a report shows."""
        return pl.DataFrame(table(self._run), infer_schema_length=None)

    def verdict(self) -> str:
        """What the measurements of `loop` say, by the rules in spec.md."""
        return verdict(self._run)

    def report(self, file: str | Path) -> Path:
        """Writes report.html of what `loop` measured, under this name."""
        from steer_heal.report.page import page  # matplotlib: a second

        path = Path(file)
        with atomic_write(path) as part:
            part.write_text(page(self._run, path.stem), encoding="utf-8", newline="\n")
        return path

    # --- files -------------------------------------------------------------------------------------------------------
    def save(self, folder: str | Path) -> Path:
        """Writes the baked rounds as a PEFT adapter folder, with the factor of the last round beside it.

        UserError where nothing is baked, or the folder is not empty.
        """
        if self._own is None:
            raise UserError("no round is baked: there is nothing to save; call loop(), or heal() and bake()")
        own = self._own
        path = Path(folder)
        write_folder(path, lambda part: self.student.save(part, own))
        return path

    def export(
        self,
        folder: str | Path,
        format: Form = "hf",
        *,
        adapter_scale: float = 1.0,
        rank: int | None = None,
        quantization: Quantization | None = None,
    ) -> Path:
        """Writes the baked rounds for another program. UserError where the folder is not empty, where a round is healed
        and not baked, and for what the format cannot hold.

        Args:
            format: `hf`, a merged model for transformers; `peft`, an adapter folder; `gguf-lora`, an adapter for
                llama.cpp; `gguf`, a merged model for llama.cpp.
            adapter_scale: Factor from -4 to 4 by which the effect of the rounds is multiplied. -1 reverses it.
            rank: Rank to which an adapter is cut. None: its own.
            quantization: `f16` (also None) or `q8_0`, of a merged GGUF.
        """
        if self.student.is_open:
            raise UserError("a round is healed and not baked; call bake() to export it too, or discard()")
        path = Path(folder)
        with _no_bars():
            export(self.student, path, format, adapter_scale=adapter_scale, rank=rank, quantization=quantization)
        return path

    def close(self) -> None:
        """Drops every round and takes the adapters out; a model that was handed in is as it was before."""
        self.student.detach()
        if self._original is not None:
            self._original.restore()
            self._original = None

    def __repr__(self) -> str:
        rounds = plural(self.n_rounds, "round")
        return f"SteerHeal({self.cfg.model!r}, trait {self.inputs.trait.name!r}, {rounds} baked)"

    def __enter__(self) -> SteerHeal:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def metrics_frame(results: Mapping[str, EvalResult]) -> pl.DataFrame:
    """Results of `evaluate` by name, one a row: `state` and every metric."""
    rows = [{"state": name, **result.metrics} for name, result in results.items()]
    return pl.DataFrame(rows, infer_schema_length=None)


def _base_settings(settings: RunConfig | Mapping[str, Any] | None, preset: str) -> RunConfig:
    """The settings as they are, or the preset's with these changes."""
    require_preset(preset)
    if isinstance(settings, RunConfig):
        return settings
    logging.getLogger("steer_heal").info("preset %s: %s", preset, PRESETS[preset][0])
    return changed(PRESETS[preset][1], settings or {})


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
