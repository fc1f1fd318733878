"""What does each stage do to the same items: base, prompted, steered, healed without a barrier and with kl_rev?"""

from dataclasses import replace

from steer_heal.diag.lab import Lab, LabFlags, show
from steer_heal.model.steering import Condition


def main(lab: LabFlags) -> None:
    bench = Lab(lab.run_config())
    found = bench.collect()
    states = {
        "base": bench.base,
        "prompted": bench.read(Condition(bench.trait.positive)),
        f"steered {found.dose:.2f}": bench.read(Condition("", bench.vector, found.dose)),
    }
    for name, divergence in (("healed, no barrier", "none"), ("healed, kl_rev", "kl_rev")):
        states[name], _ = bench.healed(found, replace(bench.cfg.heal, divergence=divergence))
    rows = [bench.row(name, result) for name, result in states.items()]
    should = (
        f"shift of {bench.target.name} be {'negative' if bench.trait.sign < 0 else 'positive'} everywhere below base.",
        "text_tail_ppl_median and degenerate_frac rise in the steered row and fall back in the healed ones.",
        "one heal without a barrier move at least as far as one with kl_rev: the barrier pays over several rounds and "
        "on broken text.",
    )
    show(__doc__, rows, should, lab.out, "stages", kappa=found.kappa, n_kept=len(found.kept))
