"""What the measurements of a run mean: grades, ratios, the verdict and the best round. No metric is known by name."""

from dataclasses import replace

import pytest
from made_runs import METRICS, TRAIT, measured, run_events, run_start

from steer_heal.errors import UserError
from steer_heal.events import Dropped, Measured, RoundDone, Run, RunEnd, Trained
from steer_heal.runs.results import result_row
from steer_heal.verdict import chosen_round, exit_status, grade, past_limits, round_words, table, verdict

AUTHORITY = next(metric for metric in METRICS if metric.name == "authority_nats")
START = run_start(1, "")


def state(name: str, r: int | None, target: float | None, width: float = 0.05, **others) -> Measured:
    """A measured state whose trait metric is `target`, with an interval of the shift from a base at -1.5."""
    known = {"care_nats": -1.2, "loyalty_nats": -2.0, "liberty_nats": -2.0, "coherence": 0.99}
    shifted = (target or 0.0) + 1.5
    interval = {"authority_nats_lo": shifted - width, "authority_nats_hi": shifted + width}
    values = {"authority_nats": target, "degenerate_frac": 0.0, "kl_base": 0.1}
    return replace(measured(name, r, 1, 1, ""), metrics={**known, **values, **interval, **others})


def made(
    healed: dict, steered: dict | None = None, control: float | None = None, start=START, prompted: float | None = None
) -> Run:
    """A run of one round."""
    events = [start, state("base", None, -1.5)]
    if prompted is not None:
        events.append(state("prompted", None, prompted))
    if control is not None:
        events.append(state("control", None, control))
    events.append(state("steered", 0, **(steered or {"target": -2.5, "coherence": 0.9})))
    return Run([*events, state("healed", 0, **healed)])


def with_metric(**changes):
    """The start of a run whose trait metric has other fields."""
    return replace(START, metrics=tuple(replace(m, **changes) if m == AUTHORITY else m for m in METRICS))


def test_a_trait_metric_that_cannot_judge_is_named():
    unknown = replace(START, trait=replace(TRAIT, target="$x^{$"))
    for start, named in ((unknown, "$x^{$"), (with_metric(moved=None), AUTHORITY.name)):
        run = made({"target": -2.0}, start=start)
        for read in (lambda run: run.trait_metric, verdict, table):
            with pytest.raises(ValueError) as error:
                read(run)
            assert named in str(error.value)


def test_an_unreadable_verdict_names_the_metrics_without_a_value():
    line = verdict(made({"target": -2.0, "degenerate_frac": None}))
    assert "degenerate_frac" in line and "coherence" not in line


def test_a_shift_is_told_as_a_share_of_that_of_a_prompt_which_moves_the_trait():
    share = "of what the persona prompt does"
    assert f"-0.500 nats from base, down as wanted, 25 percent {share};" in verdict(
        made({"target": -2.0}, prompted=-3.5)
    )
    for moved_by_prompt in (-1.5, -0.5):
        assert share not in verdict(made({"target": -2.0}, prompted=moved_by_prompt))


def test_the_verdict_gives_each_health_metric_by_its_title_and_form():
    line = verdict(made({"target": -2.0, "coherence": 0.98, "degenerate_frac": 0.05}, control=-1.6))
    assert "authority_nats is -0.500 nats from base, down as wanted" in line
    assert "coherence 0.9800, broken texts 5%;" in line, "no limit is past"
    assert "the control, healed once on unsteered text, is -0.100;" in line
    past = verdict(made({"target": -2.0, "coherence": 0.94, "degenerate_frac": 0.3}))
    assert "coherence 0.9400 (limit 0.95), broken texts 30% (limit 10%)" in past
    broken = verdict(made({"target": -2.0, "degenerate_frac": 0.6}))
    assert "but the model is broken: broken texts 60% (limit 50%)" in broken


def test_the_smallest_shift_that_counts_is_that_of_the_metric():
    assert verdict(made({"target": -1.6}, start=with_metric(moved=0.05))).startswith("GOOD")
    assert verdict(made({"target": -2.0}, start=with_metric(moved=0.6))).startswith("SMALL SHIFT")


def test_the_off_target_that_moved_most_is_named_with_its_shift_and_none_where_there_are_none():
    healed = {"target": -2.0, "liberty_nats": -2.6, "loyalty_nats": -1.5, "kl_base": 9.0}
    assert "of the off-target metrics, liberty moved further than the target: -0.600 nats" in verdict(made(healed))
    less = verdict(made(healed | {"liberty_nats": -2.1, "loyalty_nats": -1.8}))
    assert less.startswith("GOOD")
    assert "of the off-target metrics, loyalty moved most: +0.200 nats" in less
    alone = verdict(made(healed, start=replace(START, trait=replace(TRAIT, off_targets=()))))
    assert alone.startswith("GOOD") and "off-target" not in alone


def rounds(*healed: dict, sign: int = -1) -> Run:
    """Healed rounds in this order, after one base."""
    events = [replace(START, trait=replace(TRAIT, sign=sign)), state("base", None, -1.5)]
    trained = next(event for event in run_events(1) if isinstance(event, Trained))
    for r, changes in enumerate(healed):
        events += [replace(trained, round=r, checkpoint=f"ckpt/r{r}"), state("healed", r, **changes)]
    return Run(events)


def test_a_best_round_that_is_not_the_last_is_named_with_its_checkpoint():
    line = verdict(kept(rounds({"target": -0.9}, {"target": -0.5}, {"target": -0.7}, sign=1)))
    assert line.endswith("best round: 2 (GOOD, +1.000 nats, coherence 0.9900, broken texts 0%): ckpt/r1")
    assert "best round" not in verdict(kept(rounds({"target": -0.9}, {"target": -0.5}, sign=1)))
    assert "best round" not in verdict(rounds({"target": None}))


def test_each_grade_has_an_exit_status():
    target = {"target": -2.0}
    for changes, status in (
        ((target,), 0),
        ((target | {"coherence": 0.9},), 3),
        (({"target": -1.52},), 4),
        ((target, {"target": -0.5}), 5),
        ((target, target | {"degenerate_frac": 0.9}), 6),
        ((), 6),
    ):
        run = rounds(*changes)
        assert exit_status(run) == status, verdict(run)


def kept(run: Run) -> Run:
    """The run with every healed round kept."""
    done = next(event for event in run_events(1) if isinstance(event, RoundDone))
    return Run([*run.events, *(replace(done, round=m.round) for m in run.each(Measured) if m.state == "healed")])


TAKE_2 = r"^round 3 is BROKEN: [^;]* \(limit [^;]*\); take round 2; --allow-broken takes round 3 all the same$"


def test_the_round_that_is_taken_is_the_best_one_and_a_broken_one_only_if_that_is_allowed():
    run = kept(rounds({"target": -0.9}, {"target": -0.5}, {"target": -0.4, "degenerate_frac": 0.9}, sign=1))
    assert [chosen_round(run, which) for which in ("best", 1, 2)] == [1, 0, 1]
    for which in ("last", 3):
        with pytest.raises(UserError, match=TAKE_2):
            chosen_round(run, which)
        assert chosen_round(run, which, allow_broken=True) == 2
    assert chosen_round(run, allow_broken=True) == 1
    assert round_words(run, 1) == "round 2 of 3 (GOOD, the best)"
    going = Run([event for event in run.events if not isinstance(event, RoundDone) or event.round == 0])
    assert chosen_round(going) == 0, "one that is measured and not kept yet is no round"
    small = kept(rounds({"target": -1.49}, {"target": -1.48, "degenerate_frac": 0.3}, sign=1))
    grades = {grade(state, small).grade for state in small.each(Measured) if state.state == "healed"}
    assert grades == {"SMALL SHIFT"} and chosen_round(small) == 0, "health comes before the shift among equal grades"
    assert round_words(run, 2) == "round 3 of 3 (BROKEN)"
    for which in (4, 0):
        with pytest.raises(UserError, match=f"round {which} does not exist; the run has rounds 1 to 3"):
            chosen_round(run, which)
    broken = kept(rounds({"target": -0.9, "coherence": 0.1}, {"target": None}))
    with pytest.raises(UserError, match="round 2 is UNREADABLE: .*; no round is intact"):
        chosen_round(broken)
    assert chosen_round(broken, allow_broken=True) == 1
    with pytest.raises(UserError, match="no healed round; continue it"):
        chosen_round(rounds())
    with pytest.raises(UserError, match="no healed round, and cannot go on: too few"):
        chosen_round(Run([*rounds().events, RunEnd(error="too few", resumable=False)]))
    past = ("broken texts is 60%, the limit is 10%",)
    dropped = Dropped(round=0, past=past, dose=1.0, lr=1e-3, metrics={}, next_kappa=1.0, next_lr_share=0.5)
    with pytest.raises(UserError, match=r"no round was kept: round 1 was dropped \(broken texts.*lower --heal.lr"):
        chosen_round(Run([*rounds().events, *[dropped] * 3]))


def test_what_is_past_a_limit_is_given_with_its_value():
    metrics = [metric for metric in METRICS if metric.name in ("coherence", "degenerate_frac", "kl_base")]
    reached = {"degenerate_frac": 0.1, "coherence": 0.95, "kl_base": 0.2}
    assert past_limits(metrics, dict(reached), reached) == []
    assert past_limits(metrics, {"degenerate_frac": 0.2, "coherence": None, "kl_base": 0.3}, reached) == [
        "coherence has no value, the limit is 0.9500",
        "broken texts is 20%, the limit is 10%",
        "KL to base is 0.300, the limit is 0.200",
    ]


def test_without_a_health_metric_nothing_is_good():
    start = replace(START, metrics=tuple(metric for metric in METRICS if not metric.is_health))
    run = made({"target": -2.0}, start=start)
    assert verdict(run).startswith("MIXED") and all(row["slope"] is None for row in table(run))


# --- tables ------------------------------------------------------------------------------------------------------
def test_the_table_has_a_row_for_each_state_and_a_column_for_each_shown_metric():
    rows = table(made({"target": -2.0}, control=-1.6))
    assert [row["state"] for row in rows] == ["base", "control", "steered round 1", "healed round 1"]
    ratios = ["shift", "lo", "hi", "retain", "slope"]
    shown = ["coherence", "text_tail_ppl_median", "degenerate_frac", "kl_base"]
    assert list(rows[0]) == ["state", "authority_nats", *ratios, *shown]


def test_a_result_row_is_that_of_the_last_healed_state():
    events = run_events()
    assert isinstance(events[-1], RunEnd) and isinstance(events[1], Measured)
    assert result_row(Run([*events[:-1], events[1], events[-1]]))["state"] == "healed round 2"
