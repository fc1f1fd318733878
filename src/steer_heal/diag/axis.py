"""Which metrics does the axis move: with the vector, against it, and under each persona as a prompt?"""

from steer_heal.diag.lab import Lab, LabFlags, show
from steer_heal.model.steering import Condition


def main(lab: LabFlags, dose: float = 0.25) -> None:
    bench = Lab(lab.run_config())
    trait, target = bench.trait, bench.target.name
    states = {
        f"+ vector, dose {dose:g}": Condition("", bench.vector, dose),
        f"- vector, dose {dose:g}": Condition("", bench.vector, -dose),
        "positive persona": Condition(trait.positive),
        "negative persona": Condition(trait.negative),
    }
    rows = []
    for name, state in states.items():
        result = bench.read(state)
        shifts = {other: bench.shift(result, bench.metrics[other]) for other in (target, *trait.off_targets)}
        largest = max((abs(moved) for other, moved in shifts.items() if other != target), default=0.0)
        surgical = abs(shifts[target]) / largest if largest else None
        ends = {other: [result.metrics[f"{other}_{end}"] or 0.0 for end in ("lo", "hi")] for other in shifts}
        certain = [other for other, (low, high) in ends.items() if low * high > 0]
        rows.append({"state": name, **shifts, "surgical": surgical, "moved for certain": " ".join(certain)})
    should = (
        f"{target} (from base) have the sign {trait.sign:+d} with the vector and under the positive persona, and the "
        "other sign below.",
        "surgical (the target's shift over the next largest) be above 1: else the vector carries more than the trait.",
        "the vector's row look like the positive persona's: else the direction is an accident of the contexts.",
    )
    show(__doc__, rows, should, lab.out, "axis")
