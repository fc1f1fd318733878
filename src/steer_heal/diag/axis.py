"""Which metrics move with the vector, against it, and under each persona as a system prompt?"""

from dataclasses import replace

from steer_heal.diag.lab import Given, Lab, PresetFlags, show
from steer_heal.model.steering import Condition
from steer_heal.settings import settings


@settings("")
class Flags(PresetFlags):
    dose: float = 0.25
    """Dose of the vector."""


def main(flags: Flags, given: Given) -> None:
    lab = Lab.of(flags.settings(given))
    trait = lab.bench.trait
    target = lab.target.name
    conditions = {
        f"+ vector, dose {flags.dose:g}": replace(lab.bench.plain, vector=lab.vector, dose=flags.dose),
        f"- vector, dose {flags.dose:g}": replace(lab.bench.plain, vector=lab.vector, dose=-flags.dose),
        "positive persona": Condition(trait.positive),
        "negative persona": Condition(trait.negative),
    }
    rows = []
    for name, condition in conditions.items():
        result = lab.measure(condition)
        shifts = {other: lab.shift(result, lab.metrics[other]) for other in (target, *trait.off_targets)}
        largest = max((abs(moved) for other, moved in shifts.items() if other != target), default=0.0)
        surgical = abs(shifts[target]) / largest if largest else None
        ends = {other: [result.metrics[f"{other}_{end}"] or 0.0 for end in ("lo", "hi")] for other in shifts}
        certain = [other for other, (low, high) in ends.items() if low * high > 0]
        rows.append({"state": name, **shifts, "surgical": surgical, "interval without 0": " ".join(certain)})
    should = (
        f"{target} (from base) have the sign {trait.sign:+d} with the vector and under the positive persona, and the "
        "other sign below.",
        "surgical (the shift of the trait's metric over the next largest) be above 1, otherwise the vector carries "
        "more than the trait.",
        "the vector's row look like the positive persona's, otherwise the direction is an accident of the contexts.",
    )
    show(__doc__, rows, should, flags.out, "axis")
