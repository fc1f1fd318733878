"""What does each dose of the vector contribute to the kept text? Shows, for each dose, the share kept, coherence and
trait. Whatever the preset's teacher, the vector alone steers."""

from statistics import fmean, median

from steer_heal.diag.lab import Given, Lab, PresetFlags, show
from steer_heal.evals.persona import log_odds
from steer_heal.settings import settings


@settings("")
class Flags(PresetFlags):
    kappas: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5)
    """Doses of the vector."""
    n: int = 48
    """Number of texts at each dose."""


def main(flags: Flags, given: Given) -> None:
    lab = Lab.of(flags.settings(given))
    gates = lab.bench.cfg.filter.gates
    rows = []
    for kappa in flags.kappas:
        n = flags.n
        scored = lab.collect(kappa, alphas=(1.0,), gates=(), n_keep=n, max_attempts=n, min_train=2).scored
        passed = [row.completion for row in scored if not set(gates).intersection(row.failed)]
        with lab.bench.student.using("base") as lm:
            odds = log_odds(lm, passed, lab.bench.trait)
        row = {"dose": kappa, "kept": len(passed) / len(scored), "persona_log_odds": fmean(odds) if odds else None}
        row |= {f"median {gate}": median(row.scores[gate] for row in scored) for gate in ("perplexity", "repetition")}
        row |= {gate: fmean(gate in row.failed for row in scored) for gate in gates}
        rows.append(row)
    should = (
        "kept fall and the median perplexity rise with the dose: the filter can tell. Perplexity that falls again at "
        "the top is the collapse into loops.",
        "persona_log_odds (of kept text) rise with the dose while kept is still high: that is what the kept text "
        "teaches.",
        "repetition and loop (shares that these gates drop) rise where perplexity and spike stop.",
    )
    show(__doc__, rows, should, flags.out, "doses", n=flags.n)
