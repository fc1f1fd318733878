import math

import pytest

from steer_heal.readings import moved_most, readings, retain, slope, table, verdict


def _events(healed: dict, steered: dict | None = None, control: float | None = None) -> list[dict]:
    def metrics(auth, care=-1.2, coherence=0.99, degenerate=0.0, width=0.05):
        return {
            "auth_nats": auth, "care_nats": care, "fairness_nats": -2.0, "loyalty_nats": -2.0, "sanctity_nats": -2.0, "liberty_nats": -2.0,
            "social_nats": -2.0, "coherence": coherence, "degenerate_frac": degenerate, "text_ppl_median": 2.0, "prefill_nll": 0.1,
            "auth_nats_lo": auth + 1.5 - width, "auth_nats_hi": auth + 1.5 + width,
        }

    start = {"stage": "run_start", "round": None, "trait": {"name": "authority", "target": "authority", "sign": -1}}
    out = [start, {"stage": "base", "round": -1, "metrics": metrics(-1.5)}]
    if control is not None:
        out.append({"stage": "control", "round": -1, "metrics": metrics(control)})
    out.append({"stage": "steered", "round": 0, "metrics": metrics(**(steered or {"auth": -2.5, "coherence": 0.9}))})
    return out + [{"stage": "healed", "round": 0, "metrics": metrics(**healed)}]


def test_a_target_that_no_trait_can_have_is_named():
    events = _events({"auth": -2.0})
    events[0]["trait"]["target"] = "$x^{$"
    with pytest.raises(ValueError, match="none of care, fairness"):
        verdict(events)


@pytest.mark.parametrize("healed, word", [
    ({"auth": -2.0}, "GOOD"),
    ({"auth": -2.0, "coherence": 0.9}, "MIXED"),
    ({"auth": -2.0, "degenerate": 0.3}, "MIXED"),
    ({"auth": -2.0, "care": -0.6}, "MIXED"),
    ({"auth": -4.0, "coherence": 0.3}, "BROKEN"),
    ({"auth": -2.0, "degenerate": 0.8}, "BROKEN"),
    ({"auth": -1.6}, "NOT MOVED"),
    ({"auth": -2.0, "width": 0.6}, "NOT MOVED"),
    ({"auth": -1.0}, "WRONG WAY"),
])
def test_the_verdict_checks_coherence_then_the_trait_then_the_rest(healed, word):
    assert verdict(_events(healed)).startswith(word)


def test_the_verdict_says_what_lies_beyond_the_control():
    assert "0.40 beyond the one-round control" in verdict(_events({"auth": -2.0}, control=-1.6))


def test_ratios_are_guarded_where_the_trait_hardly_moved():
    reads = {r.stage: r for r in readings(_events({"auth": -1.52}))}
    assert slope(reads["healed"], reads["base"], "auth_nats") is None
    idle = {r.stage: r for r in readings(_events({"auth": -2.0}, steered={"auth": -1.51}))}
    assert retain(idle["healed"], idle["steered"], idle["base"], "auth_nats") is None


def test_retain_and_slope_of_known_values():
    reads = {r.stage: r for r in readings(_events({"auth": -2.0, "coherence": 0.98}))}
    assert retain(reads["healed"], reads["steered"], reads["base"], "auth_nats") == pytest.approx(0.5)
    assert slope(reads["healed"], reads["base"], "auth_nats") == pytest.approx(100 * math.log(0.98 / 0.99) / 0.5)
    assert slope(reads["base"], reads["base"], "auth_nats") is None


def test_the_foundation_that_moved_most_is_not_the_target():
    assert moved_most(readings(_events({"auth": -2.0, "care": -1.0})), "authority") == "care"


def test_the_table_has_a_row_a_state():
    assert [row["state"] for row in table(_events({"auth": -2.0}, control=-1.6))] == ["base", "control", "steered r0", "healed r0"]
