"""Whether a healed student is still whole: its health against limits that the base itself sets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import binomtest, bootstrap

from steer_heal.records import EvalResult, Metric, derive_seed
from steer_heal.settings import BacktrackCfg


def limits(metrics: Sequence[Metric], base: EvalResult, cfg: BacktrackCfg, seed: int) -> dict[str, float]:
    """The value that each metric may reach: as set; of a health metric else the bad end of the base's own 95 percent
    interval, or `good` where that allows more."""
    out = dict(cfg.limits)
    for metric in metrics:
        if metric.name in out:
            continue
        if metric.good is not None and metric.broken is not None:
            low, high = own_interval(base.items[metric.item], seed)
            if math.isinf(low):  # too few items of the base have a value
                continue
            out[metric.name] = min(low, metric.good) if metric.good > metric.broken else max(high, metric.good)
    return out


def own_interval(values: Sequence[float], seed: int) -> tuple[float, float]:
    """95 percent interval of the mean of a state's items: of Wilson (1927) for shares, whose items are 0 or 1, else the
    percentile bootstrap. A share of 0 thus leaves room for the broken text that chance brings."""
    x = np.asarray(values, dtype=np.float64)
    x = x[np.isfinite(x)]
    if len(x) < 2:
        return -math.inf, math.inf
    if np.isin(x, (0.0, 1.0)).all():
        found = binomtest(int(x.sum()), len(x)).proportion_ci(method="wilson")
    else:
        rng = np.random.default_rng(derive_seed(seed, "limits", len(x)) % 2**32)
        found = bootstrap((x,), np.mean, n_resamples=2000, method="percentile", rng=rng).confidence_interval
    return float(found.low), float(found.high)


def broken(metrics: Sequence[Metric], healed: Mapping[str, float | None], limits: Mapping[str, float]) -> list[str]:
    """Every limit that a state is past, in words. A metric without a value is past its limit."""
    out = []
    for metric in metrics:
        if (limit := limits.get(metric.name)) is None:
            continue
        value, high = healed.get(metric.name), (metric.good or 0.0) > (metric.broken or 0.0)
        if value is None or (value < limit if high else value > limit):
            told, most = "has no value" if value is None else f"is {value:{metric.form}}", f"{limit:{metric.form}}"
            if told == f"is {most}":
                told, most = f"is {value:.4g}", f"{limit:.4g}"
            out.append(f"{metric.title or metric.name} {told}, the limit is {most}")
    return out
