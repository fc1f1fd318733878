"""Free-text coherence: what the model writes on prompts that were never trained on.

The forced answer slot of the vignettes is generous (the prefill pins it), so this stands beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from steer_heal.evals.metrics import Metric
from steer_heal.records import OracleScore, Scored
from steer_heal.stages.filter import degenerate

METRICS = [
    Metric("text_ppl_median", "text_ppl", "median"),
    Metric("degenerate_frac", "degenerate", "mean"),
]
ORACLE_METRICS = [
    Metric("oracle", "oracle", "mean"),
    Metric("positive_frac", "positive", "mean"),
]


def items(scored: Sequence[Scored], oracle: Callable[[str], OracleScore] | None) -> dict[str, list[float]]:
    """Per answer: tail perplexity under the base, whether the text is broken and, where a grammar judges it,
    the share of possible sentences and, among those that take a side of any persona pair, of those that take the
    positive one (NaN: none takes a side)."""
    out = {
        "text_ppl": [row.scores["ppl_tail"] for row in scored],
        "degenerate": [float(degenerate(row)) for row in scored],
    }
    if oracle is not None:
        judged = [oracle(row.completion.text) for row in scored]
        sides = [(o.n_care + o.n_love, o.n_care + o.n_defer + o.n_love + o.n_deny) for o in judged]
        out |= {"oracle": [o.share for o in judged], "positive": [positive / n if n else math.nan for positive, n in sides]}
    return out
