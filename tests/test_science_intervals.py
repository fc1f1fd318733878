"""Intervals hold what they claim, from both sides: a wrong level is too narrow or too wide for every test here."""

import hashlib
import math

import numpy as np
import pytest
from scipy.stats import norm, t

from steer_heal.evals.base import intervals
from steer_heal.intervals import by_prompt, of_difference
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
def normal(rng, shape):
    """Items that differ more among themselves than they change: (here, there, the true difference)."""
    there = rng.normal(0, 3, shape)
    return there + rng.normal(0.5, 1, shape), there, 0.5


def skewed(rng, shape):
    """Changes whose skewness is 1."""
    return rng.gamma(4, 1, shape), np.zeros(shape), 4.0


def probabilities(rng, shape):
    """Two parts of one Dirichlet draw: beta-distributed, with means 0.05 and 0.2."""
    drawn = rng.dirichlet((1, 4, 15), shape)
    return drawn[..., 0], drawn[..., 1], math.log(0.05 / 0.2)


def perplexities(rng, shape):
    there = rng.normal(0.8, 0.5, shape)
    return np.exp(there + rng.normal(0.3, 0.4, shape)), np.exp(there), math.exp(1.1) - math.exp(0.8)


def moved(rng, shape):
    """Shifts of other traits from a base where they are 0."""
    return rng.normal(0.5, 1, shape), np.zeros(shape), math.sqrt(1.25)


def won(rng, shape):
    """Independent items of 0 and 1."""
    return (rng.random(shape) < 0.7) * 1.0, (rng.random(shape) < 0.5) * 1.0, 0.2


@pytest.mark.parametrize(
    "how, drawn, limits",
    [
        ("mean", normal, {6: (0.96, 0.99), 12: (0.94, 0.985), 24: (0.94, 0.985), 70: (0.93, 0.98)}),
        ("mean", skewed, {6: (0.93, 0.98), 12: (0.93, 0.975), 24: (0.93, 0.98), 70: (0.945, 0.985)}),
        ("log_mean", probabilities, {6: (0.94, 0.99), 12: (0.94, 0.985), 24: (0.94, 0.985), 70: (0.93, 0.98)}),
        ("median", perplexities, {6: (0.93, 0.965), 12: (0.93, 0.97), 24: (0.95, 0.985), 70: (0.935, 0.98)}),
        ("rms", moved, {6: (0.91, 0.97), 12: (0.91, 0.97), 24: (0.93, 0.97), 70: (0.93, 0.98)}),
        ("mean", won, {6: (0.96, 0.99), 12: (0.94, 0.985), 24: (0.93, 0.98), 70: (0.93, 0.98)}),
    ],
    ids=["normal", "skewed", "log_mean", "median", "rms", "shares"],
)
def test_an_interval_holds_a_known_difference_as_often_as_95_percent_say(how, drawn, limits):
    """Few and many items alike. Intervals of 90 or 99 percent miss a limit at every number of items."""
    rng, n_repetitions = np.random.default_rng(1), 400
    covered = {}
    for n in limits:
        here, there, truth = drawn(rng, (n_repetitions, n))
        found = [of_difference(how, x, y, 200, rng) for x, y in zip(here, there, strict=True)]
        covered[n] = float(np.mean([low <= truth <= high for low, high in found]))
    assert {n: share for n, share in covered.items() if not limits[n][0] <= share <= limits[n][1]} == {}


def test_two_answers_to_a_prompt_are_one_item_of_a_mean():
    rng, n_repetitions, held = np.random.default_rng(3), 400, np.zeros(2)
    prompts = [f"prompt {i % 12}" for i in range(24)]
    for i in range(n_repetitions):
        here = np.tile(rng.normal(0.5, 1, 12), 2) + rng.normal(0, 0.5, 24)  # correlated by 0.8
        sides = here, np.zeros(24)
        grouped = by_prompt("mean", prompts, *sides)
        assert len(grouped[0]) == 12 and grouped[0].mean() == pytest.approx(here.mean())
        for k, (x, y) in enumerate((sides, grouped)):
            low, high = of_difference("mean", x, y, 200, np.random.default_rng(i))
            held[k] += low <= 0.5 <= high
    alone, together = held / n_repetitions
    assert alone < 0.9 < 0.93 < together < 0.98


def test_what_no_prompt_has_twice_and_shares_and_medians_stay_as_they_are():
    x = np.array([0.1, 0.2, 0.4])
    assert by_prompt("mean", ["a", "b", "c"], x)[0] is x and by_prompt("median", ["a", "a", "c"], x)[0] is x
    assert by_prompt("mean", ["a", "a", "b"], np.array([0.0, 1.0, 1.0]))[0].tolist() == [0, 1, 1]
    uneven = by_prompt("mean", ["a", "a", "b"], x)[0]
    assert len(uneven) == 2 and uneven.mean() == pytest.approx(x.mean())
    same = by_prompt("mean", [f"{i % 12}" for i in range(23)], np.full(23, 0.5))[0]
    assert len(same) == 12 and same == pytest.approx(0.5), "a prompt with one answer less is no smaller change"
    assert by_prompt("mean", ["a"] * 3, x)[0] is x, "one prompt alone says nothing of others"


def test_the_limit_of_a_metric_is_of_the_number_that_its_items_become():
    items = [9.0, 10.0, 11.0, 12.0, 13.0] * 4 + [1e6, 1e6]
    low, high = own_interval(items, 0, "median")
    assert 9 <= low <= 11.5 <= high <= 13, "and not that of a mean with two outliers"
    low, high = own_interval([0.2, 0.25, 0.3, 0.2, 0.25, 0.3], 0, "log_mean")
    assert low < math.log(0.25) < high < 0


def test_the_paired_interval_is_as_wide_as_normal_theory_says():
    rng = np.random.default_rng(2)
    base, change = rng.normal(0, 3, 300), rng.normal(0.5, 1, 300)
    error = change.std() / math.sqrt(300)
    low, high = paired(base + change, base, n_bootstrap=8000)
    assert z(low, high, error) == pytest.approx(norm.ppf(0.975), rel=0.03)
    assert (low + high) / 2 == pytest.approx(change.mean(), abs=0.1 * error), "as much below as above"


def test_the_interval_of_a_median_is_that_of_a_plain_resampling():
    rng = np.random.default_rng(3)
    base, here = rng.uniform(0.1, 0.9, 40), rng.uniform(0.2, 0.9, 40)
    rows = stream(7, "bootstrap", 40).integers(0, 40, (250, 40))
    shifts = np.median(here[rows], axis=1) - np.median(base[rows], axis=1)
    tail = 0.025 * 40 / 46
    expected = np.quantile(shifts, [tail, 1 - tail])
    assert paired(here, base, 250, 7, Metric(name="m", item="x", how="median")) == pytest.approx(expected)


@pytest.mark.parametrize(
    "how, of",
    [
        ("mean", np.mean),
        ("log_mean", lambda x: np.log(np.mean(x))),
        ("rms", lambda x: np.linalg.norm(x) / math.sqrt(len(x))),
    ],
    ids=["mean", "log_mean", "rms"],
)
def test_the_interval_of_a_mean_is_studentized_by_jackknife_errors(how, of):
    rng = np.random.default_rng(5)
    base, here, n = rng.uniform(0.1, 0.9, 9), rng.uniform(0.2, 0.9, 9) ** 4, 9

    def error(rows) -> float:
        without = [np.delete(rows, i) for i in range(n)]
        return math.sqrt(n - 1) * float(np.std([of(here[rest]) - of(base[rest]) for rest in without]))

    found = of(here) - of(base)
    drawn = stream(7, "bootstrap", n).integers(0, n, (250, n))
    ratios = sorted([0.0, *((of(here[rows]) - of(base[rows]) - found) / error(rows) for rows in drawn)])
    own, student = error(np.arange(n)), t.ppf(0.975, n - 1)
    tail = 250 * 0.025 * 9 / (9 + 6)
    low, high = ratios[math.floor(tail)], ratios[math.ceil(250 - tail)]
    assert high > student or low < -student, "else this would be Student's interval"
    expected = (found - own * max(high, student), found - own * min(low, -student))
    assert paired(here, base, 250, 7, Metric(name="m", item="x", how=how)) == pytest.approx(expected)


def test_the_interval_of_a_mean_is_at_least_student_s():
    """Ten resamples reach no far quantile."""
    items = np.linspace(-1, 1, 30)
    low, high = paired(items, np.zeros(30), n_bootstrap=10)
    assert z(low, high, items.std(ddof=1) / math.sqrt(30)) == pytest.approx(t.ppf(0.975, 29))


def test_the_interval_of_a_difference_of_shares_adds_an_item_each_way():
    """Agresti and Min 2005. Of 24 items 7 rose and 2 fell."""
    base = np.array([0.0] * 7 + [1.0] * 2 + [0.0] * 5 + [1.0] * 10)
    here = np.array([1.0] * 7 + [0.0] * 2 + [0.0] * 5 + [1.0] * 10)
    rose, fell = 8 / 26, 3 / 26
    half = norm.ppf(0.975) * math.sqrt((rose + fell - (rose - fell) ** 2) / 26)
    assert paired(here, base) == pytest.approx((rose - fell - half, rose - fell + half))
    low, high = paired(np.zeros(24), np.zeros(24))
    assert -0.2 < low < -0.05 and high == -low, "that no item changed leaves room for a rare change"
    assert paired(np.ones(6), np.zeros(6))[1] == 1.0


@pytest.mark.parametrize("how", ["mean", "log_mean", "median"])
def test_items_that_all_change_alike_have_an_interval_without_width(how):
    low, high = paired(np.full(12, 0.3), np.full(12, 0.2), metric=Metric(name="m", item="x", how=how))
    expected = math.log(1.5) if how == "log_mean" else 0.1
    assert (low, high) == pytest.approx((expected, expected), abs=1e-9)


@pytest.mark.parametrize("how", ["mean", "log_mean", "median"])
def test_one_item_has_no_interval_and_two_have_a_finite_one(how):
    metric = Metric(name="m", item="x", how=how)
    assert intervals([metric], {"x": [0.2, math.nan]}, {"x": [0.1, 0.3]}, 200, 0) == {"m_lo": None, "m_hi": None}
    assert np.isfinite(paired([0.2, 0.9], [0.1, 0.3], 200, metric=metric)).all()
    assert np.isfinite(paired([0.0, 0.0, 0.9], [0.1, 0.3, 0.0], 200, metric=metric)).all()


def test_medians_that_are_both_infinite_have_no_interval():
    metric = Metric(name="m", item="x", how="median")
    found = intervals([metric], {"x": [math.inf] * 6}, {"x": [math.inf] * 6}, 200, 0)
    assert found == {"m_lo": None, "m_hi": None}


def test_the_ends_of_an_interval_hardly_depend_on_the_seed_at_the_default_size():
    rng = np.random.default_rng(4)
    here = rng.exponential(1, 24)
    ends = np.array([paired(here, np.zeros(24), seed=seed) for seed in range(40)])
    assert ends.std(axis=0).max() < 0.2 * here.std() / math.sqrt(24)


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


def test_the_interval_of_other_items_is_that_of_their_difference_to_0_on_its_own_stream():
    items = np.random.default_rng(6).exponential(1, 12)
    found = of_difference("mean", items, np.zeros(12), 2000, stream(7, "limits", 12))
    assert own_interval([*items], 7) == pytest.approx(found)


def test_the_interval_of_few_other_items_holds_their_mean_as_often_as_95_percent_say():
    rng = np.random.default_rng(8)
    found = [own_interval([*items], seed) for seed, items in enumerate(1 - rng.beta(2, 8, (400, 6)))]
    assert 0.93 <= np.mean([low <= 0.8 <= high for low, high in found]) <= 0.98


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
