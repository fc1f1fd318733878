"""Intervals hold what they claim, from both sides: a wrong level is too narrow or too wide for every test here."""

import hashlib
import math

import numpy as np
import pytest
from scipy.stats import bootstrap, norm

from steer_heal.evals.base import intervals
from steer_heal.records import EvalResult, Metric
from steer_heal.settings import BacktrackCfg, EvalCfg
from steer_heal.verdict import limits, own_interval, past_limits

N_BOOTSTRAP = EvalCfg().n_bootstrap
MEAN = Metric(name="m", item="x")
HIGH = Metric(name="high", item="x", good=0.95, broken=0.85)
LOW = Metric(name="low", item="x", good=0.1, broken=0.5)


def stream(*parts) -> np.random.Generator:
    """The documented random stream: the first 63 bits of a SHA-256, of which numpy takes 32."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return np.random.default_rng((int.from_bytes(digest[:8], "big") >> 1) % 2**32)


def paired(here, there, n_bootstrap=N_BOOTSTRAP, seed=0, metric=MEAN) -> tuple[float, float]:
    found = intervals([metric], {"x": [*here]}, {"x": [*there]}, n_bootstrap, seed)
    low, high = found[f"{metric.name}_lo"], found[f"{metric.name}_hi"]
    assert low is not None and high is not None
    return low, high


def z(low: float, high: float, standard_error: float) -> float:
    """Half the width of an interval in standard errors: 1.96 at 95 percent."""
    return (high - low) / 2 / standard_error


# --- the paired interval of a difference to base ------------------------------------------------------------------
def test_the_paired_interval_covers_a_known_shift_as_often_as_95_percent_say():
    """The 90 and 99 percent intervals of the same items miss these limits on either side, and so do unpaired ones."""
    rng, n_repetitions, shift = np.random.default_rng(1), 400, 0.5
    metrics = [Metric(name=f"m{i}", item=f"x{i}") for i in range(n_repetitions)]
    base = {metric.item: rng.normal(0, 3, 70).tolist() for metric in metrics}
    here = {item: (values + rng.normal(shift, 1, 70)).tolist() for item, values in base.items()}
    found = intervals(metrics, here, base, 500, seed=0)
    covered = np.mean([found[f"{m.name}_lo"] <= shift <= found[f"{m.name}_hi"] for m in metrics])
    assert 0.925 <= covered <= 0.97


def test_the_paired_interval_is_as_wide_as_normal_theory_says():
    rng = np.random.default_rng(2)
    base, change = rng.normal(0, 3, 300), rng.normal(0.5, 1, 300)
    error = change.std() / math.sqrt(300)
    low, high = paired(base + change, base, n_bootstrap=8000)
    assert z(low, high, error) == pytest.approx(norm.ppf(0.975), rel=0.03)
    assert (low + high) / 2 == pytest.approx(change.mean(), abs=0.1 * error), "as much below as above"


@pytest.mark.parametrize("how", ["mean", "log_mean", "median"])
def test_the_paired_interval_is_that_of_a_plain_resampling(how):
    rng = np.random.default_rng(3)
    base, here = rng.uniform(0.1, 0.9, 40), rng.uniform(0.2, 0.9, 40)
    collapsed = {"mean": np.mean, "median": np.median, "log_mean": lambda x, axis: np.log(np.mean(x, axis))}[how]
    rows = stream(7, "bootstrap", 40).integers(0, 40, (250, 40))
    shifts = np.sort(collapsed(here[rows], axis=1) - collapsed(base[rows], axis=1))
    assert paired(here, base, 250, 7, Metric(name="m", item="x", how=how)) == pytest.approx(
        np.quantile(shifts, [0.025, 0.975])
    )


def test_the_ends_of_an_interval_hardly_depend_on_the_seed_at_the_default_size():
    rng = np.random.default_rng(4)
    base = np.zeros(70)
    here = rng.normal(0, 1, 70)
    ends = np.array([paired(here, base, seed=seed) for seed in range(40)])
    assert ends.std(axis=0).max() < 0.09 * here.std() / math.sqrt(70)


# --- the base's own interval, which limits a round ----------------------------------------------------------------
@pytest.mark.parametrize("n_broken, n", [(0, 24), (1, 24), (12, 70), (70, 70)])
def test_the_interval_of_a_share_is_wilson_s(n_broken, n):
    share, squared = n_broken / n, norm.ppf(0.975) ** 2
    middle = (share + squared / (2 * n)) / (1 + squared / n)
    half = math.sqrt(squared * share * (1 - share) / n + squared**2 / (4 * n * n)) / (1 + squared / n)
    found = own_interval([1.0] * n_broken + [0.0] * (n - n_broken), seed=0)
    assert found == pytest.approx((middle - half, middle + half), abs=1e-9)


def test_the_interval_of_other_items_is_as_wide_as_normal_theory_says_whatever_the_seed():
    items = np.random.default_rng(5).uniform(0.8, 1.0, 300)
    error = items.std() / math.sqrt(300)
    found = np.array([own_interval([*items], seed) for seed in range(20)])
    assert np.mean([z(*each, error) for each in found]) == pytest.approx(norm.ppf(0.975), rel=0.03)
    assert found.std(axis=0).max() < 0.09 * error
    again = own_interval([*items], 0)
    assert again == tuple(found[0]) != tuple(found[1])


def test_the_interval_of_other_items_is_the_percentile_bootstrap_on_its_own_stream():
    items = np.random.default_rng(6).uniform(0, 1, 12)
    found = bootstrap((items,), np.mean, n_resamples=2000, method="percentile", rng=stream(7, "limits", 12))
    assert own_interval([*items], 7) == pytest.approx(found.confidence_interval)


# --- the limits of a round ----------------------------------------------------------------------------------------
def of_base(values) -> EvalResult:
    return EvalResult({}, {"x": list(values)})


def test_a_health_metric_may_go_to_the_bad_end_of_the_base_s_interval_or_to_good_where_that_allows_more():
    cfg, whole, poor = BacktrackCfg(), [1.0] * 200, [1.0, 0.0] * 100
    low, high = own_interval(poor, 0)
    assert limits([HIGH], of_base(whole), cfg, 0) == {"high": 0.95}, "the interval begins above good"
    assert limits([HIGH], of_base(poor), cfg, 0) == {"high": low} and low < 0.5
    assert limits([LOW], of_base([0.0] * 200), cfg, 0) == {"low": 0.1}, "the interval ends below good"
    assert limits([LOW], of_base(poor), cfg, 0) == {"low": high} and high > 0.5


def test_a_limit_that_was_set_holds_as_it_is_and_a_metric_that_is_no_health_has_none():
    cfg = BacktrackCfg(limits={"high": 0.99, "kl_base": 0.2})
    kl = Metric(name="kl_base", item="x")
    assert limits([HIGH, kl], of_base([1.0, 0.0] * 100), cfg, 0) == {"high": 0.99, "kl_base": 0.2}
    assert limits([kl], of_base([0.1, 0.2]), BacktrackCfg(), 0) == {}


@pytest.mark.parametrize("metric, past", [(HIGH, -1), (LOW, 1)])
def test_a_state_at_its_limit_is_whole_and_one_past_it_is_not(metric, past):
    reached = {metric.name: 0.3}
    for value, n_past in ((0.3, 0), (0.3 + 1e-9 * past, 1), (0.3 - 1e-9 * past, 0), (None, 1)):
        assert len(past_limits([metric], {metric.name: value}, reached)) == n_past
