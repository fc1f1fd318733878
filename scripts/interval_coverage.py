"""How often do the 95 percent intervals hold the truth? Each row draws items whose true difference is known and counts
the intervals that hold it, beside the percentile bootstrap of the same resamples.

    python scripts/interval_coverage.py [repetitions]
"""

import sys
from collections.abc import Callable

import numpy as np
from scipy.special import expit, logit

from steer_heal.intervals import UPPER, How, by_prompt, of_difference, statistic
from steer_heal.settings import EvalCfg

SIZES = (6, 12, 24, 70)
N_TRUTH = 4_000_000
"""Items of which the true difference is taken."""
Rng = np.random.Generator
Sample = Callable[[Rng, int], tuple[np.ndarray, np.ndarray]]


def changes(draw: Callable[[Rng, int], np.ndarray]) -> Sample:
    """Items that stand at 0 in one state."""
    return lambda rng, n: (draw(rng, n), np.zeros(n))


def shifted(draw: Callable[[Rng, int], np.ndarray], by: float, spread: float) -> Sample:
    """Probabilities, and the same ones moved on the scale of log-odds."""

    def sample(rng: Rng, n: int) -> tuple[np.ndarray, np.ndarray]:
        there = draw(rng, n)
        return expit(logit(there) + by + spread * rng.normal(size=n)), there

    return sample


def perplexities(rng: Rng, n: int) -> tuple[np.ndarray, np.ndarray]:
    there = rng.normal(0.8, 0.5, n)
    return np.exp(there + rng.normal(0.3, 0.4, n)), np.exp(there)


def shares(here: float, there: float) -> Sample:
    """Items of 0 and 1 that change independently."""
    return lambda rng, n: ((rng.random(n) < here) * 1.0, (rng.random(n) < there) * 1.0)


def won(rng: Rng, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs that nearly keep their order: about one in six changes."""
    there = rng.normal(0.5, 1, n)
    return (there + rng.normal(0.1, 0.4, n) > 0) * 1.0, (there > 0) * 1.0


ROWS: dict[str, tuple[How, Sample]] = {
    "mean: normal": ("mean", changes(lambda rng, n: rng.normal(0.5, 1, n))),
    "mean: t, 5 degrees of freedom": ("mean", changes(lambda rng, n: rng.standard_t(5, n))),
    "mean: gamma, shape 4": ("mean", changes(lambda rng, n: rng.gamma(4, 1, n))),
    "mean: exponential": ("mean", changes(lambda rng, n: rng.exponential(1, n))),
    "mean: lognormal, sigma 1": ("mean", changes(lambda rng, n: rng.lognormal(0, 1, n))),
    "log_mean: beta(2, 8)": ("log_mean", shifted(lambda rng, n: rng.beta(2, 8, n), -1, 0.5)),
    "log_mean: beta(0.5, 2)": ("log_mean", shifted(lambda rng, n: rng.beta(0.5, 2, n), -0.5, 0.5)),
    "log_mean: beta(8, 2)": ("log_mean", shifted(lambda rng, n: rng.beta(8, 2, n), -1, 0.5)),
    "log_mean: log-odds -3 ± 1.5": ("log_mean", shifted(lambda rng, n: expit(rng.normal(-3, 1.5, n)), -1, 0.7)),
    "median: lognormal, paired": ("median", perplexities),
    "median: lognormal, unpaired": ("median", lambda rng, n: (rng.lognormal(1, 0.6, n), rng.lognormal(0.8, 0.3, n))),
    "share: 0.1 to 0.3": ("mean", shares(0.3, 0.1)),
    "share: 0.5 to 0.7": ("mean", shares(0.7, 0.5)),
    "share: 0 to 0.15": ("mean", shares(0.15, 0.0)),
    "share: pairs won": ("mean", won),
}


def percentile(how: How, here: np.ndarray, there: np.ndarray, n_bootstrap: int, rng: Rng) -> tuple[float, float]:
    rows = rng.integers(0, len(here), (n_bootstrap, len(here)))
    low, high = np.quantile(statistic(how, here[rows]) - statistic(how, there[rows]), (1 - UPPER, UPPER))
    return float(low), float(high)


def coverage(how: How, sample: Sample, n: int, n_repetitions: int) -> tuple[float, float]:
    """(percentile, ours): the share of intervals of `n` items that hold the truth."""
    far, near = sample(np.random.default_rng(0), N_TRUTH)
    truth = float(statistic(how, far) - statistic(how, near))
    rng, held = np.random.default_rng(n), np.zeros(2)
    for i in range(n_repetitions):
        here, there = sample(rng, n)
        for k, method in enumerate((percentile, of_difference)):
            found = method(how, here, there, EvalCfg().n_bootstrap, np.random.default_rng(i))
            held[k] += found is not None and found[0] <= truth <= found[1]
    return held[0] / n_repetitions, held[1] / n_repetitions


def of_answers(correlation: float, n_repetitions: int) -> tuple[float, float]:
    """(with an item for each answer, for each prompt): the share of intervals of the mean of two normal answers to each
    of 12 prompts that hold the truth."""
    rng, held = np.random.default_rng(12), np.zeros(2)
    prompts = [str(i % 12) for i in range(24)]
    for i in range(n_repetitions):
        here = np.tile(rng.normal(0.5, correlation**0.5, 12), 2) + rng.normal(0, (1 - correlation) ** 0.5, 24)
        sides = [here, np.zeros(24)]
        for k, (x, y) in enumerate((sides, by_prompt("mean", prompts, *sides))):
            found = of_difference("mean", x, y, EvalCfg().n_bootstrap, np.random.default_rng(i))
            held[k] += found is not None and found[0] <= 0.5 <= found[1]
    return held[0] / n_repetitions, held[1] / n_repetitions


def main(n_repetitions: int = 1000) -> None:
    print("| items | " + " | ".join(f"n = {n}" for n in SIZES) + " |\n|---|" + "---|" * len(SIZES))
    for name, (how, sample) in ROWS.items():
        cells = ["{:.2f}, {:.3f}".format(*coverage(how, sample, n, n_repetitions)) for n in SIZES]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    for correlation in (0.0, 0.5, 0.8):
        each, by = of_answers(correlation, n_repetitions)
        print(f"two answers to 12 prompts, correlation {correlation}: {each:.2f} by answer, {by:.2f} by prompt")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
