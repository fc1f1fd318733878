"""How do mean, rmse, p95 and max see a planted loop? A student that learnt to loop, read on clean and on looping text."""

import sys
from dataclasses import replace
from typing import Annotated, get_args

import torch
import tyro

from steer_heal.divergence import Aggregate, aggregate, kl_rev
from steer_heal.evals import drift
from steer_heal.evals.metrics import Condition
from steer_heal.lab import Lab, LabCfg, cli, show
from steer_heal.records import Completion, derive_seed
from steer_heal.stages.heal import heal


def plant(completion: Completion, length: int) -> Completion:
    """The completion with its middle `length` tokens replaced by one of its own tokens, again and again."""
    ids = list(completion.completion_ids)
    start = len(ids) // 2
    ids[start : start + length] = [ids[start]] * length
    return replace(completion, completion_ids=tuple(ids))


def main(lab: Annotated[LabCfg, tyro.conf.arg(name="")], length: int = 4, n: int = 32, epochs: int = 12) -> None:
    """How do mean, rmse, p95 and max see a planted loop? A student that learnt to loop, read on clean and on looping text."""
    bench = Lab(lab.run_config())
    cfg = bench.cfg
    keep = replace(cfg.filter, n_keep=n, max_attempts=4 * n, min_train=2)
    clean = [
        row.completion
        for row in bench.collect(cfg.dose, keep, unsteered=True).kept
        if len(row.completion.completion_ids) >= 4 * length
    ]
    looping = [plant(c, length) for c in clean]
    student, trait = bench.student, bench.trait
    student.cfg = replace(cfg.heal, divergence="nll", epochs=epochs)
    heal(student, looping, 0, student.cfg, derive_seed(cfg.seed, 0, "heal"))
    rows = []
    for name, texts in (("clean text", clean), (f"{length}-token loop", looping)):
        kls = []
        with student.gate("full") as lm:
            states = drift.final_states(lm, texts, Condition(trait.plain_system))
        with student.gate("base") as lm:
            for state, ref in zip(states, drift.final_states(lm, texts, Condition(trait.plain_system)), strict=True):
                kls.append(kl_rev(lm.logits(state).log_softmax(-1), lm.logits(ref).log_softmax(-1)))
        rows.append(
            {
                "text": name,
                **{how: torch.stack([aggregate(kl, how) for kl in kls]).mean().item() for how in get_args(Aggregate)},
            }
        )
    student.discard_round()
    names = get_args(Aggregate)
    rows.append({"text": "loop / clean", **{how: rows[1][how] / rows[0][how] for how in names}})
    tokens = sum(len(c.completion_ids) for c in clean) / len(clean)
    should = (
        f"mean hardly see the loop ({length} of about {tokens:.0f} tokens); rmse and max see it. p95 sees it where it covers more than a twentieth of the text.",
        "the tau you use lie between the two rows of your aggregate: above clean text, below the loop. tau is not comparable across columns.",
    )
    show("How do mean, rmse, p95 and max see a planted loop? (nats)", rows, should, lab, "kl_agg", tokens=tokens)


if __name__ == "__main__":
    sys.exit(cli(main))
