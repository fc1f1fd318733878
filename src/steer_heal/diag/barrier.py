"""How strong must the barrier be? A ladder of lam on one round's text.

The text is filtered as the preset has it or, with --kappa, all that is written at that dose.
"""

import statistics
from dataclasses import replace

from steer_heal.diag.lab import Lab, LabFlags, show
from steer_heal.model.divergence import Aggregate


def main(
    lab: LabFlags,
    lams: tuple[float, ...] = (0.0, 0.03, 0.1, 0.3, 1.0, 3.0),
    kappa: float | None = None,
    aggregate: Aggregate | None = None,
) -> None:
    bench = Lab(lab.run_config())
    found = bench.collect() if kappa is None else bench.collect(kappa, gates=())
    heal = replace(bench.cfg.heal, aggregate=aggregate or bench.cfg.heal.aggregate)
    rows = []
    for lam in lams:
        result, steps = bench.healed(found, replace(heal, lam=lam))
        firing = [step.pressure for step in steps if step.pressure]
        fired = sum(step.barrier > 0 for step in steps) / len(steps)
        of_heal = {"divergence": steps[-1].divergence, "fired": fired}
        of_heal["pressure"] = statistics.median(firing) if firing else 0.0
        rows.append(bench.row(f"lam {lam:g}", result) | of_heal)
    should = (
        "divergence and kl_base fall as lam rises, and fired (share of steps above tau) not be near 0: else tau is "
        "above the operating divergence.",
        "shift shrink more slowly than text_tail_ppl_median: where both go together the barrier is only less training.",
        "pressure stay below 1 at the strength you choose.",
    )
    settings = {"kappa": found.kappa, "n_kept": len(found.kept), "tau": heal.tau, "aggregate": heal.aggregate}
    show(__doc__, rows, should, lab.out, "barrier", **settings)
