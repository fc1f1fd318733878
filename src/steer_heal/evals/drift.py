"""Distance of a state from the base model: the KL divergence along the free text that the state wrote."""

from __future__ import annotations

from steer_heal.evals.base import Eval, Items, Subject
from steer_heal.records import Metric
from steer_heal.stages.states import kl_between


def items(subject: Subject) -> Items:
    """For each answer, the mean of KL(state || base) over its positions, in nats. 0 for an empty answer."""
    with subject.student.using("base") as lm:
        pairs = zip(subject.hidden, subject.base_hidden, strict=True)
        kls = [kl_between(lm, state, reference) for state, reference in pairs]
        return {"kl_base": [kl.mean().item() if len(kl) else 0.0 for kl in kls]}


EVAL = Eval(items, (Metric(name="kl_base", item="kl_base", title="KL to base", unit="nats"),), of="text")
