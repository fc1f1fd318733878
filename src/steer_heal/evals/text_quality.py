"""Free-text coherence: what the model writes on prompts that were never trained on.

The forced answer slot of the vignettes is generous (the prefill pins it), so this stands beside it.
"""

from __future__ import annotations

from steer_heal.evals.base import Eval, Items, Subject
from steer_heal.records import Metric
from steer_heal.stages.filter import degenerate


def items(subject: Subject) -> Items:
    """Per answer: tail perplexity under the base, whether the text is broken, and whether it has left the question."""
    return {
        "text_tail_ppl": [row.scores["perplexity"] for row in subject.scored],
        "degenerate": [float(degenerate(row)) for row in subject.scored],
        "off_question": [float("relevance" in row.failed) for row in subject.scored],
    }


EVAL = Eval(
    items,
    (
        Metric(name="text_tail_ppl_median", item="text_tail_ppl", how="median", title="text perplexity", form=".2f"),
        Metric(name="degenerate_frac", item="degenerate", title="broken texts", form=".0%", good=0.1, broken=0.5),
        Metric(name="off_question_frac", item="off_question", title="texts off the question", form=".0%", shown=False),
    ),
    of="text",
)
