"""What a step found comes back from the event that it was written to."""

import math
from dataclasses import replace

import pytest

from steer_heal.records import Collected, Completion, DoseProbe, Metric, Scored
from steer_heal.runs.codec import collected_from, gen_fields, result_from
from steer_heal.runs.events import EventLog


@pytest.fixture
def log(tmp_path):
    with_file = EventLog(tmp_path)
    yield with_file
    with_file.close()


def test_the_kept_completions_come_back_in_the_order_of_training(log):
    text = Completion(0, "p", (1, 2), (3,), "t", 1.0, 0.5, 7)
    broken, first, second = (
        Scored(replace(text, seed=seed), {"spike": score}, failed, failed)
        for seed, score, failed in ((1, math.inf, ("spike",)), (2, 1.5, ()), (3, 2.5, ()))
    )
    found = Collected(
        (second, first), (first, broken, second), 0.7, (DoseProbe(0.7, 3, 2),), 0.7, (replace(text, seed=9),)
    )
    dose = log.write("dose", 0, kappa=found.kappa, dose=found.dose, probes=found.probes)
    assert collected_from(log.write("gen", 0, **gen_fields(found)), dose) == found


def test_a_value_that_was_not_finite_is_missing_or_of_a_perplexity_infinite(log):
    items = {"ppl": [1.0, math.inf], "p": [0.1, math.nan]}
    event = log.write("base", -1, metrics={"ppl_median": math.inf}, items=items)
    found = result_from(event, [Metric(name="ppl_median", item="ppl", how="median"), Metric(name="p", item="p")])
    assert found.items["ppl"] == [1.0, math.inf] and found.items["p"] == pytest.approx([0.1, math.nan], nan_ok=True)
