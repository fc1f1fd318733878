"""Do mean, rmse, p95 and max detect a planted loop? Trains a student to loop; compares clean and looping text."""

from dataclasses import replace
from statistics import mean
from typing import get_args

from steer_heal.diag.lab import Given, Lab, PresetFlags, show, unfiltered
from steer_heal.model.divergence import aggregate, kl_rev
from steer_heal.recipe import Recipe
from steer_heal.records import Completion
from steer_heal.settings import Aggregate, settings
from steer_heal.stages.states import final_states

HOW = get_args(Aggregate)


@settings("")
class Flags(PresetFlags):
    length: int = 4
    """Number of tokens in the loop."""
    n: int = 32
    """Number of texts."""
    epochs: int = 12
    """Epochs of the heal on looping text."""


def plant(completion: Completion, length: int) -> Completion:
    """The completion with its middle `length` tokens replaced by copies of the first of them."""
    ids = list(completion.completion_ids)
    start = len(ids) // 2
    ids[start : start + length] = [ids[start]] * length
    return replace(completion, completion_ids=tuple(ids))


def main(flags: Flags, given: Given) -> None:
    lab = Lab.of(flags.settings(given))
    bench = lab.bench
    own = lab.collect(unsteered=True, n_keep=flags.n, max_attempts=4 * flags.n, min_train=2).completions
    clean = [completion for completion in own if len(completion.completion_ids) >= 4 * flags.length]
    looping = [plant(completion, flags.length) for completion in clean]
    heal = replace(bench.cfg.heal, divergence="none", epochs=flags.epochs)
    tokens = replace(Recipe.control(), name="round")
    bench.heal(tokens, 0, unfiltered(looping), settings=heal)
    rows = []
    for name, texts in (("clean text", clean), (f"{flags.length}-token loop", looping)):
        with bench.student.using("full") as lm:
            states = final_states(lm, texts, bench.plain)
        with bench.student.using("base") as lm:
            pairs = zip(states, final_states(lm, texts, bench.plain), strict=True)
            kls = [kl_rev(*(lm.logits(side).log_softmax(-1) for side in pair)) for pair in pairs]
        rows.append({"text": name, **{how: mean(aggregate(kl, how).item() for kl in kls) for how in HOW}})
    rows.append({"text": "loop / clean", **{how: rows[1][how] / rows[0][how] for how in HOW}})
    n_tokens = mean(len(completion.completion_ids) for completion in clean)
    should = (
        f"mean hardly see the loop ({flags.length} of about {n_tokens:.0f} tokens); rmse and max see it. p95 sees it "
        "if it covers more than a twentieth of the text.",
        "the tau you use lie between the two rows of your aggregate: above clean text, below the loop. tau is not "
        "comparable across columns.",
    )
    show(__doc__, rows, should, flags.out, "kl_agg", tokens=n_tokens)
