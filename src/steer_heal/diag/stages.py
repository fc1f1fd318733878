"""How do states differ on the same items: base, prompted, steered, healed without a barrier and with kl_rev?"""

from dataclasses import replace

from steer_heal.diag.lab import Given, Lab, PresetFlags, show
from steer_heal.model.steering import Condition

Flags = PresetFlags


def main(flags: Flags, given: Given) -> None:
    lab = Lab.of(flags.settings(given))
    bench = lab.bench
    collected = lab.collect()
    states = {
        "base": lab.base,
        "prompted": lab.measure(Condition(bench.trait.positive)),
        f"steered {collected.dose:.2f}": lab.measure(Condition("", lab.vector, collected.dose)),
    }
    for name, divergence in (("healed, no barrier", "none"), ("healed, kl_rev", "kl_rev")):
        states[name], _ = lab.healed(collected, replace(bench.cfg.heal, divergence=divergence))
    rows = [lab.row(name, result) for name, result in states.items()]
    should = (
        f"shift of {lab.target.name} be {'negative' if bench.trait.sign < 0 else 'positive'} in each row below base.",
        "text_tail_ppl_median and degenerate_frac rise in the steered row and fall back in the healed ones.",
        "one heal without a barrier move at least as far as one with kl_rev: the barrier pays over several rounds and "
        "on broken text.",
    )
    show(__doc__, rows, should, flags.out, "stages", kappa=collected.kappa, n_kept=len(collected.train))
