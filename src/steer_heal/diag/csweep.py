"""Does the vector move the trait's metric while the model stays coherent? Shows metrics and one text for each dose."""

from dataclasses import replace

from steer_heal.diag.lab import Given, Lab, PresetFlags, show
from steer_heal.errors import print_safe
from steer_heal.settings import settings
from steer_heal.verdict import direction


@settings("")
class Flags(PresetFlags):
    doses: tuple[float, ...] = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0, 1.5)
    """Doses of the vector."""


def main(flags: Flags, given: Given) -> None:
    lab = Lab.of(flags.settings(given))
    trait = lab.bench.trait
    rows = []
    texts = {}
    for dose in flags.doses:
        name = f"dose {dose:g}"
        result = lab.measure(replace(lab.bench.plain, vector=lab.vector, dose=dose))
        others = {f"shift of {other}": lab.shift(result, lab.metrics[other]) for other in trait.off_targets}
        rows.append(lab.row(name, result) | others)
        texts[name] = result.texts[0].text
    should = (
        f"shift go {direction(trait.sign)} with the dose from the first dose on; dose 0 repeats the base exactly.",
        "text_tail_ppl_median and degenerate_frac stay near those of dose 0 up to a knee and then jump: train "
        "below it.",
        "coherence (the answer slot) break later than the text: the prefill pins it.",
        "the other metrics (columns on the right) move less than the trait's.",
    )
    show(__doc__, rows, should, flags.out, "csweep", texts=texts)
    for name, text in texts.items():
        print_safe(f"{name}: {text[:240]!r}")
