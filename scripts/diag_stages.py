"""What does each stage do to the same items: base, prompted, steered, healed by nll and by kl_rev?"""

import sys
from dataclasses import replace
from typing import Annotated

import tyro

from steer_heal.lab import Lab, LabCfg, cli, show


def main(lab: Annotated[LabCfg, tyro.conf.arg(name="")]) -> None:
    """What does each stage do to the same items: base, prompted, steered, healed by nll and by kl_rev?"""
    bench = Lab(lab.run_config())
    cfg = bench.cfg
    found = bench.collect(cfg.dose, cfg.filter)
    kept = [row.completion for row in found.kept]
    dose = max(c.dose for c in kept)
    rows = [
        bench.row("base", bench.base),
        bench.row("prompted", bench.read(system=bench.trait.positive)),
        bench.row(f"steered {dose:.2f}", bench.read(vector=bench.vector, dose=dose)),
    ]
    for divergence in ("nll", "kl_rev"):
        result, _ = bench.healed(kept, replace(cfg.heal, divergence=divergence))
        rows.append(bench.row(f"healed {divergence}", result))
    should = (
        f"shift be negative for {bench.target} everywhere below base."
        if bench.trait.sign < 0
        else f"shift be positive for {bench.target} everywhere below base.",
        "text_ppl and degenerate rise in the steered row and fall back in the healed ones.",
        "one round of healed nll move at least as far as healed kl_rev: the barrier pays over several rounds and on broken text.",
    )
    show("What does each stage do to the same items?", rows, should, lab, "stages", kappa=found.kappa, n_kept=len(kept))


if __name__ == "__main__":
    sys.exit(cli(main))
