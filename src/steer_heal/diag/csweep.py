"""Does the vector move the target while the model stays coherent? Every dose with its metrics and one text."""

from steer_heal.diag.lab import Lab, LabFlags, show
from steer_heal.model.steering import Condition


def main(lab: LabFlags, doses: tuple[float, ...] = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0, 1.5)) -> None:
    bench = Lab(lab.run_config())
    rows, texts = [], {}
    for dose in doses:
        result, name = bench.read(Condition("", bench.vector, dose)), f"dose {dose:g}"
        others = {f"shift of {other}": bench.shift(result, bench.metrics[other]) for other in bench.trait.off_targets}
        rows.append(bench.row(name, result) | others)
        texts[name] = result.texts[0]["text"]
    should = (
        f"shift {'fall' if bench.trait.sign < 0 else 'rise'} with the dose from the first dose on; dose 0 repeats the "
        "base exactly.",
        "text_tail_ppl_median and degenerate_frac stay near those of dose 0 up to a knee and then jump: train "
        "below it.",
        "coherence (the answer slot) break later than the text: the prefill pins it.",
        "the other metrics (columns on the right) move less than the target.",
    )
    show(__doc__, rows, should, lab.out, "csweep", texts=texts)
    for name, text in texts.items():
        print(f"{name}: {text[:240]!r}")
