"""One round, step by step: plain functions of a student and the parsed inputs. No files, no events, no console.

    vector = extract(student, inputs, cfg)
    collected = collect(student, vector, inputs, cfg, r)
    measure(student, inputs, cfg, vector=vector, dose=collected.top_dose)
    heal(student, collected, cfg, r)
    student.bake()
    measure(student, inputs, cfg)

The session, the scripts and the benchmarks all call these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from steer_heal.evals import EVALS
from steer_heal.evals.base import Condition, Subject, evaluate
from steer_heal.inputs import Inputs
from steer_heal.model.decode import Decoding
from steer_heal.model.lm import LM, load
from steer_heal.model.steering import Vector
from steer_heal.model.student import AdapterState, Student
from steer_heal.model.targets import targets
from steer_heal.records import Calibration, Collected, Completion, EvalResult, HealReport, Scored, derive_seed
from steer_heal.settings import RunConfig
from steer_heal.stages import heal as heal_stage
from steer_heal.stages.calibrate import iso_kl_dose
from steer_heal.stages.dose import DoseController
from steer_heal.stages.filter import score
from steer_heal.stages.generate import Ask, Known, generate
from steer_heal.stages.heal import HealState, SavedHeal
from steer_heal.stages.vector import student_vec, teacher_vec

CALIBRATION_PROMPTS = 8


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
    )


def load_model(cfg: RunConfig) -> LM:
    """The model that the settings name, to be steered and healed. UserError where it has no block in one of the bands
    of the settings, or nothing there that can be adapted."""
    lm = read_model(cfg)
    lm.band("steer.layers", cfg.steer.layers)
    targets(lm, cfg.adapter.layers)
    return lm


def extract(student: Student, inputs: Inputs, cfg: RunConfig) -> Vector:
    """The steering vector of the student as it is now."""
    with student.using("full") as lm:
        return teacher_vec(lm, inputs.trait, inputs.contexts, cfg.steer)


def direction(student: Student, inputs: Inputs, cfg: RunConfig) -> Vector:
    """Where the adapters moved the residual stream, on the blocks of the steering vector."""
    return student_vec(student, inputs.trait, inputs.contexts, cfg.steer)


def calibrate(student: Student, vector: Vector, inputs: Inputs, cfg: RunConfig) -> Calibration:
    """The dose of mode iso_kl, and every dose that was probed."""
    with student.using("full") as lm:
        prompts = [lm.chat(prompt, inputs.trait.steered_system) for prompt in inputs.prompts[:CALIBRATION_PROMPTS]]
        return iso_kl_dose(lm, vector, prompts, cfg.dose.kl_target, cfg.dose.kl_tokens, cfg.gen.batch_size)


def known_kappa(student: Student, vector: Vector, inputs: Inputs, cfg: RunConfig) -> float | None:
    """kappa where it does not depend on what survives the filter; None in mode survival."""
    if cfg.dose.mode == "iso_kl":
        return calibrate(student, vector, inputs, cfg).dose / max(cfg.gen.alphas)
    return cfg.dose.kappa if cfg.dose.mode == "fixed" else None


def write(
    student: Student,
    vector: Vector | None,
    asks: Sequence[Ask],
    inputs: Inputs,
    cfg: RunConfig,
    known: Known | None = None,
    on_batch: Callable[[Sequence[Completion]], None] = lambda batch: None,
) -> list[Completion]:
    """Completions of the student: steered by `vector`, or unsteered under the plain prompt. See `generate`."""
    trait, how = inputs.trait, Decoding(cfg.gen.max_new_tokens, cfg.gen.batch_size)
    system = trait.plain_system if vector is None else trait.steered_system
    with student.using("full") as lm:
        return generate(lm, asks, vector, system, trait.plain_system, how, known, on_batch)


def judge(student: Student, completions: Sequence[Completion], inputs: Inputs, cfg: RunConfig) -> list[Scored]:
    """Completions with the number of every gate, under the base."""
    with student.using("base") as lm:
        return score(lm, completions, inputs.trait.plain_system, inputs.trait.narration, cfg.filter)


def collect(
    student: Student,
    vector: Vector | None,
    inputs: Inputs,
    cfg: RunConfig,
    r: int,
    kappa: float | None = None,
    known: Known | None = None,
    on_batch: Callable[[Sequence[Completion]], None] = lambda batch: None,
) -> Collected:
    """Kept completions of round r at the dose that cfg.dose chooses, or at `kappa`. Without a vector: unsteered text.

    Starved where the filter keeps too few. `known` and `on_batch`: see `generate`.
    """
    alphas, stage = (cfg.gen.alphas, "gen") if vector is not None else ((0.0,), "control")
    if kappa is None:
        kappa = 1.0 if vector is None else known_kappa(student, vector, inputs, cfg)
    controller = DoseController(inputs.prompts, alphas, cfg.dose, cfg.filter, (cfg.seed, r, stage), kappa)
    while asks := controller.next_asks():
        completions = write(student, vector, asks, inputs, cfg, known, on_batch)
        controller.add(judge(student, completions, inputs, cfg))
    return controller.collected()


def measure(
    student: Student,
    inputs: Inputs,
    cfg: RunConfig,
    base: EvalResult | None = None,
    *,
    adapters: AdapterState = "full",
    system: str = "",
    vector: Vector | None = None,
    dose: float = 0.0,
) -> EvalResult:
    """Every metric of one state, with intervals against `base`. `system` is the trait's plain prompt by default."""
    condition = Condition(system or inputs.trait.plain_system, vector, dose)
    subject = Subject(student, adapters, condition, inputs, cfg.eval, cfg.filter, cfg.seed, base)
    return evaluate(subject, [EVALS[name] for name in cfg.eval.evals])


def heal(
    student: Student,
    collected: Collected,
    cfg: RunConfig,
    r: int,
    on_step: Callable[[HealState], None] = lambda state: None,
    saved: SavedHeal | None = None,
) -> HealReport:
    """Trains the factor of round r on the kept completions; `student.bake()` keeps it, `discard_round()` drops it.

    `on_step` and `saved`: see stages/heal.py.
    """
    seed = derive_seed(cfg.seed, r, "control" if r < 0 else "heal")
    return heal_stage.heal(student, collected.completions, r, cfg.heal, seed, on_step, saved)
