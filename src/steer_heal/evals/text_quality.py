"""Coherence of free text that the model writes on prompts which it was not trained on.

The coherence of moral_foundations is a weaker test, because the prefill fixes most of the answer.
"""

from __future__ import annotations

from steer_heal.evals.base import Eval, Items, Subject
from steer_heal.records import Metric
from steer_heal.stages.filter import degenerate


def items(subject: Subject) -> Items:
    """For each answer: the perplexity of its tail under the base model, whether it is degenerate, and whether it is off
    the question."""
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
