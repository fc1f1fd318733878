"""The evals: one file each, one line each in this table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from steer_heal.evals import (
    classifier,
    contrast,
    drift,
    everyday,
    holds,
    instructions,
    judge,
    likelihood,
    moral_foundations,
    panel,
    persona,
    text_quality,
    toylm,
)
from steer_heal.evals.base import Eval
from steer_heal.records import Metric

EVALS: dict[str, Eval] = {
    "moral_foundations": moral_foundations.EVAL,
    "likelihood": likelihood.EVAL,
    "text_quality": text_quality.EVAL,
    "drift": drift.EVAL,
    "persona": persona.EVAL,
    "contrast": contrast.EVAL,
    "everyday": everyday.EVAL,
    "instructions": instructions.EVAL,
    "holds": holds.EVAL,
    "panel": panel.EVAL,
    "judge": judge.EVAL,
    "classifier": classifier.EVAL,
    "toylm": toylm.EVAL,
}
"""Every eval by the name that `eval.evals` takes."""


def metrics_of(names: Sequence[str]) -> tuple[Metric, ...]:
    """The metrics of the named evals, in their order."""
    return tuple(replace(metric, of=EVALS[name].of) for name in names for metric in EVALS[name].metrics)
