"""One round, step by step: plain functions of a student and the parsed inputs. No files, no events, no console.

    vector = extract(student, inputs, cfg)
    collected = collect(student, vector, inputs, cfg, r)
    measure(student, inputs, cfg, base, teacher(vector, collected.dose, inputs, cfg))
    heal(student, collected, inputs, cfg, r, vector)
    student.bake()
    measure(student, inputs, cfg)

The loop, the library, the scripts and the benchmarks all call these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from steer_heal.evals import EVALS
from steer_heal.evals.base import Subject, evaluate
from steer_heal.inputs import Inputs
from steer_heal.model.decode import Decoding
from steer_heal.model.lm import LM, load
from steer_heal.model.steering import Condition, Vector
from steer_heal.model.student import AdapterState, Student
from steer_heal.records import Calibration, Collected, Completion, EvalResult, HealReport, Scored, derive_seed
from steer_heal.settings import RunConfig
from steer_heal.stages import heal as heal_stage
from steer_heal.stages.calibrate import iso_kl_dose
from steer_heal.stages.dose import DoseController, require_enough
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
    """The model that the settings name, to be steered and healed. UserError: see require_bands."""
    lm = read_model(cfg)
    require_bands(lm, cfg)
    return lm


def require_bands(lm: LM, cfg: RunConfig) -> None:
    """UserError where the model has no block in one of the bands of the settings, or nothing there to adapt."""
    lm.band("steer.layers", cfg.steer.layers)
    Student(lm, cfg.adapter).adapter.unadapted()


def extract(student: Student, inputs: Inputs, cfg: RunConfig) -> Vector:
    """The steering vector of the student as it is now."""
    with student.using("full") as lm:
        return teacher_vec(lm, inputs.trait, inputs.contexts, cfg.steer)


def direction(student: Student, inputs: Inputs, cfg: RunConfig) -> Vector:
    """Where the adapters moved the residual stream, on the blocks of the steering vector."""
    return student_vec(student, inputs.trait, inputs.contexts, cfg.steer)


def teacher(vector: Vector | None, dose: float, inputs: Inputs, cfg: RunConfig) -> Condition:
    """What makes the teacher out of the student: the vector, the persona as system prompt, or both."""
    trait, made_of = inputs.trait, cfg.heal.teacher
    system = trait.steered_system if made_of == "vector" else trait.positive
    return Condition(system, *((None, 0.0) if made_of == "prompt" else (vector, dose)))


def calibrate(student: Student, vector: Vector, inputs: Inputs, cfg: RunConfig, r: int) -> Calibration:
    """The dose of mode iso_kl, and every dose that was probed."""
    prompts = inputs.prompts[:CALIBRATION_PROMPTS]
    asks = [Ask(i, prompt, 0.0, 1.0, derive_seed(cfg.seed, r, "kl", i)) for i, prompt in enumerate(prompts)]
    short = replace(cfg, gen=replace(cfg.gen, max_new_tokens=cfg.dose.kl_tokens))
    texts = write(student, Condition(inputs.trait.plain_system), asks, inputs, short)
    with student.using("full") as lm:
        return iso_kl_dose(lm, teacher(vector, 1.0, inputs, cfg), texts, cfg.dose.kl_target)


def known_kappa(student: Student, vector: Vector, inputs: Inputs, cfg: RunConfig, r: int) -> float | None:
    """kappa where it does not depend on what survives the filter; None in mode survival."""
    if cfg.heal.teacher == "prompt":
        return 1.0
    if cfg.dose.mode == "iso_kl":
        return calibrate(student, vector, inputs, cfg, r).dose / max(cfg.gen.alphas)
    return cfg.dose.kappa if cfg.dose.mode == "fixed" else None


def write(
    student: Student,
    condition: Condition,
    asks: Sequence[Ask],
    inputs: Inputs,
    cfg: RunConfig,
    known: Known | None = None,
    on_batch: Callable[[Sequence[Completion]], None] = lambda batch: None,
    adapters: AdapterState = "full",
) -> list[Completion]:
    """Completions of the student under `condition`, each at the dose of its request. See `generate`."""
    plain, how = inputs.trait.plain_system, Decoding(cfg.gen.max_new_tokens, cfg.gen.batch_size)
    with student.using(adapters) as lm:
        return generate(lm, asks, condition.vector, condition.system, plain, how, known, on_batch)


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
    """Kept completions of round r: the teacher's, or with cfg.heal.text own the student's own, and the teacher's dose.
    cfg.dose chooses it unless `kappa` is given. Beside them what the base writes for the rehearsal. Without a vector:
    the student's own, for the control.

    Starved where the filter keeps too few. `known` and `on_batch`: see `generate`.
    """
    plain, top = Condition(inputs.trait.plain_system), max(cfg.gen.alphas)
    who = plain if vector is None else teacher(vector, top, inputs, cfg)
    own = vector is None or cfg.heal.text == "own"
    if vector is None:
        kappa = 1.0
    elif kappa is None:
        kappa = known_kappa(student, vector, inputs, cfg, r)

    def controller(alphas: Sequence[float], stage: str, kappa: float | None, n_keep: int) -> DoseController:
        return DoseController(inputs.prompts, alphas, cfg.dose, cfg.filter, (cfg.seed, r, stage), kappa, n_keep)

    n_keep, alphas = cfg.filter.n_keep, cfg.gen.alphas if who.vector is not None else (0.0,)
    if own:  # the teacher's text chooses the dose, and none of it trains
        search = controller((top,), "gen", kappa, 0)
        trains = controller((0.0,), "control" if vector is None else "own", 1.0, n_keep)
        todo = [(search, who), (trains, plain)]
    else:
        search = trains = controller(alphas, "gen", kappa, n_keep)
        todo = [(search, who)]
    for each, condition in todo:
        while asks := each.next_asks():
            completions = write(student, condition, asks, inputs, cfg, known, on_batch)
            each.add(judge(student, completions, inputs, cfg))
    found = trains.collected()
    if own:
        assert search.kappa is not None
        scored, dose = (*search.scored, *found.scored), 0.0 if who.vector is None else search.kappa * top
        found = replace(found, scored=scored, kappa=search.kappa, probes=tuple(search.probes), dose=dose)
    require_enough(found, cfg.filter)
    if vector is not None and cfg.heal.rehearsal:
        n, wanted = len(inputs.rehearsal), cfg.heal.rehearsal
        assert n == wanted, f"the inputs hold {n} prompts to rehearse, heal.rehearsal is {wanted}: load them anew"
        seed = lambda i: derive_seed(cfg.seed, r, "rehearsal", i)
        asks = [Ask(i, prompt, 0.0, 1.0, seed(i)) for i, prompt in enumerate(inputs.rehearsal)]
        found = replace(found, rehearsal=tuple(write(student, plain, asks, inputs, cfg, known, on_batch, "base")))
    return found


def measure(
    student: Student,
    inputs: Inputs,
    cfg: RunConfig,
    base: EvalResult | None = None,
    condition: Condition | None = None,
    adapters: AdapterState = "full",
    on_eval: Callable[[int], object] = lambda i: None,
) -> EvalResult:
    """Every metric of one state, with intervals against `base`; without a condition, under the plain prompt.

    `on_eval`: see `evaluate`.
    """
    condition = condition or Condition(inputs.trait.plain_system)
    subject = Subject(student, adapters, condition, inputs, cfg.eval, cfg.filter, cfg.seed, base)
    return evaluate(subject, [EVALS[name] for name in cfg.eval.evals], on_eval)


def heal(
    student: Student,
    collected: Collected,
    inputs: Inputs,
    cfg: RunConfig,
    r: int,
    vector: Vector | None = None,
    on_step: Callable[[HealState], None] = lambda state: None,
    saved: SavedHeal | None = None,
) -> HealReport:
    """Trains the factor of round r; `student.bake()` keeps it, `discard_round()` drops it. Without a vector there is no
    teacher: tokens are fitted, as for the control.

    `on_step` and `saved`: see stages/heal.py.
    """
    seed = derive_seed(cfg.seed, r, "control" if r < 0 else "heal")
    settings, who = cfg.heal, None
    if vector is None:
        settings = replace(
            settings, target="tokens", text="steered", max_departure=0.0, refresh_every=0, refresh="text"
        )
    if vector is not None and settings.target == "distribution":
        who = teacher(vector, collected.dose, inputs, cfg)

    def renew(n: int, held_out: Sequence[int]) -> tuple[list[Scored], Condition | None]:
        own = [i for i in range(len(inputs.prompts)) if i not in held_out]
        n_texts = settings.batch_size * settings.refresh_every
        turn = [own[(n * n_texts + i) % len(own)] for i in range(n_texts)]
        seeds = [derive_seed(cfg.seed, r, "renew", n, i) for i in range(n_texts)]
        asks = [Ask(i, inputs.prompts[i], 0.0, 1.0, seed) for i, seed in zip(turn, seeds, strict=True)]
        texts = write(student, Condition(inputs.trait.plain_system), asks, inputs, cfg)
        now, again = who, settings.refresh == "teacher" and cfg.steer.refresh == "round"
        if again and who is not None and who.vector is not None:
            now = replace(who, vector=extract(student, inputs, cfg))
        return judge(student, texts, inputs, cfg), now

    online = renew if settings.refresh_every and vector is not None else None
    kept, rehearsal = collected.completions, collected.rehearsal if who is not None else ()
    return heal_stage.heal(student, kept, r, settings, seed, who, online, on_step, saved, rehearsal)
