"""Persona log-odds: is the text likelier under the positive or under the negative persona of the trait?"""

from __future__ import annotations

import math
from collections.abc import Sequence

from steer_heal.evals.base import Eval, Items, Subject, per_token
from steer_heal.model.lm import LM
from steer_heal.records import Completion, Trait


def log_odds(lm: LM, texts: Sequence[Completion], trait: Trait) -> list[float]:
    """For each text, the mean over tokens of log p(token | positive persona) - log p(token | negative persona).

    In nats per token; positive if the text is likelier under the positive persona. NaN for an empty text. `lm` must be
    the base model.
    """
    rows = [c.completion_ids for c in texts]
    positive, negative = (
        lm.completion_nll([lm.chat(c.prompt, side) for c in texts], rows) for side in (trait.positive, trait.negative)
    )
    return [(n - p).mean().item() if len(p) else math.nan for p, n in zip(positive, negative, strict=True)]


def items(subject: Subject) -> Items:
    with subject.student.using("base") as lm:
        return {"persona_log_odds": log_odds(lm, subject.texts, subject.inputs.trait)}


EVAL = Eval(
    items,
    (
        per_token(
            name="persona_log_odds", item="persona_log_odds", title="persona log-odds", moved=0.05, towards_persona=True
        ),
    ),
    of="text",
)
