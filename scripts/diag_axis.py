"""Which foundations move: with the vector, against it, and under each persona as a prompt?"""

import sys
from typing import Annotated

import tyro

from steer_heal.lab import Lab, LabCfg, cli, show
from steer_heal.readings import nats_name
from steer_heal.records import FOUNDATIONS


def main(lab: Annotated[LabCfg, tyro.conf.arg(name="")], dose: float = 0.25) -> None:
    """Which foundations move: with the vector, against it, and under each persona as a prompt?"""
    bench = Lab(lab.run_config())
    trait, vector = bench.trait, bench.vector
    states = {
        f"+ vector, dose {dose:g}": {"vector": vector, "dose": dose},
        f"- vector, dose {dose:g}": {"vector": vector, "dose": -dose},
        "positive persona": {"system": trait.positive},
        "negative persona": {"system": trait.negative},
    }
    rows = []
    for name, state in states.items():
        metrics = bench.read(**state).metrics
        shifts = {f: metrics[nats_name(f)] - bench.base.metrics[nats_name(f)] for f in FOUNDATIONS}
        most = max((f for f in FOUNDATIONS if f != trait.target), key=lambda f: abs(shifts[f]))
        certain = [f for f in FOUNDATIONS if metrics[f"{nats_name(f)}_lo"] * metrics[f"{nats_name(f)}_hi"] > 0]
        rows.append(
            {
                "state": name,
                **shifts,
                "surgical": abs(shifts[trait.target]) / max(1e-9, abs(shifts[most])),
                "moved for certain": " ".join(certain),
            }
        )
    should = (
        f"{trait.target} (nats from base) have the sign {trait.sign:+d} with the vector and under the positive persona, and the other sign below.",
        "surgical (target over the next largest shift) be above 1: else the vector carries more than the trait.",
        "the vector's row look like the positive persona's: the direction is the persona and not an accident of the contexts.",
    )
    show("Which foundations does the axis move?", rows, should, lab, "axis")


if __name__ == "__main__":
    sys.exit(cli(main))
