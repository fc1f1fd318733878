"""Ratios, grades and the best round at the very limits that spec.md states."""

import math
from dataclasses import replace

import pytest
from made_runs import TRAIT, run_events, run_start

from steer_heal.evals import EVALS, metrics_of
from steer_heal.events import Measured, RoundDone, Run
from steer_heal.inputs.instruments import FOUNDATIONS
from steer_heal.records import EvalResult, Metric
from steer_heal.settings import TINY_RANDOM
from steer_heal.verdict import best_round, grade, retain, shift, slope, verdict

MOVED = 0.3
GUARD = MOVED / 6
TARGET = Metric(name="target", item="t", moved=MOVED)
COHERENCE = Metric(name="coherence", item="c", good=0.95, broken=0.85)
BROKEN_TEXTS = Metric(name="degenerate_frac", item="d", good=0.1, broken=0.5)
OTHER = Metric(name="other", item="o")
METRICS = (TARGET, COHERENCE, BROKEN_TEXTS, OTHER)
DONE = next(event for event in run_events(1) if isinstance(event, RoundDone))
BASE = {"target": 0.0, "coherence": 1.0, "degenerate_frac": 0.0, "other": 0.0}


def run_of(*healed: dict, metrics=METRICS, sign: int = -1, model: str = "m") -> Run:
    """A run whose base is at 0. Healed rounds have a narrow interval, unless `healed` sets another."""
    start = run_start(1, "")
    trait = replace(TRAIT, target="target", sign=sign, off_targets=("other",))
    events = [replace(start, trait=trait, metrics=metrics, config=replace(start.config, model=model))]
    events.append(Measured(state="base", metrics=BASE, items={}))
    for r, changes in enumerate(healed):
        shift = changes.get("target", -0.5)
        middle = shift or 0.0
        here = BASE | {"target": shift, "target_lo": middle - 1e-3, "target_hi": middle + 1e-3} | changes
        events.append(Measured(round=r, state="healed", metrics=here, items={}))
        events.append(replace(DONE, round=r))
    return Run(events)


def graded(metrics=METRICS, sign: int = -1, **changes) -> str:
    run = run_of(changes, metrics=metrics, sign=sign)
    healed = run.measured("healed", 0)
    assert healed is not None
    found = grade(healed, run)
    assert verdict(run).startswith(f"{found.grade}: ")
    return found.grade


def below(value: float) -> float:
    return math.nextafter(value, -math.inf)


def above(value: float) -> float:
    return math.nextafter(value, math.inf)


# --- the numbers of the metrics -----------------------------------------------------------------------------------
def test_the_limits_of_health_and_the_smallest_shifts_are_those_of_the_specification():
    metrics = metrics_of(tuple(EVALS))
    health = {m.name: (m.good, m.broken) for m in metrics if m.good is not None or m.broken is not None}
    assert health == {"coherence": (0.95, 0.85), "degenerate_frac": (0.1, 0.5), "everyday_right": (0.5, None)} | {
        "instructions_right": (0.5, None),
        "judge_coherence": (50.0, None),
    }
    assert not next(m for m in metrics if m.name == "everyday_right").is_health
    moved = {m.name: m.moved for m in metrics if m.moved is not None}
    foundations = {f"{name}{how}_nats": 0.3 for name in FOUNDATIONS for how in ("", "_likelihood")}
    assert moved == foundations | {
        "persona_log_odds": 0.05,
        "contrast_nats": 0.05,
        "judge_trait": 5.0,
        "classifier_trait": 0.05,
    }


def test_the_way_that_items_become_a_metric_is_that_of_the_specification():
    how = {m.name: m.how for m in metrics_of(tuple(EVALS)) if m.how != "mean"}
    foundations = {f"{name}{way}_nats": "log_mean" for name in FOUNDATIONS for way in ("", "_likelihood")}
    assert how == foundations | {"text_tail_ppl_median": "median", "panel_rms_nats": "rms"}


def test_a_shift_is_over_the_items_that_both_states_answered():
    def state(*items: float) -> EvalResult:
        known = [item for item in items if not math.isnan(item)]
        return EvalResult({"target": sum(known) / len(known)}, {TARGET.item: list(items)})

    base, nan = state(50.0, 52.0, 0.0), math.nan
    assert shift(state(50.5, 52.5, nan), base, TARGET) == pytest.approx(0.5), "and not 51.5 - 34"
    assert shift(state(50.5, 52.5, 0.0), base, TARGET) == pytest.approx(1 / 3)
    assert shift(state(nan, nan, 1.0), state(1.0, 1.0, nan), TARGET) is None
    assert shift(EvalResult({"target": None}), base, TARGET) is None


# --- ratios ------------------------------------------------------------------------------------------------------
def ratios(healed: dict, steered: float = -2.0) -> tuple[float | None, float | None]:
    """(retain, slope)"""
    kept, whole = BASE | healed, BASE | {"target": steered}
    kept, whole, base = map(EvalResult, (kept, whole, BASE))
    return retain(kept, whole, base, TARGET), slope(kept, base, TARGET, METRICS)


def test_retain_is_the_share_of_the_steered_shift_and_slope_percent_of_coherence_per_unit():
    assert ratios({"target": -0.5, "coherence": 0.9}) == pytest.approx((0.25, 100 * math.log(0.9) / 0.5))
    assert ratios({"target": 0.5, "coherence": 0.9}) == pytest.approx((-0.25, 100 * math.log(0.9) / 0.5))


@pytest.mark.parametrize("way", [-1, 1])
def test_a_ratio_is_null_where_its_divisor_is_below_a_sixth_of_moved(way):
    assert ratios({"target": 0.1}, steered=way * GUARD)[0] == pytest.approx(0.1 / (way * GUARD))
    assert ratios({"target": 0.1}, steered=way * below(GUARD))[0] is None
    assert ratios({"target": way * GUARD})[1] is not None and ratios({"target": way * below(GUARD)})[1] is None


# --- grades, in their order ---------------------------------------------------------------------------------------
def test_without_a_value_of_target_or_health_a_round_is_unreadable():
    for name in ("target", "coherence", "degenerate_frac"):
        assert graded(**{name: None}) == "UNREADABLE"
    assert graded(coherence=None, degenerate_frac=0.9) == "UNREADABLE", "before it is broken"


def test_an_off_target_without_a_value_is_named_and_is_not_taken_for_unmoved():
    assert graded() == "GOOD" and graded(other=None) == "MIXED"


def test_past_broken_a_round_is_broken_whichever_way_it_went():
    for moved in (-0.5, 0.5, 0.0):
        for name, at, past in (("coherence", 0.85, below(0.85)), ("degenerate_frac", 0.5, above(0.5))):
            assert graded(target=moved, **{name: past}) == "BROKEN"
            assert graded(target=moved, **{name: at}) != "BROKEN"


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_wrong_way_begins_at_a_sixth_of_moved_with_an_interval_that_leaves_out_0(sign):
    wrong = -sign * GUARD
    assert graded(sign=sign, target=wrong) == "WRONG WAY"
    assert graded(sign=sign, target=wrong, target_lo=None, target_hi=None) == "WRONG WAY", "where it is not known"
    assert graded(sign=sign, target=-sign * below(GUARD)) == "SMALL SHIFT"
    for low, high in ((-1.0, 1.0), (0.0, 1.0), (-1.0, 0.0)):
        assert graded(sign=sign, target=wrong, target_lo=low, target_hi=high) == "SMALL SHIFT"
    assert graded(sign=sign, target=-wrong) == "SMALL SHIFT"
    assert graded(sign=sign, target=-sign * 2.0) == "WRONG WAY"


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_shift_counts_from_moved_on_with_an_interval_that_leaves_out_0(sign):
    assert graded(sign=sign, target=sign * MOVED) == "GOOD"
    assert graded(sign=sign, target=sign * below(MOVED)) == "SMALL SHIFT"
    for low, high in ((-1.0, 1.0), (0.0, 1.0), (-1.0, 0.0), (None, None)):
        assert graded(sign=sign, target=sign * MOVED, target_lo=low, target_hi=high) == "SMALL SHIFT"


def test_a_round_is_good_with_all_health_at_good_and_no_off_target_as_far_as_the_target():
    assert graded(coherence=0.95, degenerate_frac=0.1) == "GOOD"
    assert graded(coherence=below(0.95)) == "MIXED" and graded(degenerate_frac=above(0.1)) == "MIXED"
    for way in (-1, 1):
        assert graded(other=way * below(0.5)) == "GOOD" and graded(other=way * 0.5) == "MIXED"
    assert graded(metrics=(TARGET, OTHER)) == "MIXED", "at least one health metric"
    for limit in ("good", "broken"):
        assert graded(metrics=(TARGET, replace(COHERENCE, **{limit: None}), OTHER)) == "MIXED", "with both limits"


# --- the best round ----------------------------------------------------------------------------------------------
GOOD, FAR = {"target": -0.5}, {"target": -0.9}
MIXED, WIDE = {"target": -3.0, "coherence": 0.9}, {"target": -0.5, "other": 1.0}
STILL, WRONG = {"target": -0.1}, {"target": 0.4}
DEAD, UNREAD = {"target": -4.0, "coherence": 0.1}, {"target": -4.0, "coherence": None}


@pytest.mark.parametrize("better, worse", [(GOOD, MIXED), (WIDE, STILL), (STILL, WRONG), (WRONG, DEAD),
    (WRONG, UNREAD), (FAR, GOOD), (WIDE, MIXED)])  # fmt: skip
def test_the_best_round_has_the_best_grade_then_good_health_then_the_largest_shift(better, worse):
    for rounds, best in (((better, worse), 0), ((worse, better), 1)):
        found = best_round(run_of(*rounds))
        assert found is not None and found.state.round == best


def test_of_a_trait_that_goes_up_the_round_furthest_up_is_best():
    found = best_round(run_of({"target": 0.5}, {"target": 0.9}, {"target": 0.7}, sign=1))
    assert found is not None and found.state.round == 1


def test_no_round_is_best_where_none_is_whole_or_the_model_is_untrained():
    assert best_round(run_of(DEAD, UNREAD)) is None
    untrained = run_of(GOOD, model=TINY_RANDOM)
    assert best_round(untrained) is None and verdict(untrained).startswith("UNTRAINED")
