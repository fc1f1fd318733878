"""Does the vector move the target while the model stays coherent? Dose, trait, profile, coherence, one text each."""

import sys
from typing import Annotated

import tyro

from steer_heal.lab import Lab, LabCfg, cli, show
from steer_heal.readings import nats_name
from steer_heal.records import FOUNDATIONS


def main(
    lab: Annotated[LabCfg, tyro.conf.arg(name="")], doses: tuple[float, ...] = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0, 1.5)
) -> None:
    """Does the vector move the target while the model stays coherent? Dose, trait, profile, coherence, one text each."""
    bench = Lab(lab.run_config())
    rows, texts = [], {}
    for dose in doses:
        result = bench.read(vector=bench.vector if dose else None, dose=dose)
        others = [name for name in FOUNDATIONS if name != bench.trait.target]
        rows.append(
            bench.row(f"dose {dose:g}", result)
            | {name: result.metrics[nats_name(name)] - bench.base.metrics[nats_name(name)] for name in others}
        )
        texts[f"dose {dose:g}"] = result.texts[0]["text"]
    way = "fall" if bench.trait.sign < 0 else "rise"
    should = (
        f"shift {way} with the dose from the first dose on; dose 0 repeats the base exactly.",
        "text_ppl and degenerate stay near those of dose 0 up to a knee and then jump: train below it.",
        "coherence (the answer slot) break later than the text: the prefill pins it.",
        "the other foundations (columns on the right, nats from base) move less than the target.",
    )
    show("Does the vector move the target while the model stays coherent?", rows, should, lab, "csweep", texts=texts)
    for name, text in texts.items():
        print(f"{name}: {text[:240]!r}")


if __name__ == "__main__":
    sys.exit(cli(main))
