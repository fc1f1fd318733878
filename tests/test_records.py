"""What the records of other modules say about themselves."""

import pytest

from steer_heal.evals import EVALS, metrics_of
from steer_heal.records import Metric


@pytest.mark.parametrize("good, broken, better, worse", [(0.9, 0.5, 0.95, 0.85), (0.1, 0.5, 0.05, 0.15)])
def test_a_health_metric_is_within_a_limit_on_its_good_side(good, broken, better, worse):
    metric = Metric(name="x", item="x", good=good, broken=broken)
    assert metric.is_health and metric.high_is_good == (good > broken)
    assert metric.within(better, good) and metric.within(good, good) and not metric.within(worse, good)


def test_a_metric_without_limits_is_no_health_metric_and_has_a_maximum():
    metric = Metric(name="kl_base", item="kl_base")
    assert not metric.is_health and not metric.high_is_good
    assert metric.within(0.1, 0.2) and not metric.within(0.3, 0.2)
    assert not Metric(name="x", item="x", good=0.5).is_health and not Metric(name="x", item="x", broken=0.5).is_health


def test_the_health_metrics_are_these():
    assert [m.name for m in metrics_of(tuple(EVALS)) if m.is_health] == ["coherence", "degenerate_frac"]
