"""Statistics of items, and their 95 percent intervals: of the difference of two states on the same items, and of the
mean of one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean

import numpy as np
from scipy.special import ndtri, stdtrit

from steer_heal.records import How

LEVEL = 0.95
UPPER = (1 + LEVEL) / 2
FEW = 6
"""Number of items at which the tails of a bootstrap have half their size."""
_OF_MEAN: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mean": lambda mean: mean,
    "log_mean": lambda mean: np.log(np.maximum(mean, 1e-30)),
    "rms": lambda mean: np.sqrt(np.maximum(mean, 0.0)),
}
"""What is made of the mean of the items or, for rms, of their squares."""


def statistic(how: How, x: np.ndarray) -> np.ndarray:
    """The number that the items along the last axis become."""
    return np.median(x, axis=-1) if how == "median" else _OF_MEAN[how](_summed(how, x).mean(axis=-1))


def tails(n: int) -> tuple[float, float]:
    """The quantiles of a bootstrap of n items that bound 95 percent. The tails hold n / (n + FEW) of the 5 percent,
    because the quantiles of few items are too small."""
    tail = (1 - UPPER) * n / (n + FEW)
    return tail, 1 - tail


def _summed(how: How, x: np.ndarray) -> np.ndarray:
    """What is summed over the items."""
    return x**2 if how == "rms" else x


def has_value(how: How, x: np.ndarray) -> np.ndarray:
    """Whether each item takes part in an interval. A median also takes infinite ones."""
    return ~np.isnan(x) if how == "median" else np.isfinite(x)


def finite_mean(values: Iterable[float]) -> float | None:
    """Mean of the values that are finite. None: there are none."""
    finite = [value for value in values if math.isfinite(value)]
    return fmean(finite) if finite else None


def mean_change(here: Sequence[float], there: Sequence[float]) -> float | None:
    """Mean of here - there over the items that have a finite value on both sides. None: no item has."""
    return finite_mean(now - then for now, then in zip(here, there, strict=False))


def by_prompt(how: How, prompts: Sequence[str], *sides: np.ndarray) -> list[np.ndarray]:
    """One item for each prompt in place of several answers to it, which are not independent. A prompt counts by the
    number of its answers, so that the mean stays the same. Anything but a mean, shares, and the answers to one prompt
    alone stay as they are."""
    found, place = np.unique(np.asarray(prompts), return_inverse=True)
    if how != "mean" or len(found) in (1, len(prompts)) or np.isin(sides, (0.0, 1.0)).all():
        return list(sides)
    n_mean = len(prompts) / len(found)
    return [side.mean() + np.bincount(place, side - side.mean()) / n_mean for side in sides]


def of_difference(
    how: How, here: np.ndarray, there: np.ndarray, n_bootstrap: int, rng: np.random.Generator
) -> tuple[float, float] | None:
    """95 percent interval of statistic(here) - statistic(there) over the same items. None: fewer than two items, or
    medians that are both infinite.

    - A difference of shares, whose items are 0 or 1: Agresti and Min (2005). Its width is never 0: that no item changed
      leaves room for a rare change.
    - A median: percentiles of a bootstrap, which resamples the items of both sides together.
    - A mean, the log of one, or a root mean square: `studentized`.

    From 6 items on it covers 0.93 or more. docs/decisions.md has the figures.
    """
    n = len(here)
    if n < 2:
        return None
    if how == "mean" and np.isin((here, there), (0.0, 1.0)).all():
        return _of_shares(here - there)
    if how != "median":
        return studentized(how, here, there, n_bootstrap, rng)
    rows = rng.integers(0, n, (n_bootstrap, n))
    with np.errstate(invalid="ignore"):  # infinite on both sides
        low, high = np.quantile(statistic(how, here[rows]) - statistic(how, there[rows]), tails(n))
    return None if math.isnan(low) or math.isnan(high) else (float(low), float(high))


def _of_shares(change: np.ndarray) -> tuple[float, float]:
    """Wald's interval of the mean change (-1, 0 or 1 an item) with one item added that rose and one that fell."""
    added = np.append(change, (1.0, -1.0))
    half = ndtri(UPPER) * added.std() / math.sqrt(len(added))
    return max(-1.0, float(added.mean() - half)), min(1.0, float(added.mean() + half))


def wilson(k: int, n: int) -> tuple[float, float]:
    """95 percent interval of a share of which k of n were seen (Wilson 1927)."""
    z = float(ndtri(UPPER))
    centre = 2 * k + z**2
    half = z * math.sqrt(4 * k * (n - k) / n + z**2)
    low, high = ((centre + sign * half) / (2 * (n + z**2)) for sign in (-1, 1))
    return 0.0 if k == 0 else low, 1.0 if k == n else high


def studentized(
    how: How, here: np.ndarray, there: np.ndarray, n_bootstrap: int, rng: np.random.Generator
) -> tuple[float, float]:
    """The bootstrap-t interval (Efron and Tibshirani 1993, section 12.5): the difference minus a and plus b jackknife
    standard errors.

    a and b are quantiles of (resampled difference - difference) / its own standard error, one of each tail, but at
    least Student's t. A resample that holds one item over and over has no error and is left out. The items themselves
    count as one resample.
    """
    n = len(here)
    rows = rng.integers(0, n, (n_bootstrap, n))
    found, error = _with_error(how, here, there)
    again, errors = _with_error(how, here[rows], there[rows])
    varied = errors > 1e-9 * error
    ratios = np.append((again - found)[varied] / errors[varied], 0.0)
    lower, upper = tails(n)
    low, high = np.quantile(ratios, lower, method="lower"), np.quantile(ratios, upper, method="higher")
    student = stdtrit(n - 1, UPPER)
    return float(found - error * max(high, student)), float(found - error * min(low, -student))


def _with_error(how: How, here: np.ndarray, there: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The difference of the statistics along the last axis, and its jackknife standard error."""
    n = here.shape[-1]
    summed = [_summed(how, x) for x in (here, there)]
    left_out = [_OF_MEAN[how]((x.sum(axis=-1, keepdims=True) - x) / (n - 1)) for x in summed]
    error = (left_out[0] - left_out[1]).std(axis=-1) * math.sqrt(n - 1)
    return statistic(how, here) - statistic(how, there), error
