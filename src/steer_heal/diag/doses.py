"""What does each dose contribute to the kept set? Written, kept, coherence and trait of the text, by dose."""

from statistics import fmean, median

from steer_heal.diag.lab import Lab, LabFlags, show
from steer_heal.evals.persona import log_odds


def main(lab: LabFlags, kappas: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5), n: int = 48) -> None:
    bench = Lab(lab.run_config())
    rows = []
    for kappa in kappas:
        scored = bench.collect(kappa, alphas=(1.0,), gates=(), n_keep=n, max_attempts=n, min_train=2).scored
        whole = [row.completion for row in scored if not row.failed]
        with bench.student.using("base") as lm:
            odds = log_odds(lm, whole, bench.trait)
        row = {"dose": kappa, "kept": len(whole) / len(scored), "persona_log_odds": fmean(odds) if odds else None}
        row |= {f"median {gate}": median(row.scores[gate] for row in scored) for gate in ("perplexity", "repetition")}
        row |= {gate: fmean(gate in row.failed for row in scored) for gate in bench.cfg.filter.gates}
        rows.append(row)
    should = (
        "kept fall and the median perplexity rise with the dose: the filter can tell. Perplexity that falls again at "
        "the top is the collapse into loops.",
        "persona_log_odds (of kept text) rise with the dose while kept is still high: that is what the kept set "
        "teaches.",
        "repetition and loop (shares that these gates drop) rise where perplexity and spike stop.",
    )
    show(__doc__, rows, should, lab.out, "doses", n=n)
