"""How do mean, rmse, p95 and max see a planted loop? A student that learnt to loop, on clean and on looping text."""

from dataclasses import replace
from statistics import mean
from typing import get_args

from steer_heal import round as steps
from steer_heal.diag.lab import Lab, LabFlags, kept, show
from steer_heal.model.divergence import Aggregate, aggregate, kl_rev
from steer_heal.model.steering import Condition
from steer_heal.records import Completion
from steer_heal.stages.states import final_states

HOW = get_args(Aggregate)


def plant(completion: Completion, length: int) -> Completion:
    """The completion with its middle `length` tokens replaced by one of its own tokens, again and again."""
    ids = list(completion.completion_ids)
    start = len(ids) // 2
    ids[start : start + length] = [ids[start]] * length
    return replace(completion, completion_ids=tuple(ids))


def main(lab: LabFlags, length: int = 4, n: int = 32, epochs: int = 12) -> None:
    bench = Lab(lab.run_config())
    own = bench.collect(unsteered=True, n_keep=n, max_attempts=4 * n, min_train=2).completions
    clean = [completion for completion in own if len(completion.completion_ids) >= 4 * length]
    looping = [plant(completion, length) for completion in clean]
    student, plain = bench.student, Condition(bench.trait.plain_system)
    heal = replace(bench.cfg.heal, divergence="none", epochs=epochs)
    steps.heal(student, kept(looping), bench.inputs, replace(bench.cfg, heal=heal), 0)
    rows = []
    for name, texts in (("clean text", clean), (f"{length}-token loop", looping)):
        with student.using("full") as lm:
            states = final_states(lm, texts, plain)
        with student.using("base") as lm:
            pairs = zip(states, final_states(lm, texts, plain), strict=True)
            kls = [kl_rev(*(lm.logits(side).log_softmax(-1) for side in pair)) for pair in pairs]
        rows.append({"text": name, **{how: mean(aggregate(kl, how).item() for kl in kls) for how in HOW}})
    rows.append({"text": "loop / clean", **{how: rows[1][how] / rows[0][how] for how in HOW}})
    tokens = mean(len(completion.completion_ids) for completion in clean)
    should = (
        f"mean hardly see the loop ({length} of about {tokens:.0f} tokens); rmse and max see it. p95 sees it where it "
        "covers more than a twentieth of the text.",
        "the tau you use lie between the two rows of your aggregate: above clean text, below the loop. tau is not "
        "comparable across columns.",
    )
    show(__doc__, rows, should, lab.out, "kl_agg", tokens=tokens)
