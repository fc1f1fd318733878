"""Does a trait hold under attack? The trait's pairs under other system prompts, instructions and earlier talk."""

from __future__ import annotations

import math
from functools import partial

import numpy as np

from steer_heal.evals.base import Eval, Items, Subject, per_token
from steer_heal.evals.replies import pair_margins
from steer_heal.inputs.attacks import attacked
from steer_heal.records import HELD, attack_reference, under_attack


def items(subject: Subject) -> Items:
    """For each pair, in nats per token: the margin without an attack and under each one, and the mean over the attacks
    of the margin minus the base's margin at `attack_reference` (0 for the base itself). NaN: no value, as under a
    contrast of personas: an attack that replaces the system prompt would leave no difference."""
    attacks, condition = subject.inputs.attacks, subject.state.condition
    found = {under_attack(): subject.margins}
    with subject.student.using(subject.state.adapters) as lm:
        for attack in attacks:
            asked = partial(attacked, attack, trait=subject.inputs.trait)
            found[under_attack(attack.name)] = (
                [math.nan] * len(subject.inputs.pairs)
                if condition.contrast
                else pair_margins(lm, subject.inputs.pairs, condition, asked)
            )
    here = np.array([found[under_attack(attack.name)] for attack in attacks])
    there = here
    if (base := subject.base) is not None:
        there = np.array([base.items[attack_reference(attack.name, attack.opposes)] for attack in attacks])
    return {**found, HELD: (here - there).mean(0).tolist()}


EVAL = Eval(
    items,
    (per_token(name="holds_nats", item=HELD, title="shift under attack"),),
    of="pair",
    needs=("pairs",),
    wording=("attack",),
)
