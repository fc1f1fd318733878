"""What must hold of the bundled weights: personas order, the vector steers, and a higher dose breaks the text."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from steer_heal.config import TOY_PRESET
from steer_heal.evals.metrics import Condition
from steer_heal.lm import LM
from steer_heal.records import EvalResult
from steer_heal.stages.bake import Student
from steer_heal.stages.evaluate import evaluate, load_items
from steer_heal.stages.teacher_vec import teacher_vec
from steer_heal.steering import Vector
from steer_heal.toylm import grammar
from steer_heal.toylm.templates import expand
from steer_heal.traits import load_trait


@dataclass
class Bench:
    """The toy model with the items of the toy preset: reads any condition on them."""

    lm: LM
    name: str = "authority"
    """The trait, `authority` or `love`."""
    seed: int = 0

    def __post_init__(self) -> None:
        self.trait = load_trait(self.name, TOY_PRESET.gen.prompts)
        self.items = load_items(TOY_PRESET.eval, self.trait)
        self.student = Student(self.lm, TOY_PRESET.heal)
        self.vector = teacher_vec(self.lm, self.trait, TOY_PRESET.steer)

    def read(self, system: str = "", vector: Vector | None = None, dose: float = 0.0) -> EvalResult:
        condition = Condition(system, vector, dose)
        return evaluate(
            self.student, "full", condition, self.items, self.trait, TOY_PRESET.eval, TOY_PRESET.filter, self.seed
        )

    def random_vector(self) -> Vector:
        """Random directions with the norms of the teacher vector."""
        generator = torch.Generator().manual_seed(self.seed)
        out = {}
        for layer, direction in self.vector.directions.items():
            noise = torch.randn(direction.shape, generator=generator)
            out[layer] = noise * direction.norm() / noise.norm()
        return Vector(out)


COLUMNS = (
    "auth_nats",
    "care_nats",
    "coherence",
    "text_ppl_median",
    "oracle",
    "positive_frac",
    "degenerate_frac",
    "top1_acc",
)


@dataclass
class Table:
    """Rows of readings; `shift` is auth_nats against the first row."""

    rows: list[tuple[str, dict[str, float]]] = field(default_factory=list)

    def add(self, name: str, result: EvalResult) -> dict[str, float]:
        row = {c: math.nan if result.metrics[c] is None else result.metrics[c] for c in COLUMNS}
        row["shift"] = row["auth_nats"] - (self.rows[0][1] if self.rows else row)["auth_nats"]
        # share of answers in which sentences of the positive side are the majority among those that take a side
        sided = [c for c in result.items["positive"] if not math.isnan(c)]
        row["positive"] = sum(c > 0.5 for c in sided) / len(sided) if sided else math.nan
        self.rows.append((name, row))
        return row

    def markdown(self) -> str:
        columns = (
            "auth_nats",
            "shift",
            "care_nats",
            "positive",
            "coherence",
            "text_ppl_median",
            "oracle",
            "degenerate_frac",
            "top1_acc",
        )
        head = "| state | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns)
        return "\n".join(
            [head, *(f"| {name} | " + " | ".join(f"{row[c]:.3f}" for c in columns) + " |" for name, row in self.rows)]
        )


DOSES = (0.25, 0.5, 1.0, 1.5, 2.0, 4.0)


def check_table(lm: LM, doses: Sequence[float] = DOSES) -> Table:
    """Base, personas (trained and held-out wordings) and the dose sweep, all on the toy preset's items."""
    bench, table, rng = Bench(lm), Table(), random.Random(0)
    table.add("base (no system prompt)", bench.read())
    table.add("neutral: helpful assistant", bench.read("You are a helpful assistant."))
    table.add("carer (the trait's pair)", bench.read(bench.trait.positive))
    table.add("deferrer (the trait's pair)", bench.read(bench.trait.negative))
    for side, templates in (("carer", grammar.CARER_HELD_OUT), ("deferrer", grammar.DEFERRER_HELD_OUT)):
        for template in templates:
            table.add(f"{side}, held out: {template}", bench.read(expand(template, rng, {})))
    for dose in doses:
        table.add(f"+ vector, dose {dose:g}", bench.read("", bench.vector, dose))
    love = Bench(lm, "love")
    table.add("lover (love's pair)", love.read(love.trait.positive))
    table.add("denier (love's pair)", love.read(love.trait.negative))
    table.add("feelings, no system prompt", love.read())
    for dose in doses[:3]:
        table.add(f"+ love's vector, dose {dose:g}", love.read("", love.vector, dose))
    for dose in doses[:2]:
        table.add(f"- vector, dose {dose:g}", bench.read("", bench.vector, -dose))
        table.add(f"random vector, dose {dose:g}", bench.read("", bench.random_vector(), dose))
    return table
