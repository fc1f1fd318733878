"""A trait score that needs no foundation and no judge: whose text is it, the positive persona's or the negative one's?"""

from __future__ import annotations

import math
from collections.abc import Sequence

from steer_heal.evals.metrics import Metric
from steer_heal.lm import LM
from steer_heal.records import Completion, Trait

METRICS = [Metric("persona_log_odds", "persona_log_odds", "mean")]


def items(lm: LM, completions: Sequence[Completion], trait: Trait) -> dict[str, list[float]]:
    """Per completion: mean over tokens of log p(token | positive persona) - log p(token | negative persona) under
    `lm`, which must be at its base gate; nats per token, above 0 the positive persona's. NaN for an empty text."""
    rows = [c.completion_ids for c in completions]
    positive, negative = (lm.completion_nll([lm.chat(c.prompt, side) for c in completions], rows) for side in (trait.positive, trait.negative))
    odds = [(n - p).mean().item() if len(p) else math.nan for p, n in zip(positive, negative, strict=True)]
    return {"persona_log_odds": odds}
