"""How strong must the barrier be? A ladder of lam on one round's text, as filtered as the preset has it or over-steered."""

import statistics
import sys
from dataclasses import replace
from typing import Annotated

import tyro

from steer_heal.divergence import Aggregate
from steer_heal.lab import Lab, LabCfg, cli, show


def main(
    lab: Annotated[LabCfg, tyro.conf.arg(name="")],
    lams: tuple[float, ...] = (0.0, 0.03, 0.1, 0.3, 1.0, 3.0),
    kappa: float | None = None,
    aggregate: Aggregate | None = None,
) -> None:
    """How strong must the barrier be? A ladder of lam on one round's text: filtered as the preset has it or, with
    --kappa, everything that is written at that dose, unfiltered."""
    bench = Lab(lab.run_config())
    cfg = bench.cfg
    keep = cfg.filter if kappa is None else replace(cfg.filter, gates=())
    found = bench.collect(cfg.dose, keep, kappa=kappa)
    kept = [row.completion for row in found.kept]
    heal = replace(cfg.heal, aggregate=aggregate or cfg.heal.aggregate)
    rows = []
    for lam in lams:
        result, steps = bench.healed(kept, replace(heal, lam=lam))
        firing = [step.pressure for step in steps if step.pressure]
        fired = sum(step.barrier > 0 for step in steps) / len(steps)
        pressure = statistics.median(firing) if firing else 0.0
        rows.append(
            bench.row(f"lam {lam:g}", result)
            | {"divergence": steps[-1].divergence, "fired": fired, "pressure": pressure}
        )
    should = (
        "divergence and kl_base fall as lam rises, and fired (share of steps above tau) not be near 0: else tau is above the operating divergence.",
        "shift shrink more slowly than text_ppl: that is the bet. Where both go together the barrier is only less training.",
        "pressure stay below 1 at the strength you choose.",
    )
    show(
        "How strong must the barrier be?",
        rows,
        should,
        lab,
        "barrier",
        kappa=found.kappa,
        n_kept=len(kept),
        tau=heal.tau,
        aggregate=heal.aggregate,
    )


if __name__ == "__main__":
    sys.exit(cli(main))
