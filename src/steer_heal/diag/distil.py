"""Does the teacher's distribution put more of the trait into the weights than tokens do, at equal text and steps?

Every arm starts from the untouched model and heals `--n-rounds` rounds. Each round is measured plain, under the
OPPOSITE persona, and on everyday questions (toy model). Rows are appended to <out>/distil-<preset>-<trait>.jsonl; an
arm and seed that is there is not run again.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from steer_heal import round as steps
from steer_heal.diag.lab import Lab, LabFlags, markdown, mean_sd, show
from steer_heal.errors import UserError, print_safe
from steer_heal.inputs import load_inputs
from steer_heal.model.decode import Decoding, Row, decode
from steer_heal.model.steering import Condition
from steer_heal.model.student import Student
from steer_heal.records import Completion, HealReport, derive_seed
from steer_heal.report.plot import frontier
from steer_heal.runs.events import jsonable
from steer_heal.settings import RunConfig
from steer_heal.stages.generate import Ask
from steer_heal.stages.heal import heal
from steer_heal.toylm import grammar
from steer_heal.toylm.oracle import oracle


@dataclass(frozen=True)
class Arm:
    """Settings that replace those of the preset."""

    heal: dict[str, Any] = field(default_factory=dict)
    dose: dict[str, Any] = field(default_factory=dict)
    filter: dict[str, Any] = field(default_factory=dict)
    own_as_control: bool = False
    """The student trains on the tokens of its own text."""
    preference: float = 0.0
    """Beta of the preference for the positive persona's text over the negative's. 0: the round's own heal."""

    def of(self, cfg: RunConfig) -> RunConfig:
        sections = {"heal": self.heal, "dose": self.dose, "filter": self.filter}
        return replace(cfg, **{name: replace(getattr(cfg, name), **given) for name, given in sections.items()})


FREE, FITS = {"divergence": "none"}, {"divergence": "none", "target": "distribution"}
SURVIVES = {"mode": "survival", "target": 0.95, "floor": 0.05, "n_kappas": 4, "n_probes": 32}
ALONE, BESIDE = {**SURVIVES, "ceiling": 1.0}, {**SURVIVES, "ceiling": 0.25}
"""The dose of a vector alone, and beside a prompt."""
REVERSE = {**FITS, "text": "own", "teacher": "both", "kl": "reverse"}
ARMS = {
    "control": Arm(FREE, own_as_control=True),
    "tokens": Arm(),
    "tokens, no barrier": Arm(FREE),
    "tokens of the prompted": Arm({**FREE, "teacher": "prompt"}),
    "tokens of both": Arm({**FREE, "teacher": "both"}, BESIDE),
    "vector, own text": Arm({**FITS, "text": "own"}, ALONE),
    "vector, its text": Arm(FITS, ALONE),
    "prompt, own text": Arm({**FITS, "text": "own", "teacher": "prompt"}),
    "prompt, its text": Arm({**FITS, "teacher": "prompt"}),
    "both, own text": Arm({**FITS, "text": "own", "teacher": "both"}, BESIDE),
    "both, their text": Arm({**FITS, "teacher": "both"}, BESIDE),
    "both, own text, reverse": Arm(REVERSE, BESIDE),
    "recipe": Arm({**REVERSE, "epochs": 12}, BESIDE),
    "recipe, rehearsed": Arm({**REVERSE, "epochs": 12, "rehearsal": 16}, {**BESIDE, "ceiling": 0.5}),
    "preference 0.1": Arm(preference=0.1),
    "preference 0.5": Arm(preference=0.5),
    "gated": Arm({**REVERSE, "max_departure": 1.0}, BESIDE),
    "a round an epoch": Arm({**REVERSE, "epochs": 1}, BESIDE),
    "new text an epoch": Arm({**REVERSE, "refresh_every": 14}, BESIDE),
    "new text and teacher an epoch": Arm({**REVERSE, "refresh_every": 14, "refresh": "teacher"}, BESIDE),
}
SHOWN = (
    "shift",
    "contrast_nats",
    "degenerate_frac",
    "oracle",
    "text_tail_ppl_median",
    "kl_base",
    "opposite",
    "facts",
    "facts_apart",
    "facts_nats",
)


def runs(lab: Lab, arm: Arm, n_rounds: int, kappas: Sequence[float] = ()) -> Iterator[dict[str, Any]]:
    """A row a round, from the untouched model. `kappas`: of each round, the last one also of those after it."""
    cfg = arm.of(lab.cfg)
    inputs = replace(lab.inputs, rehearsal=load_inputs(cfg).rehearsal)
    student = lab.student = Student(lab.lm, cfg.adapter)
    seconds = n_tokens = 0.0
    for r in range(n_rounds):
        began = time.perf_counter()
        if kappas:
            cfg = replace(cfg, dose=replace(cfg.dose, kappa=kappas[min(r, len(kappas) - 1)]))
        if arm.preference:
            written, told = preferred(lab, cfg, r, arm.preference)
        else:
            vector = None if arm.own_as_control else steps.extract(student, inputs, cfg)
            collected = steps.collect(student, vector, inputs, cfg, r)
            report = steps.heal(student, collected, inputs, cfg, r, vector)
            written = [row.completion for row in collected.scored]
            told = {"dose": collected.dose, "n_texts": len(collected.kept), "left_out": report.left_out}
            told |= {"n_rehearsed": len(collected.rehearsal), **curve(report)}
        student.bake()
        seconds += time.perf_counter() - began
        n_tokens += sum(len(completion.completion_ids) for completion in written)
        healed, opposite = lab.read(), lab.read(Condition(inputs.trait.negative))
        cost = {"seconds": seconds, "n_tokens": n_tokens}
        foundations = {name: lab.shift(healed, metric) for name, metric in lab.metrics.items() if metric.moved}
        rest = {"opposite": lab.shift(opposite), **everyday(lab)}
        yield {"round": r, **lab.row("", healed), **rest, "shifts": foundations, **told, **cost}
    student.reset()


def preferred(lab: Lab, cfg: RunConfig, r: int, beta: float) -> tuple[list[Completion], dict[str, Any]]:
    """(all text that was written, columns of the row) of one round of direct preference optimisation (Rafailov et al.
    2023).

    Text of the positive persona is preferred to text of the negative one. The two answer the same prompts with the same
    seeds, and both answers pass the filter.
    """
    student, inputs = lab.student, lab.inputs
    prompts, n_keep = inputs.prompts, cfg.filter.n_keep
    n = len(prompts)
    asks = [Ask(i % n, prompts[i % n], derive_seed(cfg.seed, r, "pair", i)) for i in range(2 * n_keep)]
    positive, negative = (
        steps.score(student, steps.write(student, Condition(persona), asks, inputs, cfg), inputs, cfg)
        for persona in (inputs.trait.positive, inputs.trait.negative)
    )
    kept = [pair for pair in zip(positive, negative, strict=True) if all(row.kept for row in pair)][:n_keep]
    report = heal(
        student,
        [chosen.completion for chosen, _ in kept],
        replace(cfg.heal, target="tokens", text="steered", divergence="none"),
        round_=r,
        seed=derive_seed(cfg.seed, r, "preference"),
        rejected=[rejected.completion for _, rejected in kept],
        beta=beta,
    )
    written = [row.completion for row in (*positive, *negative)]
    return written, {"dose": 0.0, "n_texts": 2 * len(kept), **curve(report)}


def curve(report: HealReport) -> dict[str, Any]:
    """The columns of a row that tell how the heal went."""
    return {"n_steps": len(report.steps), "fit": [point["fit"] for point in report.validation]}


def everyday(lab: Lab) -> dict[str, float]:
    """Of the toy world, whose questions have one answer: share of facts answered right, of those that are never
    rehearsed too, their mean log p, and the share of whole stories."""
    if not lab.cfg.model.endswith("toylm"):
        return {}
    stories = [f"Tell me a short story about a {hero}." for hero in grammar.STORY_HEROES]
    rows = [Row(lab.lm.chat(question, lab.trait.plain_system)) for question in (*grammar.FACTS, *stories)]
    with lab.student.using("full") as lm:
        texts = [lm.decode(ids) for ids in decode(lm, rows, None, Decoding(96, 0, sample=False))]
        answers = [lm.encode(answer) for answer in grammar.FACTS.values()]
        nlls = lm.completion_nll([row.prompt_ids for row in rows[: len(answers)]], answers)
    tales = [oracle(text) for text in texts[len(grammar.FACTS) :]]
    plain = [o.share if not o.n_care + o.n_defer + o.n_love + o.n_deny else 0.0 for o in tales]
    facts = zip(grammar.FACTS.items(), texts, strict=False)
    right = {question: text.startswith(answer) for (question, answer), text in facts}
    apart = [right[question] for question in grammar.FACTS_KEPT_APART]
    known = {"facts": sum(right.values()) / len(right), "facts_apart": sum(apart) / len(apart)}
    nats = {"facts_nats": -sum(nll.sum().item() for nll in nlls) / len(nlls)}
    return {**known, **nats, "stories": sum(plain) / len(plain)}


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main(
    lab: LabFlags,
    seeds: tuple[int, ...] = (41, 42, 43, 44, 45),
    arms: tuple[str, ...] = tuple(ARMS),
    n_rounds: int = 1,
    kappa: tuple[float, ...] = (),
    heal: str = "{}",
    dose: str = "{}",
    filter: str = "{}",
    label: str = "",
) -> None:
    """Runs the arms that are missing and shows all rows.

    Args:
        seeds: One run each.
        arms: Names of ARMS.
        n_rounds: Rounds of each arm.
        kappa: Fixed dose of the teacher in each round; none: as the preset chooses it.
        heal: JSON object of further settings of the heal.
        dose: JSON object of further settings of the dose.
        filter: JSON object of settings of the filter.
        label: Added to the names of the arms, for settings given here.
    """
    path = lab.out / f"distil-{lab.preset}-{lab.run_config().trait}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    if unknown := [name for name in arms if name not in ARMS]:
        raise UserError(f"arms holds {unknown[0]!r}: it must be among {', '.join(ARMS)}")
    for seed in seeds:
        there = {(row["arm"], row["seed"]) for row in read_rows(path)}
        todo = [name for name in arms if (name + label, seed) not in there]
        bench = Lab(replace(lab, seed=seed).run_config()) if todo else None
        for name in todo:
            assert bench is not None
            arm = ARMS[name]
            heals, doses = {**arm.heal, **json.loads(heal)}, {**arm.dose, **json.loads(dose)}
            arm = replace(arm, heal=heals, dose=doses, filter=json.loads(filter))
            if kappa:
                arm = replace(arm, dose={**arm.dose, "mode": "fixed"})
            rows = [{"arm": name + label, "seed": seed, **row} for row in runs(bench, arm, n_rounds, kappa)]
            with path.open("a") as file:
                file.writelines(json.dumps(jsonable(row)[0]) + "\n" for row in rows)
            print_safe(markdown([{k: row.get(k) for k in ("arm", "seed", "round", *SHOWN, "dose")} for row in rows]))
    rows = read_rows(path)
    should = (
        "prompt and both go further than tokens of the same teacher at no more broken text: else the distribution adds "
        "nothing to plain fine-tuning.",
        "own text be as whole as the base's: else the dose is past what the student can take.",
        "facts_apart, which are never rehearsed, stay where the control's are: else more than the trait was changed.",
        "control stay at 0: the shift comes from the teacher and not from the training.",
    )
    show(__doc__, over_seeds(rows), should, lab.out, "distil", per_seed=rows)
    points = [{**row, "shift": abs(row["shift"]), "broken": row["degenerate_frac"]} for row in rows]
    frontier(points).savefig(lab.out / "distil.png", dpi=130)


def over_seeds(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and sd of each arm's rounds over seeds."""
    out = []
    for arm, r in dict.fromkeys((row["arm"], row["round"]) for row in rows):
        mine = [row for row in rows if (row["arm"], row["round"]) == (arm, r)]
        columns = {name: [row[name] for row in mine if row.get(name) is not None] for name in (*SHOWN, "seconds")}
        out.append({"arm": arm, "round": r, "n": len(mine), **{name: mean_sd(v) for name, v in columns.items() if v}})
    return out
