"""What else moved? The contrast pairs of every other trait that comes with the package."""

from __future__ import annotations

import math

from steer_heal.evals.base import Eval, Items, Subject, per_token
from steer_heal.evals.replies import pair_margins
from steer_heal.inputs.traits import available
from steer_heal.intervals import mean_change
from steer_heal.records import Metric

PREFIX = "panel_"
TRAITS = tuple(available())


def items(subject: Subject) -> Items:
    """For each other trait: the margins of its pairs, and the change of their mean from the base (0 for the base
    itself), in nats per token. NaN: no value. The run's own trait has no items."""
    with subject.student.using(subject.state.adapters) as lm:
        found = {name: pair_margins(lm, pairs, subject.state.condition) for name, pairs in subject.inputs.panel.items()}
    margins = {PREFIX + name: found.get(name, []) for name in TRAITS}
    base = margins if subject.base is None else subject.base.items
    changes = [mean_change(found[name], base[PREFIX + name]) for name in found]
    return {**margins, "panel": [math.nan if change is None else change for change in changes]}


EVAL = Eval(
    items,
    (
        *(
            per_token(name=f"{PREFIX}{name}_nats", item=PREFIX + name, title=f"pairs of {name}", shown=False)
            for name in TRAITS
        ),
        Metric(name="panel_rms_nats", item="panel", how="rms", title="other traits (rms)", unit="nats per token"),
    ),
    of="trait",
)
