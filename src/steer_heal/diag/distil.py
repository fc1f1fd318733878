"""Does the teacher's distribution put more of the trait into the weights than tokens do, at equal text and steps?

Every arm starts from the untouched model and heals --n-rounds rounds. The arms "prompt alone" and "vector alone" train
nothing. Each round is measured without a persona, under the OPPOSITE persona and, for the toy model, on everyday
questions. The last one is also measured at --scales of the adapter. Rows are appended to
<out>/distil-<preset>-<trait>.jsonl, with the settings that were given. Pairs of arm and seed that are already in this
file are skipped. If they have other settings there, nothing is run. The answers that were measured are appended to
<out>/distil-<preset>-<trait>-answers.jsonl, beside those of the base.
"""

import json
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from steer_heal.bench import Bench
from steer_heal.check import check
from steer_heal.diag.lab import Given, Lab, PresetFlags, Row, mean_sd, show
from steer_heal.errors import UserError, nearest
from steer_heal.evals.replies import reply_logp
from steer_heal.events import Contrasted, Gathered, Run, Trained, plain
from steer_heal.inputs import Inputs, load_inputs
from steer_heal.inputs.alike import alike
from steer_heal.inputs.traits import load_trait, other_traits
from steer_heal.loop import Loop, run_round
from steer_heal.model import decode
from steer_heal.model.adapter import HISTORY, ROUND
from steer_heal.model.steering import Condition
from steer_heal.progress import Progress
from steer_heal.recipe import Recipe
from steer_heal.records import Completion, EvalResult, Number, Trait, alone, derive_seed
from steer_heal.report import tables
from steer_heal.report.plot import frontier
from steer_heal.runs.stored import MemoryRun
from steer_heal.settings import RUN_ONLY, AdapterScale, HealCfg, RunConfig, changed, leaves, settings
from steer_heal.stages.calibrate import dose_at
from steer_heal.stages.generate import Ask
from steer_heal.stages.heal import heal
from steer_heal.stages.states import final_states
from steer_heal.toylm import grammar
from steer_heal.toylm.oracle import oracle
from steer_heal.verdict import kept_of


@dataclass(frozen=True)
class Arm:
    """What distinguishes a kind of round."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings that replace those of the preset."""
    control: bool = False
    """Train on the tokens of the student's own text."""
    preference: float = 0.0
    """Beta of the preference for the positive persona's text over the negative's. 0: the heal of the settings."""
    unrelated: bool = False
    """The personas of another trait teach: the first one by name."""
    signed: bool = False
    """Half the difference of two heals: one with the personas as they are, one with the two exchanged."""
    untrained: Literal["", "prompt", "vector"] = ""
    """Train nothing: the model has the positive persona as prompt, or the vector."""


N_CHAT = 48
TUNED_LR = 2e-4
"""Texts of everyday chat at most, and the peak learning rate on them."""

PLAIN = {"heal.contrast_kl": 0.0, "heal.hold": 0.0, "heal.rehearsal": 0}
TOKENS = {
    **PLAIN,
    "heal.target": "tokens",
    "heal.text": "steered",
    "heal.teacher": "vector",
    "heal.divergence": "kl_rev",
}
FREE = {**TOKENS, "heal.divergence": "none"}
FITS = {**FREE, "heal.target": "distribution"}
OWN = {**FITS, "heal.text": "own"}
SURVIVES = {"dose.mode": "survival", "dose.target": 0.95, "dose.floor": 0.05, "dose.n_kappas": 4, "dose.n_probes": 32}
ALONE = {**SURVIVES, "dose.ceiling": 1.0}
"""The dose of a vector that steers without a prompt."""
BOTH = {**SURVIVES, "dose.ceiling": 0.25, "heal.teacher": "prompt+vector"}
"""The vector beside a prompt, and its dose."""
REVERSE = {**OWN, **BOTH, "heal.kl": "reverse"}
PROMPT = {**OWN, "heal.kl": "reverse", "heal.teacher": "prompt"}
CONTRAST = {**OWN, "heal.kl": "reverse", "heal.teacher": "contrast", "heal.contrast_kl": 0.1}
ARMS = {
    "control": Arm(FREE, control=True),
    "tokens": Arm(TOKENS),
    "tokens, no barrier": Arm(FREE),
    "tokens of the prompted": Arm({**FREE, "heal.teacher": "prompt"}),
    "tokens of both": Arm({**FREE, **BOTH}),
    "vector, own text": Arm({**OWN, **ALONE}),
    "vector, its text": Arm({**FITS, **ALONE}),
    "prompt, own text": Arm({**OWN, "heal.teacher": "prompt"}),
    "prompt, its text": Arm({**FITS, "heal.teacher": "prompt"}),
    "both, own text": Arm({**OWN, **BOTH}),
    "both, their text": Arm({**FITS, **BOTH}),
    "both, own text, reverse": Arm(REVERSE),
    "both, 12 epochs": Arm({**REVERSE, "heal.epochs": 12}),
    "both, rehearsed": Arm({**REVERSE, "heal.epochs": 12, "heal.rehearsal": 16, "dose.ceiling": 0.5}),
    "prompt": Arm(PROMPT),
    "contrast": Arm(CONTRAST),
    "prompt, rehearsed": Arm({**PROMPT, "heal.rehearsal": 48}),
    "contrast, held": Arm({**CONTRAST, "heal.hold": 0.5}),
    "contrast, rehearsed": Arm({**CONTRAST, "heal.rehearsal": 48}),
    "contrast, held, rehearsed": Arm({**CONTRAST, "heal.hold": 0.5, "heal.rehearsal": 48}),
    "contrast and vector": Arm({**CONTRAST, **BOTH, "heal.teacher": "contrast+vector"}),
    "plain fine-tuning": Arm({**FREE, "heal.teacher": "prompt", "heal.lr": 2e-4}),
    "preference": Arm({**FREE, "heal.lr": 5e-5}, preference=0.1),
    "contrast of others": Arm(CONTRAST, unrelated=True),
    "contrast, signed": Arm(CONTRAST, signed=True),
    "prompt alone": Arm(untrained="prompt"),
    "vector alone": Arm(untrained="vector"),
    "a round an epoch": Arm({**REVERSE, "heal.epochs": 1}),
}
POINT = ("round", "scale")
"""Which point of an arm a row is: after which round, at which scale of the adapter (none: 1)."""
SHOWN = (
    *("shift", "contrast_nats", "degenerate_frac", "oracle", "text_tail_ppl_median", "kl_base", "opposite"),
    *("facts", "facts_apart", "facts_nats", "panel_rms_nats", "holds_nats", "kept", "worst", "everyday_right"),
    "instructions_right",
    *("strength", "closed_trained", "closed_held_out"),
)


@settings("")
class Flags(PresetFlags):
    also: ClassVar[tuple[str, ...]] = (
        *(name for name in PresetFlags.also if name != "seed"),
        *(name for name in leaves(RunConfig()) if name.startswith(("heal.", "dose.", "filter.", "eval.", "gen."))),
    )
    seeds: tuple[int, ...] = (41, 42, 43, 44, 45)
    """Seeds on which each arm is run."""
    arms: tuple[str, ...] = ()
    """Arms to run. Default: all that the preset has the prompts for."""
    n_rounds: int = 1
    """Number of rounds of each arm."""
    kappa: tuple[float, ...] = ()
    """Fixed kappa of each round, in order. The last one also holds for later rounds. Default: each arm's own dose
    settings apply."""
    tuned_steps: int = 0
    """Steps of plain fine-tuning on everyday chat after the rounds of an arm. The untouched model writes the chat. One
    more row shows how much of the trait remains."""
    scales: tuple[AdapterScale, ...] = ()
    """More scales of the adapter at which each arm is measured after its last round. 1 is as it was trained, and -1 is
    the reverse."""
    kl: float = 0.03
    """For the arm "vector alone": KL divergence to the untouched model, in nats per token."""
    null: float = 0.0
    """Null band of the trait, in nats per token, as `steer-heal diag teachable` prints it. The picture shows it.
    Only if the metric of the trait is contrast_nats."""
    label: str = ""
    """Text to append to the names of the arms. Use it to tell runs with other settings apart."""


def main(flags: Flags, given: Given) -> None:
    cfg = flags.settings({name: value for name, value in given.items() if not name.startswith("heal.")})
    path = flags.out / f"distil-{flags.preset}-{cfg.trait}.jsonl"
    answers = path.with_name(f"{path.stem}-answers.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    if unknown := [name for name in flags.arms if name not in ARMS]:
        raise UserError(f"arms holds {unknown[0]!r}: {nearest(unknown[0], ARMS)}")
    if 1 in flags.scales:
        raise UserError("scales holds 1: every arm is measured at 1; leave it out")
    once = flags.n_rounds == 1
    if not once and (signs := [name for name in flags.arms if ARMS[name].signed]):
        raise UserError(f"n_rounds is {flags.n_rounds}: it must be 1 with arm {signs[0]!r}; name other --arms")
    for flag in ("arms", "seeds", "scales"):
        if twice := [each for each, n in Counter(getattr(flags, flag)).items() if n > 1]:
            raise UserError(f"{flag} holds {twice[0]!r} twice; name it once")
    trait = checked_trait(cfg, flags.null)
    fit = (name for name, arm in ARMS.items() if (once or not arm.signed) and has_prompts(cfg, arm))
    names = flags.arms or tuple(fit)
    made = {name: with_settings(name, cfg, flags, given) for name in names}
    require_one_panel(cfg, made)
    arms = {name: arm for name, (arm, _) in made.items()}
    asked = {name: asked_for(name, flags, given, inputs) for name, (_, inputs) in made.items()}
    done = done_with(asked, flags, path)
    for seed in flags.seeds:
        todo = [name for name in names if (name + flags.label, seed) not in done]
        lab = Lab.of(replace(cfg, seed=seed)) if todo else None
        for name in todo:
            assert lab is not None
            arm = arms[name]
            rows, texts = [], []
            for row, result in untrained(lab, arm, flags.kl) if arm.untrained else rounds(lab, arm, flags):
                rows.append(
                    {"arm": name + flags.label + row.pop("then", ""), "seed": seed, **row, "asked": asked[name]}
                )
                beside = zip(result.texts, lab.base.texts, strict=True)
                told = [{"prompt": own.prompt, "base": base.text, "answer": own.text} for own, base in beside]
                which = {key: rows[-1][key] for key in ("arm", "seed", "round", "scale") if key in rows[-1]}
                texts.append(which | {"answers": told})
            append(answers, texts)
            append(path, rows)
            tables.show([{name: row.get(name) for name in ("arm", "seed", *POINT, *SHOWN, "dose")} for row in rows])
    rows = read_rows(path)
    should = (
        "prompt and both go further than tokens of the same teacher at no more broken text, otherwise the distribution "
        "adds nothing to plain fine-tuning.",
        "own text be as intact as the base's, otherwise the dose is past what the student can take.",
        "facts_apart, which are never rehearsed, stay where the control's are, otherwise more than the trait changed.",
        "control stay at 0: the shift comes from the teacher and not from the training.",
    )
    show(__doc__, over_seeds(rows), should, flags.out, "distil", per_seed=rows)
    costs = {"broken": "degenerate_frac", "panel": "panel_rms_nats"}
    points = [
        row | {"shift": trait.sign * row["shift"]} | {cost: row.get(name) for cost, name in costs.items()}
        for row in rows
    ]
    if (picture := frontier(points, flags.null)) is not None:
        picture.savefig(path.with_suffix(".png"), dpi=200)


def checked_trait(cfg: RunConfig, null: float) -> Trait:
    """The trait of the settings. UserError if they cannot be run, and for a null band where its metric is not that of
    the pairs."""
    trait = check(cfg).trait
    if null and trait.target != "contrast_nats":
        raise UserError(
            f"null is {null:g}: it is a shift of contrast_nats, and the metric of the trait is {trait.target}; leave "
            "it out, or leave the eval of that metric out of --eval.evals"
        )
    return trait


def asked_for(name: str, flags: Flags, given: Given, inputs: Inputs) -> Row:
    """The flags that change the rows of an arm, as JSON has them, and a digest of the files that it reads."""
    of = {"": ("n_rounds", "kappa", "tuned_steps", "scales"), "prompt": (), "vector": ("kl",)}
    own = {flag: getattr(flags, flag) for flag in of[ARMS[name].untrained]}
    own |= {name: value for name, value in given.items() if name not in ("device", *RUN_ONLY)}
    own["files"] = inputs.digest
    return json.loads(json.dumps(plain(own)))


def done_with(asked: Mapping[str, Row], flags: Flags, path: Path) -> set[tuple[str, int]]:
    """Arm and seed of each row of the file. UserError if one of those that are asked for has other settings there.
    `asked`: those that are asked for, by arm."""
    rows = {(row["arm"], row["seed"]): row for row in read_rows(path)}
    for name, now in asked.items():
        for seed in flags.seeds:
            then = rows.get((name + flags.label, seed), {}).get("asked", now)
            if other := [setting for setting in sorted(now | then) if now.get(setting) != then.get(setting)]:
                raise UserError(
                    f"{str(path)!r} holds arm {name + flags.label!r} of seed {seed} with other settings: "
                    f"{', '.join(other)}; give --label or another --out"
                )
    return set(rows)


def with_settings(name: str, cfg: RunConfig, flags: Flags, given: Given) -> tuple[Arm, Inputs]:
    """(the arm of this name with the settings that were given, what it reads). UserError if they contradict its own, or
    if the files hold too little for them."""
    own = {**ARMS[name].settings, **given, **({"dose.mode": "fixed"} if flags.kappa else {})}
    try:
        inputs = load_inputs(changed(cfg, own))
    except UserError as error:
        raise UserError(*(f"arm {name!r}: {problem}" for problem in error.problems)) from None
    return replace(ARMS[name], settings=own), inputs


def require_one_panel(cfg: RunConfig, made: Mapping[str, tuple[Arm, Inputs]]) -> None:
    """UserError if an arm rehearses the prompt of a pair of the panel on which the base and all arms are measured."""
    asked = {alike(pair.prompt) for pairs in load_inputs(cfg).panel.values() for pair in pairs}
    for name, (_, inputs) in made.items():
        if both := [text for text in inputs.rehearsal if alike(text) in asked]:
            raise UserError(
                f"arm {name!r} rehearses {both[0]!r:.80}, the prompt of a pair of the eval panel; remove it from the "
                "file, or give other --eval.pairs"
            )


def has_prompts(cfg: RunConfig, arm: Arm) -> bool:
    """Whether the files of a preset hold as many prompts as an arm rehearses."""
    with suppress(UserError):
        return bool(load_inputs(changed(cfg, arm.settings)))
    return False


def rounds(lab: Lab, arm: Arm, flags: Flags) -> Iterator[tuple[Row, EvalResult]]:
    """A row and what was measured for each round, from the untouched model, for the last one also at other scales of
    the adapter, and after fine-tuning on everyday chat."""
    cfg = changed(lab.bench.cfg, arm.settings)
    read = load_inputs(cfg)
    trait = lab.bench.trait
    if arm.unrelated:
        other = load_trait(other_traits(trait, lab.bench.inputs.pairs)[0])
        trait = replace(trait, positive=other.positive, negative=other.negative)
    bench = replace(
        lab.bench, cfg=cfg, inputs=replace(lab.bench.inputs, rehearsal=read.rehearsal, hold=read.hold, trait=trait)
    )
    recipe = replace(Recipe.control(), name="round") if arm.control else Recipe.of(cfg)
    loop = Loop(bench, MemoryRun(), lab.progress, measures_teacher=False)
    seconds = 0.0
    n_tokens = 0
    for r in range(flags.n_rounds):
        began = time.perf_counter()
        if flags.kappa:
            kappa = flags.kappa[min(r, len(flags.kappa) - 1)]
            loop.bench = replace(bench, cfg=changed(cfg, {"dose.kappa": kappa}))
        if arm.preference:
            written, row = prefer(loop.bench, r, arm.preference)
        elif arm.signed:
            written, row = signed(loop.bench, recipe, lab.progress)
        else:
            run_round(loop, recipe, r)
            written, row = trained(loop.run, r)
        seconds += time.perf_counter() - began
        n_tokens += sum(len(completion.completion_ids) for completion in written)
        result = lab.measure()
        yield {"round": r, **measured(lab, result), **row, "seconds": seconds, "n_tokens": n_tokens}, result
    last = {"round": flags.n_rounds - 1}
    for scale in flags.scales:
        with bench.student.scaled(scale):
            result = lab.measure()
            row = measured(lab, result)
        yield {**last, "scale": scale, **row}, result
    if flags.tuned_steps:
        n_steps = tune(bench, flags.tuned_steps)
        result = lab.measure()
        yield {"then": ", then chat", **last, **measured(lab, result), "n_steps": n_steps}, result
    bench.student.reset()


def trained(run: Run, r: int) -> tuple[list[Completion], Row]:
    """(all text of a round, columns that tell how it was made)."""
    collected = run.require(Gathered, r).collected
    heal = run.require(Trained, r)
    row = {"dose": collected.dose, "n_texts": len(collected.train)}
    row |= {"n_rehearsed": len(collected.rehearsal), **curve(heal.n_steps, heal.validation)}
    row |= {f"closed_{texts}": heal.closed(texts) for texts in ("trained", "held_out")}
    if (found := run.at(Contrasted, r)) is not None:
        row |= {"strength": found.found.strength, "teacher_kl": found.found.kl}
    return [scored.completion for scored in collected.scored], row


def signed(bench: Bench, recipe: Recipe, progress: Progress) -> tuple[list[Completion], Row]:
    """One round of a student that is half the difference of two: one healed towards the trait, one away from it.
    Returns what `trained` returns of the first."""
    student = bench.student
    found = []
    for sides in (("positive", "negative"), ("negative", "positive")):
        positive, negative = (getattr(bench.trait, side) for side in sides)
        trait = replace(bench.trait, positive=positive, negative=negative)
        loop = Loop(
            replace(bench, inputs=replace(bench.inputs, trait=trait)), MemoryRun(), progress, measures_teacher=False
        )
        run_round(loop, recipe, 0)
        found.append((*trained(loop.run, 0), student.history()))
        student.reset()
    (texts, row, towards), (_, _, away) = found
    student.take(towards, 1)
    student.adapter.attach(ROUND, away, 1)
    for name, factor in ((HISTORY, 0.5), (ROUND, -0.5)):
        for weight in student.adapter.outputs(name):
            weight.data *= factor
    student.bake()
    return texts, row


def untrained(lab: Lab, arm: Arm, kl: float) -> list[tuple[Row, EvalResult]]:
    """The row and what was measured of the untouched model under the positive persona, or under the vector at `kl` nats
    from itself. UserError if no dose is that far."""
    bench = lab.bench
    if arm.untrained == "prompt":
        condition = Condition(bench.trait.positive)
    else:
        prompts = bench.inputs.prompts[: bench.cfg.filter.n_keep]
        asks = [Ask(i, text, derive_seed(bench.cfg.seed, "steered", i)) for i, text in enumerate(prompts)]
        texts = bench.write(bench.plain, asks)
        condition = Condition(bench.trait.plain_system, lab.vector)
        with bench.student.using("full", exact=True) as lm:
            dose = dose_at(lm, condition, texts, final_states(lm, texts), kl)
        if dose is None:
            raise UserError(f"no dose of the vector is {kl:g} nats from the untouched model; give another --kl")
        condition = replace(condition, dose=dose)
    result = lab.measure(condition)
    return [({"round": 0, **measured(lab, result, condition), "dose": condition.dose}, result)]


def measured(lab: Lab, found: EvalResult, condition: Condition | None = None) -> Row:
    """The columns of a row that tell what was measured of the student, under a condition or the plain prompt."""
    bench = lab.bench
    condition = condition or bench.plain
    row = {"shifts": {name: lab.shift(found, metric) for name, metric in lab.metrics.items() if metric.moved}}
    if "panel" in found.items:
        row["panel_shifts"] = dict(zip(bench.inputs.panel, found.items["panel"], strict=True))
    base = lab.base.metrics
    row |= {name: base[name] for name in ("classifier_right", "classifier_email") if name in base}
    row |= {name: found.metrics[name] for name in ("everyday_lost", "everyday_gained") if name in found.metrics}
    held = kept_of(found.items, lab.base.items, bench.inputs.wording["attack"])
    if held is not None:
        row |= {
            "kept": held.mean,
            "worst": held.shares[held.worst],
            "worst_attack": held.worst,
            "kept_under": held.shares,
        }
    else:
        row |= {"opposite": lab.shift_under(replace(condition, system=bench.trait.negative))}
    return {**lab.row("", found), **everyday(bench, condition), **row}


def tune(bench: Bench, n_steps: int) -> int:
    """Fine-tunes the student on what the untouched model writes to everyday prompts, and bakes that.

    Returns the number of steps: whole epochs, at least n_steps.
    """
    cfg = bench.cfg
    prompts = bench.inputs.contexts[:N_CHAT]
    asks = [Ask(i, text, derive_seed(cfg.seed, "chat", i)) for i, text in enumerate(prompts)]
    texts = bench.write(bench.plain, asks, adapters="base")
    per_epoch = math.ceil((len(texts) - max(1, len(texts) // 8)) / cfg.heal.batch_size)
    same = {name: getattr(cfg.heal, name) for name in ("batch_size", "tokens_per_pass", "checkpoint")}
    settings = HealCfg(divergence="none", lr=TUNED_LR, epochs=math.ceil(n_steps / per_epoch), **same)
    report = heal(bench.student, texts, settings, round_=None, seed=derive_seed(cfg.seed, "chat"))
    bench.student.bake()
    return len(report.steps)


def prefer(bench: Bench, r: int, beta: float) -> tuple[list[Completion], Row]:
    """One round of direct preference optimisation (Rafailov et al. 2023), baked: (all text that was written, columns of
    the row).

    Text of the positive persona is preferred to text of the negative one. The two answer the same prompts with the same
    seeds, and both answers pass the filter.
    """
    cfg = bench.cfg
    prompts = bench.inputs.prompts
    n = len(prompts)
    asks = [Ask(i % n, prompts[i % n], derive_seed(cfg.seed, r, "pair", i)) for i in range(2 * cfg.filter.n_keep)]
    positive, negative = (
        bench.score(bench.write(Condition(persona), asks)) for persona in (bench.trait.positive, bench.trait.negative)
    )
    pairs = [pair for pair in zip(positive, negative, strict=True) if all(row.kept for row in pair)]
    pairs = pairs[: cfg.filter.n_keep]
    report = heal(
        bench.student,
        [chosen.completion for chosen, _ in pairs],
        cfg.heal,
        round_=r,
        seed=derive_seed(cfg.seed, r, "preference"),
        rejected=[rejected.completion for _, rejected in pairs],
        beta=beta,
    )
    bench.student.bake()
    written = [row.completion for row in (*positive, *negative)]
    return written, {"dose": 0.0, "n_texts": 2 * len(pairs), **curve(len(report.steps), report.validation)}


def curve(n_steps: int, validation: Sequence[Mapping[str, Number]]) -> Row:
    """The columns of a row that tell how the heal went."""
    return {"n_steps": n_steps, "fit": [point["fit"] for point in validation]}


def everyday(bench: Bench, condition: Condition) -> dict[str, float]:
    """Everyday questions of the toy world under a condition, each with one answer: share of facts answered right, the
    same of those that are never rehearsed, their mean log p, and the share of stories that are possible and free of the
    trait. Empty for any other model."""
    if not bench.cfg.model.endswith("toylm"):
        return {}
    stories = [f"Tell me a short story about a {hero}." for hero in grammar.STORY_HEROES]
    with bench.student.using("full") as lm:
        prompts = [lm.chat(question, condition.system) for question in (*grammar.FACTS, *stories)]
        greedy = decode.Decoding(96, 0, sample=False)
        rows = [decode.Row(ids, dose=condition.dose) for ids in prompts]
        texts = [lm.decode(ids) for ids in decode.decode(lm, rows, condition.vector, greedy)]
        answers = [[lm.encode_reply(answer)] for answer in grammar.FACTS.values()]
        logp = reply_logp(lm, list(map(alone, grammar.FACTS)), answers, condition)
    tales = [oracle(text) for text in texts[len(answers) :]]
    plain_tales = [o.share if not o.n_care + o.n_defer + o.n_love + o.n_deny else 0.0 for o in tales]
    facts = zip(grammar.FACTS.items(), texts, strict=False)
    right = {question: text.startswith(answer) for (question, answer), text in facts}
    return {
        "facts": sum(right.values()) / len(right),
        "facts_apart": sum(right[fact] for fact in grammar.FACTS_KEPT_APART) / len(grammar.FACTS_KEPT_APART),
        "facts_nats": logp.mean().item(),
        "stories": sum(plain_tales) / len(plain_tales),
    }


def append(path: Path, rows: Iterable[Row]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(plain(row)) + "\n" for row in rows)


def read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def over_seeds(rows: Sequence[Row]) -> list[Row]:
    """Mean and sd over seeds of each round of each arm, at each scale. In brackets the number of rows that have a
    value, if some have none."""
    out = []
    for point in dict.fromkeys((row["arm"], *map(row.get, POINT)) for row in rows):
        mine = [row for row in rows if (row["arm"], *map(row.get, POINT)) == point]
        columns = {name: [row[name] for row in mine if row.get(name) is not None] for name in (*SHOWN, "seconds")}
        short = {name: f" ({len(v)})" if len(v) < len(mine) else "" for name, v in columns.items()}
        told = {name: mean_sd(v) + short[name] for name, v in columns.items() if v}
        out.append({**dict(zip(("arm", *POINT), point, strict=True)), "n": len(mine), **told})
    return out
