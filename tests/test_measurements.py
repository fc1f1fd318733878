import math
from dataclasses import asdict, replace

import pytest
from made_runs import METRICS, TRAIT, renamed, run_events

from steer_heal.report.measurements import (
    best_round,
    measurements,
    metrics_of,
    result_row,
    retain,
    shift,
    slope,
    table,
    target_of,
    verdict,
)

TARGET = next(metric for metric in METRICS if metric.name == "authority_nats")
DOWN = {"metrics": [asdict(metric) for metric in METRICS], "trait": TRAIT, "config": {"model": "m"}}


def _events(healed: dict, steered: dict | None = None, control: float | None = None, start: dict = DOWN) -> list[dict]:
    def metrics(target, width=0.05, **others):
        known = {"care_nats": -1.2, "loyalty_nats": -2.0, "liberty_nats": -2.0, "coherence": 0.99}
        interval = {"authority_nats_lo": target + 1.5 - width, "authority_nats_hi": target + 1.5 + width}
        return known | {"authority_nats": target, "degenerate_frac": 0.0, "kl_base": 0.1} | interval | others

    out = [start | {"stage": "run_start", "round": None}, {"stage": "base", "round": -1, "metrics": metrics(-1.5)}]
    if control is not None:
        out.append({"stage": "control", "round": -1, "metrics": metrics(control)})
    out.append({"stage": "steered", "round": 0, "metrics": metrics(**(steered or {"target": -2.5, "coherence": 0.9}))})
    return [*out, {"stage": "healed", "round": 0, "metrics": metrics(**healed)}]


def _states(*args, **how):
    return {m.stage: m for m in measurements(_events(*args, **how))}


def _with(**changes) -> dict:
    """The start of a run whose target metric has other fields."""
    return DOWN | {"metrics": [asdict(replace(m, **changes) if m == TARGET else m) for m in METRICS]}


def test_a_target_that_cannot_judge_a_trait_is_named():
    for start, named in ((DOWN | {"trait": TRAIT | {"target": "$x^{$"}}, "$x^{$"), (_with(moved=None), TARGET.name)):
        for read in (target_of, verdict, table):
            with pytest.raises(ValueError) as error:
                read(_events({"target": -2.0}, start=start))
            assert named in str(error.value)


@pytest.mark.parametrize("healed, word", [
    ({"target": -2.0}, "GOOD"),
    ({"target": -2.0, "coherence": 0.9}, "MIXED"),
    ({"target": -2.0, "degenerate_frac": 0.3}, "MIXED"),
    ({"target": -2.0, "care_nats": -0.6}, "MIXED"),
    ({"target": -4.0, "coherence": 0.3}, "BROKEN"),
    ({"target": -2.0, "degenerate_frac": 0.8}, "BROKEN"),
    ({"target": -1.6}, "NOT MOVED"),
    ({"target": -2.0, "width": 0.6}, "NOT MOVED"),
    ({"target": -1.0}, "WRONG WAY"),
    ({"target": -1.2, "width": 0.6}, "NOT MOVED"),
    ({"target": -2.0, "coherence": None}, "UNREADABLE"),
    ({"target": -2.0, "degenerate_frac": None}, "UNREADABLE"),
    ({"target": -2.0, "authority_nats": None}, "UNREADABLE"),
])  # fmt: skip
def test_the_verdict_checks_health_then_the_trait_then_the_rest(healed, word):
    assert verdict(_events(healed)).startswith(word)


def test_an_unreadable_verdict_names_the_metrics_without_a_value():
    line = verdict(_events({"target": -2.0, "degenerate_frac": None}))
    assert "degenerate_frac" in line and "coherence" not in line


def test_the_verdict_gives_each_health_metric_by_its_title_and_form():
    line = verdict(_events({"target": -2.0, "coherence": 0.98, "degenerate_frac": 0.05}, control=-1.6))
    assert "authority_nats is -0.500 nats from base, down as wanted" in line
    assert "coherence 0.9800, broken texts 5%;" in line, "no limit is past"
    assert "the control, healed once on unsteered text, is -0.100;" in line
    past = verdict(_events({"target": -2.0, "coherence": 0.94, "degenerate_frac": 0.3}))
    assert "coherence 0.9400 (limit 0.95), broken texts 30% (limit 10%)" in past
    broken = verdict(_events({"target": -2.0, "degenerate_frac": 0.6}))
    assert "counts for nothing: broken texts 60% (limit 50%)" in broken


def test_the_limit_of_movement_is_the_metric_s():
    events = _events({"target": -1.6}, start=_with(moved=0.05))
    assert verdict(events).startswith("GOOD") and slope(*_pair(events), target_of(events)[0], METRICS) is not None
    assert verdict(_events({"target": -2.0}, start=_with(moved=0.6))).startswith("NOT MOVED")


def _pair(events):
    states = {m.stage: m for m in measurements(events)}
    return states["healed"], states["base"]


def test_the_off_target_that_moved_most_is_named_with_its_shift_and_none_where_there_are_none():
    healed = {"target": -2.0, "liberty_nats": -2.6, "loyalty_nats": -1.5, "kl_base": 9.0}
    assert "of what should stay, liberty moved further than the target: -0.600 nats" in verdict(_events(healed))
    less = verdict(_events(healed | {"liberty_nats": -2.1, "loyalty_nats": -1.8}))
    assert less.startswith("GOOD")
    assert "of what should stay, loyalty moved most: +0.200 nats" in less
    alone = verdict(_events(healed, start=DOWN | {"trait": TRAIT | {"off_targets": []}}))
    assert alone.startswith("GOOD") and "should stay" not in alone


def _rounds(*healed: dict, sign: int = -1) -> list[dict]:
    """Healed rounds in this order, after one base."""
    events = _events({"target": -1.5}, start=DOWN | {"trait": TRAIT | {"sign": sign}})
    base, out = dict(events[1]["metrics"]), events[:-1]
    for r, changes in enumerate(healed):
        moved = (changes["authority_nats"] or 0.0) - base["authority_nats"]
        interval = {"authority_nats_lo": moved - 0.05, "authority_nats_hi": moved + 0.05}
        out.append({"stage": "heal", "round": r, "checkpoint": f"ckpt/r{r}"})
        out.append({"stage": "healed", "round": r, "metrics": base | interval | changes})
    return out


GOOD, MIXED = {"authority_nats": -2.0}, {"authority_nats": -2.6, "degenerate_frac": 0.2}
STILL, WRONG, UNREAD = ({"authority_nats": value} for value in (-1.6, -1.0, None))
BROKEN = {"authority_nats": -4.0, "coherence": 0.1}
WIDE = {"authority_nats": -2.0, "liberty_nats": -3.5}
"""MIXED as well, but with good health."""


@pytest.mark.parametrize("rounds, best", [
    ([GOOD, MIXED, STILL, WRONG, BROKEN], 0),
    ([BROKEN, WRONG, STILL, MIXED, GOOD], 4),
    ([BROKEN, WRONG, STILL, MIXED], 3),
    ([STILL, UNREAD, WRONG], 0),
    ([WRONG, BROKEN], 0),
    ([GOOD, GOOD | {"authority_nats": -2.2}, GOOD | {"authority_nats": -2.1}], 1),
    ([GOOD, GOOD], 0),
    ([MIXED, WIDE, MIXED], 1),
    ([BROKEN, UNREAD], None),
])  # fmt: skip
def test_the_best_round_is_the_whole_one_of_the_best_grade_and_then_of_the_largest_shift(rounds, best):
    events = _rounds(*rounds)
    found, line = best_round(events), verdict(events)
    assert (found and found.state.round) == best
    assert ("best round" in line) is (best is not None and best != len(rounds) - 1)
    if "best round" in line:
        assert f"best round: {best} ({found.grade}, " in line and line.endswith(f"ckpt/r{best}")


def test_the_best_round_of_a_trait_that_goes_up_is_the_one_furthest_up():
    up = _rounds({"authority_nats": -0.9}, {"authority_nats": -0.5}, {"authority_nats": -0.7}, sign=1)
    found = best_round(up)
    assert found is not None and found.state.round == 1
    assert "best round: 1 (GOOD, +1.000 nats, coherence 0.9900, broken texts 0%): ckpt/r1" in verdict(up)


def test_without_a_health_metric_nothing_is_good():
    start = DOWN | {"metrics": [asdict(metric) for metric in METRICS if metric.good is None]}
    events = _events({"target": -2.0}, start=start)
    assert verdict(events).startswith("MIXED") and all(row["slope"] is None for row in table(events))


def test_ratios_are_guarded_where_the_trait_hardly_moved():
    still = _states({"target": -1.5 - 0.9 * TARGET.moved / 6})
    assert slope(still["healed"], still["base"], TARGET, METRICS) is None
    idle = _states({"target": -2.0}, steered={"target": -1.51})
    assert retain(idle["healed"], idle["steered"], idle["base"], TARGET) is None


def test_retain_and_slope_of_known_values():
    states = _states({"target": -2.0, "coherence": 0.98})
    base, healed = states["base"], states["healed"]
    assert retain(healed, states["steered"], base, TARGET) == pytest.approx(0.5)
    assert slope(healed, base, TARGET, METRICS) == pytest.approx(100 * math.log(0.98 / 0.99) / 0.5)
    assert slope(base, base, TARGET, METRICS) is None and shift(base, base, TARGET) == 0


def test_the_table_has_a_row_a_state_and_a_column_a_shown_metric():
    rows = table(_events({"target": -2.0}, control=-1.6))
    assert [row["state"] for row in rows] == ["base", "control", "steered r0", "healed r0"]
    ratios = ["shift", "lo", "hi", "retain", "slope"]
    shown = ["coherence", "text_tail_ppl_median", "degenerate_frac", "kl_base"]
    assert list(rows[0]) == ["state", "authority_nats", *ratios, *shown]


def test_a_result_row_is_of_the_last_healed_state():
    events = run_events()
    assert result_row([*events[:-1], events[1], events[-1]])["state"] == "healed r1"


def test_no_metric_is_known_by_name():
    names = {metric.name: f"m{i}" for i, metric in enumerate(METRICS)}
    events, other = run_events(), renamed(run_events(), names)
    assert list(metrics_of(other)) == list(names.values())
    line = verdict(events)
    for old, new in names.items():
        line = line.replace(old, new)
    assert verdict(other) == line
    assert [[*row.values()] for row in table(other)] == [[*row.values()] for row in table(events)]
