"""How strong must the barrier be? Heals one round's text with several values of lam.

The preset chooses the dose and filters the text, unless --kappa is given.
"""

from dataclasses import replace

from steer_heal.diag.lab import Given, Lab, PresetFlags, show
from steer_heal.model.divergence import Aggregate
from steer_heal.settings import settings


@settings("")
class Flags(PresetFlags):
    lams: tuple[float, ...] = (0.0, 0.03, 0.1, 0.3, 1.0, 3.0)
    """Strengths of the barrier."""
    kappa: float | None = None
    """Write the text at this kappa and train on all of it, without a filter."""
    aggregate: Aggregate | None = None
    """How the divergences at the positions of a completion become one number. Default: the preset's."""


def main(flags: Flags, given: Given) -> None:
    lab = Lab.of(flags.settings(given))
    collected = lab.collect() if flags.kappa is None else lab.collect(flags.kappa, gates=())
    heal = lab.bench.cfg.heal
    heal = replace(heal, aggregate=flags.aggregate or heal.aggregate)
    rows = []
    for lam in flags.lams:
        result, report = lab.healed(collected, replace(heal, lam=lam))
        row = lab.row(f"lam {lam:g}", result)
        of_heal = {"divergence": report.steps[-1].divergence, "fired": report.fired, "pressure": report.pressure or 0.0}
        rows.append(row | of_heal)
    should = (
        "divergence and kl_base fall as lam rises, and fired (share of steps above tau) not be near 0, otherwise tau "
        "is above the operating divergence.",
        "shift shrink more slowly than text_tail_ppl_median, otherwise the barrier is only less training.",
        "pressure stay below 1 at the strength you choose.",
    )
    facts = {"kappa": collected.kappa, "n_kept": len(collected.train), "tau": heal.tau, "aggregate": heal.aggregate}
    show(__doc__, rows, should, flags.out, "barrier", **facts)
