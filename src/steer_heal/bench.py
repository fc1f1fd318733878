"""A model, its inputs and its settings on the bench: every step of a round as a method. No files, events or console.

    vector = bench.extract()
    collected = bench.collect(recipe, r, vector)
    teacher = bench.make_teacher(recipe, vector, collected)
    bench.measure(steered_state(r, teacher.condition))
    bench.heal(recipe, r, collected, teacher)
    bench.student.bake()
    bench.measure(healed_state(r, bench.trait))

The loop, the library, the questions of `diag` and the benchmarks call these.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from steer_heal.errors import UserError
from steer_heal.evals import EVALS
from steer_heal.evals.base import Eval, Subject, evaluate
from steer_heal.events import Chat, Weights
from steer_heal.inputs import Inputs
from steer_heal.inputs.attacks import attacked
from steer_heal.model.decode import Decoding
from steer_heal.model.digests import digests
from steer_heal.model.lm import LM, load, weights_digest
from steer_heal.model.state import State
from steer_heal.model.steering import Condition, Vector, weighted
from steer_heal.model.student import AdapterState, Student
from steer_heal.model.template import USER
from steer_heal.progress import SILENT, Progress
from steer_heal.recipe import Recipe
from steer_heal.records import (
    Calibration,
    Collected,
    Completion,
    EvalResult,
    HealReport,
    Scored,
    Strength,
    Trait,
    derive_seed,
)
from steer_heal.settings import HealCfg, RunConfig
from steer_heal.stages import heal as heal_stage
from steer_heal.stages.calibrate import contrast_strength, iso_kl_dose, mean_kl
from steer_heal.stages.dose import DoseController, require_enough
from steer_heal.stages.filter import score_texts
from steer_heal.stages.generate import Ask, Known, OnBatch, generate
from steer_heal.stages.heal import HealState, SavedHeal
from steer_heal.stages.readable import require_readable
from steer_heal.stages.states import term_states
from steer_heal.stages.vector import student_vec, teacher_vec

CALIBRATION_PROMPTS = 8
GOLDEN = 0.618034
"""Multiples of it, modulo 1, are spread evenly."""


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """What a heal learns from."""

    condition: Condition
    """What makes it out of the student."""
    strength: Strength | None = None
    """Of its contrast. None: it has none."""
    states: Sequence[Tensor] | None = None
    """Its final hidden states on the collected text, each Float[n d]. None: not read yet."""


def read_model(cfg: RunConfig) -> LM:
    """The model that the settings name."""
    return load(
        cfg.model,
        device=cfg.device,
        dtype=cfg.dtype,
        max_prompt_tokens=cfg.max_prompt_tokens,
        quantize=cfg.quantize,
        temperature=cfg.temperature,
        top_p=cfg.top_p,
        date=cfg.date,
        accept_terms=cfg.accept_terms,
    )


def load_model(cfg: RunConfig) -> LM:
    """The model that the settings name, ready to be steered and healed. UserError: see `require_bands`."""
    lm = read_model(cfg)
    require_bands(lm, cfg)
    return lm


def weights_of(lm: LM) -> Weights:
    """What the base weights of a model are, and what else of it shapes the numbers."""
    return Weights(**weights_digest(lm.model), parts=digests(lm), note=lm.weights_note)


def chat_of(lm: LM) -> Chat:
    """How the model's chat template writes a conversation."""
    template = lm.template
    return Chat(
        date=template.date,
        opening=template.conversation([USER]).rpartition(USER)[2] + template.space,
        ends=tuple(lm.decode([i], special=True) for i in sorted(lm.end_ids)),
        takes_system=template.takes_system,
    )


def require_bands(lm: LM, cfg: RunConfig) -> None:
    """UserError where the model has no block in one of the bands of the settings, no weight there to adapt, or weights
    that an adapter would not act on alike while it trains and when it is measured."""
    lm.band("steer.layers", cfg.steer.layers)
    Student(lm, cfg.adapter).require_sound()


@dataclass
class Bench:
    """What every step needs."""

    cfg: RunConfig
    inputs: Inputs
    student: Student
    cache: MutableMapping[str, Any] = field(default_factory=dict, kw_only=True)
    """What evals keep between measurements: see `Subject.cache`."""

    def __post_init__(self) -> None:
        """UserError: see `require_readable`."""
        require_readable(self.student.lm, self.inputs, self.cfg)

    @property
    def trait(self) -> Trait:
        return self.inputs.trait

    @property
    def plain(self) -> Condition:
        """The plain prompt, without a vector."""
        return Condition(self.trait.plain_system)

    def make_teacher(
        self, recipe: Recipe, vector: Vector, collected: Collected, known: Strength | None = None
    ) -> Teacher:
        """The teacher of a heal on the collected text. A contrast reads the text to find its strength, unless it is
        `known`. UserError if no strength reaches heal.contrast_kl."""
        cfg = self.cfg.heal

        def at(strength: float) -> Condition:
            return recipe.teacher_condition(self.trait, vector, collected.dose, strength)

        condition = at(cfg.contrast)
        if condition.contrast is None:
            return Teacher(condition=condition)
        if known is not None:
            return Teacher(condition=at(known.strength), strength=known)
        texts = collected.completions
        with self.student.using("full", exact=True) as lm:
            readings = [term_states(lm, texts, vector, term) for term in condition.terms]
            strength: float | None = cfg.contrast
            if cfg.contrast_kl:
                difference = [p.float() - n.float() for p, n in zip(*readings[1:], strict=True)]
                strength = contrast_strength(lm, readings[0], difference, cfg.contrast_kl)
            if strength is None:
                raise UserError(
                    f"heal.contrast_kl is {cfg.contrast_kl:g}: no strength of the contrast moves the student that far; "
                    "lower it, or give --heal.contrast in its place",
                    resumable=False,
                )
            states = [weighted(at(strength).weights, each) for each in zip(*readings, strict=True)]
            found = Strength(strength, mean_kl(lm, states, readings[0]))
        return Teacher(condition=at(strength), strength=found, states=states)

    # --- vectors -------------------------------------------------------------------------------------------------
    def extract(self) -> Vector:
        """The steering vector of the student as it is now."""
        with self.student.using("full") as lm:
            return teacher_vec(lm, self.trait, self.inputs.contexts, self.cfg.steer)

    def direction(self) -> Vector:
        """Where the adapters moved the residual stream, on the blocks of the steering vector."""
        return student_vec(self.student, self.trait, self.inputs.contexts, self.cfg.steer)

    # --- text ----------------------------------------------------------------------------------------------------
    def write(
        self,
        condition: Condition,
        asks: Sequence[Ask],
        *,
        adapters: AdapterState = "full",
        max_new_tokens: int | None = None,
        known: Known | None = None,
        on_batch: OnBatch = lambda batch: None,
    ) -> list[Completion]:
        """Completions of the student under `condition`, each at the dose of its request. See `generate`."""
        how = Decoding(max_new_tokens or self.cfg.gen.max_new_tokens, self.cfg.gen.batch_size)
        with self.student.using(adapters) as lm:
            return generate(
                lm, asks, condition, plain_system=self.trait.plain_system, how=how, known=known, on_batch=on_batch
            )

    def score(self, completions: Sequence[Completion]) -> list[Scored]:
        """Completions with the number of every gate, under the base."""
        with self.student.using("base") as lm:
            return score_texts(lm, completions, trait=self.trait, hold=self.inputs.hold, cfg=self.cfg.filter)

    def calibrate(self, recipe: Recipe, r: int, vector: Vector) -> Calibration:
        """The dose of mode iso_kl, and every dose that was probed."""
        prompts = self.inputs.prompts[:CALIBRATION_PROMPTS]
        asks = [Ask(i, prompt, derive_seed(self.cfg.seed, r, "kl", i)) for i, prompt in enumerate(prompts)]
        texts = self.write(self.plain, asks, max_new_tokens=self.cfg.dose.kl_tokens)
        with self.student.using("full") as lm:
            dosed = recipe.dosed_condition(self.trait, vector, 1.0)
            return iso_kl_dose(lm, dosed, texts, self.cfg.dose.kl_target)

    def known_kappa(self, recipe: Recipe, r: int, vector: Vector) -> float | None:
        """kappa where it does not depend on what survives the filter; None in mode survival."""
        if not recipe.uses_vector:
            return 1.0
        if self.cfg.dose.mode == "iso_kl":
            return self.calibrate(recipe, r, vector).dose / max(self.cfg.gen.alphas)
        return self.cfg.dose.kappa if self.cfg.dose.mode == "fixed" else None

    def collect(
        self,
        recipe: Recipe,
        r: int | None,
        vector: Vector | None,
        *,
        kappa: float | None = None,
        known: Known | None = None,
        on_batch: OnBatch = lambda batch: None,
    ) -> Collected:
        """The text of one heal, filtered, and the teacher's dose. Without a `kappa` cfg.dose chooses it.

        The control needs no vector. `known` and `on_batch`: see `generate`. Starved where the filter keeps too few.
        """
        top = max(self.cfg.gen.alphas)

        def fill(
            controller: DoseController, condition: Condition, change: Callable[[Ask], Ask] = lambda ask: ask
        ) -> DoseController:
            while asks := controller.next_asks():
                asked = [change(ask) for ask in asks]
                controller.add(self.score(self.write(condition, asked, known=known, on_batch=on_batch)))
            return controller

        if recipe.teacher is None:
            found = fill(self._controller(recipe, r, "control"), self.plain).collected()
        else:
            assert vector is not None
            if kappa is None and r is not None:
                kappa = self.known_kappa(recipe, r, vector)
            if recipe.text == "own":  # the teacher's text only chooses the dose
                dosed = recipe.dosed_condition(self.trait, vector, top)
                search = fill(self._controller(recipe, r, "gen", alphas=(top,), kappa=kappa, probes_only=True), dosed)
                own = fill(self._controller(recipe, r, "own"), self.plain, self._under_attacks(recipe.hold)).collected()
                assert search.kappa is not None
                found = replace(
                    own,
                    scored=(*search.scored, *own.scored),
                    train=tuple(len(search.scored) + i for i in own.train),
                    kappa=search.kappa,
                    probes=tuple(search.probes),
                    dose=search.kappa * top if recipe.uses_vector else 0.0,
                )
            else:
                teacher = recipe.teacher_condition(self.trait, vector, top, self.cfg.heal.contrast)
                alphas = self.cfg.gen.alphas if recipe.uses_vector else (0.0,)
                found = fill(self._controller(recipe, r, "gen", alphas=alphas, kappa=kappa), teacher).collected()
        require_enough(found, self.cfg.filter, own=recipe.text == "own")
        return replace(found, rehearsal=self._rehearsal(recipe, r, known, on_batch))

    def _controller(
        self,
        recipe: Recipe,
        r: int | None,
        stage: str,
        *,
        alphas: Sequence[float] = (0.0,),
        kappa: float | None = 1.0,
        probes_only: bool = False,
    ) -> DoseController:
        return DoseController(
            self.inputs.prompts,
            alphas,
            cfg=self.cfg.dose,
            keep=self.cfg.filter,
            seed=(self.cfg.seed, recipe.stream(r), stage),
            kappa=kappa,
            probes_only=probes_only,
        )

    def _under_attacks(self, share: float) -> Callable[[Ask], Ask]:
        """What puts a share of the requests, in the order of its calls, under one attack after the other."""
        n_asked = n_held = 0

        def change(ask: Ask) -> Ask:
            nonlocal n_asked, n_held
            n_passes = n_asked // len(self.inputs.prompts)
            phase = n_asked * share + n_passes * GOLDEN  # so that a prompt is not held each time that it comes
            n_asked += 1
            if phase % 1 >= share:
                return ask
            attack = self.inputs.hold[n_held % len(self.inputs.hold)]
            n_held += 1
            asked = attacked(attack, ask.prompt, self.trait)
            taught = None if attack.opposes else replace(asked, system=None)
            return replace(ask, attack=attack.name, conversation=asked, taught=taught)

        return change

    def _rehearsal(
        self, recipe: Recipe, r: int | None, known: Known | None, on_batch: OnBatch
    ) -> tuple[Completion, ...]:
        """What the base writes on prompts that have nothing to do with the trait."""
        if not recipe.rehearsal:
            return ()
        n = len(self.inputs.rehearsal)
        assert n == recipe.rehearsal, f"the inputs hold {n} prompts, heal.rehearsal is {recipe.rehearsal}: load again"
        seeds = [derive_seed(self.cfg.seed, recipe.stream(r), "rehearsal", i) for i in range(n)]
        asks = [Ask(i, self.inputs.rehearsal[i], seed) for i, seed in enumerate(seeds)]
        return tuple(self.write(self.plain, asks, adapters="base", known=known, on_batch=on_batch))

    # --- heal ----------------------------------------------------------------------------------------------------
    def heal(
        self,
        recipe: Recipe,
        r: int | None,
        collected: Collected,
        teacher: Teacher | None = None,
        *,
        settings: HealCfg | None = None,
        on_step: Callable[[HealState], object] = lambda state: None,
        saved: SavedHeal | None = None,
        n_steps: int | None = None,
    ) -> HealReport:
        """Trains the factor of round r. `student.bake()` keeps it, `student.discard_round()` drops it.

        The `teacher` is needed where its distribution is fitted. `settings` replace cfg.heal. `on_step`,
        `saved` and `n_steps`: see stages/heal.py.
        """
        cfg = settings or self.cfg.heal
        assert teacher is not None or recipe.fit == "tokens", "a distribution needs its teacher"
        if recipe.fit == "tokens":
            teacher = None
        condition = None if teacher is None else teacher.condition
        report = heal_stage.heal(
            self.student,
            collected.completions,
            cfg,
            round_=r,
            seed=recipe.heal_seed(self.cfg.seed, r),
            teacher=condition,
            taught=None if teacher is None else teacher.states,
            rehearsal=collected.rehearsal if teacher is not None else (),
            saved=saved,
            n_steps=n_steps,
            on_step=on_step,
        )
        self.student.require_same_forward([(*row.prompt_ids, *row.completion_ids) for row in collected.completions[:4]])
        return report

    # --- measurements --------------------------------------------------------------------------------------------
    def subject(self, state: State, base: EvalResult | None = None) -> Subject:
        """A state as the evals see it. `base` is what was measured of the untouched model."""
        return Subject(
            student=self.student,
            state=state,
            inputs=self.inputs,
            cfg=self.cfg.eval,
            keep=self.cfg.filter,
            seed=self.cfg.seed,
            base=base,
            cache=self.cache,
        )

    @property
    def evals(self) -> list[Eval]:
        """The evals of the settings, in their order."""
        return [EVALS[name] for name in self.cfg.eval.evals]

    def measure(self, state: State, base: EvalResult | None = None, progress: Progress = SILENT) -> EvalResult:
        """Every metric of one state; with a `base`, also the intervals of the difference to it. See `evaluate`."""
        return evaluate(self.subject(state, base), self.evals, progress)
