"""What does each dose contribute to the kept set? Written, kept, coherence and trait of the text, by dose."""

import sys
from dataclasses import replace
from typing import Annotated

import tyro

from steer_heal.evals import persona
from steer_heal.lab import Lab, LabCfg, cli, show
from steer_heal.records import Scored


def main(
    lab: Annotated[LabCfg, tyro.conf.arg(name="")],
    kappas: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5),
    n: int = 48,
) -> None:
    """What does each dose contribute to the kept set? Written, kept, coherence and trait of the text, by dose."""
    bench = Lab(lab.run_config())
    cfg = bench.cfg
    keep = replace(cfg.filter, n_keep=n, max_attempts=n, gates=(), min_train=2)
    rows = []
    for kappa in kappas:
        found = bench.collect(cfg.dose, keep, kappa=kappa, alphas=(1.0,))
        rows.append(_row(bench, kappa, found.scored))
    should = (
        "kept fall and ppl rise with the dose (Q0: the filter can tell); ppl that falls again at the top is the collapse into loops.",
        "log_odds (nats per token towards the positive persona) rise with the dose while kept is still high: that is what the kept set teaches.",
        "repetition and loop (shares that these gates drop) rise where perplexity and spike stop.",
    )
    show("What does each dose contribute to the kept set?", rows, should, lab, "doses", n=n)


def _row(bench: Lab, kappa: float, scored: tuple[Scored, ...]) -> dict:
    whole = [row for row in scored if not row.failed]
    with bench.student.gate("base") as lm:
        odds = persona.items(lm, [row.completion for row in whole], bench.trait)["persona_log_odds"] if whole else []
    mean = lambda values: sum(values) / len(values) if values else None
    median = lambda name: sorted(row.scores[name] for row in scored)[len(scored) // 2]
    gates = {gate: mean([float(gate in row.failed) for row in scored]) for gate in bench.cfg.filter.gates}
    return {
        "dose": kappa,
        "kept": len(whole) / len(scored),
        "log_odds": mean(odds),
        "ppl": median("ppl_tail"),
        "rep": median("rep"),
        **gates,
    }


if __name__ == "__main__":
    sys.exit(cli(main))
