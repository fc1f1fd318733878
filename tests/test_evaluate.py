import math

import numpy as np
import pytest

from steer_heal.evals.metrics import Metric
from steer_heal.stages.evaluate import collapse, intervals

P = Metric("auth_nats", "p_authority", "log_mean")


def test_nats_are_the_log_of_the_mean_probability():
    assert collapse(P, [0.1, 0.3]) == pytest.approx(math.log(0.2))
    assert collapse(Metric("m", "x", "median"), [1.0, 9.0, 2.0]) == 2.0


def test_unscorable_items_are_left_out_and_none_at_all_is_none():
    assert collapse(P, [0.1, math.nan, 0.3]) == pytest.approx(math.log(0.2))
    assert collapse(P, [math.nan, math.nan]) is None


def _items(values) -> dict:
    return {"p_authority": list(values)}


def test_the_interval_is_of_the_paired_difference():
    """Items differ tenfold among themselves, every one falls by a tenth: paired, the shift is certain."""
    base = np.geomspace(0.05, 0.5, 60)
    out = intervals([P], _items(0.9 * base), _items(base), 2000, seed=0)
    assert out["auth_nats_lo"] == pytest.approx(math.log(0.9), abs=1e-6)
    assert out["auth_nats_hi"] == pytest.approx(math.log(0.9), abs=1e-6)


def test_the_interval_covers_zero_where_nothing_but_noise_changed():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(100):
        base = rng.uniform(0.1, 0.3, 80)
        noisy = base * np.exp(rng.normal(0, 0.2, 80) - 0.02)
        out = intervals([P], _items(noisy), _items(base), 500, seed=trial)
        covered += out["auth_nats_lo"] <= 0 <= out["auth_nats_hi"]
    assert 85 <= covered <= 100


def test_the_interval_is_the_same_for_the_same_seed_and_none_without_values():
    base, here = np.linspace(0.1, 0.3, 20), np.linspace(0.2, 0.3, 20)
    assert intervals([P], _items(here), _items(base), 100, 1) == intervals([P], _items(here), _items(base), 100, 1)
    assert intervals([P], _items([math.nan] * 20), _items(base), 100, 1) == {"auth_nats_lo": None, "auth_nats_hi": None}
