"""What every eval shares: the condition a model answers in, and how item values become a metric.

A metric is a name, the item it is computed from and how; that is all a paired bootstrap needs to know.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from steer_heal.steering import Vector


@dataclass(frozen=True)
class Condition:
    """In which state the model answers, besides its weights."""

    system: str = ""
    """System prompt; empty: none."""
    vector: Vector | None = None
    dose: float = 0.0


@dataclass(frozen=True)
class Metric:
    """`how` collapses the item values: log_mean is log(mean), in nats."""

    name: str
    item: str
    how: Literal["mean", "log_mean", "median"]
