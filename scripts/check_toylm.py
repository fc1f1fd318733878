"""The check table of the bundled model: personas, held-out wordings and the dose sweep (a minute)."""

import math
import random
import sys
from dataclasses import replace
from typing import Any

import torch
from common import cli

from steer_heal.diag.lab import Lab
from steer_heal.errors import print_safe
from steer_heal.model.steering import Condition, Vector
from steer_heal.presets import TOY_PRESET
from steer_heal.report.tables import markdown
from steer_heal.toylm import grammar
from steer_heal.toylm.templates import expand

COLUMNS = ("care_nats", "coherence", "text_tail_ppl_median", "oracle", "degenerate_frac", "top1_acc")
Row = dict[str, Any]


class Check:
    """The toy model with the items of the toy preset."""

    def __init__(self, model: str = TOY_PRESET.model, trait: str = "authority", **items: Any) -> None:
        """`items` replace settings of the preset's EvalCfg."""
        shown = replace(TOY_PRESET.eval, **{"n_bootstrap": 10, **items})  # no interval is shown
        self.lab = Lab.of(replace(TOY_PRESET, model=model, trait=trait, seed=0, eval=shown))
        self.trait = self.lab.bench.trait
        self.vector = self.lab.vector

    def state(self, name: str = "", condition: Condition | None = None) -> Row:
        """One row. `positive` is the share of answers on the positive persona's side, of those that take a side."""
        result = self.lab.measure(condition)
        sides = [share > 0.5 for share in result.items["positive"] if not math.isnan(share)]
        row = {"state": name, "authority_nats": result.metrics["authority_nats"], "shift": self.lab.shift(result)}
        row["positive"] = sum(sides) / len(sides) if sides else math.nan
        return row | {column: result.metrics[column] for column in COLUMNS}

    def random_vector(self) -> Vector:
        """Random directions with the norms of the steering vector."""
        generator = torch.Generator().manual_seed(self.lab.bench.cfg.seed)
        out = {}
        for layer, direction in self.vector.directions.items():
            noise = torch.randn(direction.shape, generator=generator)
            out[layer] = noise * direction.norm() / noise.norm()
        return Vector(out)


def main(model: str = TOY_PRESET.model, doses: tuple[float, ...] = (0.25, 0.5, 1.0, 1.5, 2.0, 4.0)) -> None:
    """Prints the tables.

    Args:
        model: Folder of a toy model.
        doses: Doses of the vector. The first two are also tried backwards, and with a random vector.
    """
    check = Check(model)
    rng = random.Random(0)
    vector = check.vector
    trait = check.trait
    rows = [
        check.state("base (no system prompt)"),
        check.state("neutral: helpful assistant", Condition("You are a helpful assistant.")),
        check.state("carer (the trait's pair)", Condition(trait.positive)),
        check.state("deferrer (the trait's pair)", Condition(trait.negative)),
    ]
    for side, wordings in (("carer", grammar.CARER_HELD_OUT), ("deferrer", grammar.DEFERRER_HELD_OUT)):
        for wording in wordings:
            rows.append(check.state(f"{side}, held out: {wording}", Condition(expand(wording, rng, {}))))
    rows += [check.state(f"+ vector, dose {dose:g}", Condition("", vector, dose)) for dose in doses]
    for dose in doses[:2]:
        rows.append(check.state(f"- vector, dose {dose:g}", Condition("", vector, -dose)))
        rows.append(check.state(f"random vector, dose {dose:g}", Condition("", check.random_vector(), dose)))
    love = Check(model, "love")
    rows += [
        love.state("lover (love's pair)", Condition(love.trait.positive)),
        love.state("denier (love's pair)", Condition(love.trait.negative)),
        love.state("feelings, no system prompt"),
    ]
    for dose in doses[:3]:
        rows.append(love.state(f"+ love's vector, dose {dose:g}", Condition("", love.vector, dose)))
    print_safe(markdown(rows))


if __name__ == "__main__":
    sys.exit(cli(main))
