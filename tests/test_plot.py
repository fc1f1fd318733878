"""The pictures of made-up runs: what is drawn, labels that can be told apart, runs with holes."""

import math
from dataclasses import replace
from functools import partial
from itertools import combinations, pairwise

import numpy as np
import pytest
from made_runs import METRICS, changed, renamed, run_events, until, with_config, with_metrics, with_trait
from matplotlib.collections import LineCollection
from matplotlib.text import Text

from steer_heal.events import AnyEvent, HealStepped, Measured, Run, RunStart
from steer_heal.records import Metric
from steer_heal.report import plot
from steer_heal.settings import HealCfg

FIGURES = {
    "trajectory": plot.trajectory,
    "rounds": plot.rounds,
    "map": partial(plot.plane, headline=True),
    "map of the page": plot.plane,
}


def labels(axes) -> dict[str, list]:
    """Boxes of the direct labels in pixels, without the numbers in the markers and the lines to the points."""
    found: dict[str, list] = {}
    for text in axes.texts:
        if not text.get_text().isdigit():
            found.setdefault(text.get_text(), []).append(Text.get_window_extent(text))
    return found


def strokes(axes):
    """Points along every line of the axes, half a pixel apart at the most."""
    for line in axes.get_lines():
        ends = line.get_transform().transform(np.column_stack(line.get_data()).astype(float))
        for start, end in pairwise(ends):
            if np.isfinite([start, end]).all():
                yield from np.linspace(start, end, 2 + int(2 * np.abs(end - start).max()))


@pytest.fixture(scope="module")
def events() -> list[AnyEvent]:
    """Eight rounds that slow down: the late ones crowd."""
    out = run_events(8)
    for r in range(8):
        steered = {"authority_nats": -2.4 - 3.0 * 0.5**r, "liberty_nats": -1.8}
        healed = {"authority_nats": -2.5 + 0.5**r, "liberty_nats": -1.9}
        out = with_metrics(with_metrics(out, steered, ["steered"], r), healed, ["healed"], r)
    return out


def healed(run: Run) -> list[dict]:
    """The metrics of each healed state."""
    return [m.metrics for m in run.each(Measured) if m.state == "healed"]


def in_rounds(events: list[AnyEvent], n: int) -> Run:
    return Run(event for event in events if event.round is None or event.round < n)


def test_both_pictures_are_drawn_and_always_the_same(events, tmp_path):
    drawn = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        plot.save(in_rounds(events, 2), tmp_path / name)
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == ["map.png", "trajectory.png"]
        drawn.append([path.read_bytes() for path in sorted((tmp_path / name).iterdir())])
    assert drawn[0] == drawn[1]


def test_nothing_is_drawn_before_the_base(events, tmp_path):
    plot.save(Run(events[:1]), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("n_rounds", [1, 2, 8])
@pytest.mark.parametrize("off_targets", [True, False])
@pytest.mark.parametrize("name", FIGURES)
def test_no_label_covers_another_leaves_its_axes_or_lies_under_a_line(events, name, off_targets, n_rounds):
    seen = events if off_targets else with_trait(events, off_targets=())
    figure = FIGURES[name](in_rounds(seen, n_rounds))
    figure.draw_without_rendering()
    for axes in figure.axes:
        boxes = [(text, box) for text, found in labels(axes).items() for box in found]
        for (one, a), (other, b) in combinations(boxes, 2):
            overlap = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
            assert min(overlap) <= 1.0, f"{one} covers {other}"
        for text, box in boxes:
            inside = axes.get_window_extent()
            assert inside.x0 - 1 <= box.x0 and box.x1 <= inside.x1 + 1, f"{text} leaves its axes"
            crossing = [p for p in strokes(axes) if box.x0 + 1 < p[0] < box.x1 - 1 and box.y0 + 2 < p[1] < box.y1 - 2]
            assert not crossing, f"a line goes through {text}"


def test_every_state_has_a_label_and_in_the_plane_its_round(events):
    stages = {"base", "prompted", "control", "steered", "healed"}
    target, health, plane = (plot.trajectory(Run(events)).axes[i] for i in (0, 2, 1))
    assert set(labels(target)) == stages and set(labels(plane)) == stages - {"base"} and not labels(health)
    numbers = sorted(text.get_text() for text in plane.texts if text.get_text().isdigit())
    assert numbers == sorted([str(r) for r in range(1, 9)] * 2)


def test_the_left_panels_use_their_whole_width(events):
    for axes in plot.rounds(Run(events)).axes:
        low, high = axes.get_xlim()
        last = max(line.get_xdata()[-1] for line in axes.get_lines() if len(line.get_xdata()) == 8)
        assert 7 <= last < 7.1
        assert (high - 7) / (high - low) < 0.1


def test_a_health_metric_that_is_no_share_is_left_to_the_table(events):
    words = Metric(name="words_off", item="words", good=20.0, broken=60.0)
    start = replace(events[0], metrics=(*events[0].metrics, words))
    told = [replace(e, metrics=e.metrics | {"words_off": 11.0}) if isinstance(e, Measured) else e for e in events[1:]]
    axes = plot.rounds(Run([start, *told])).axes[1]
    assert [text.get_text().split(" (")[0] for text in axes.get_legend().texts] == ["lost coherence", "broken texts"]


def test_health_is_drawn_as_the_share_that_is_lost_with_its_limits_and_intervals(events):
    run = Run(events)
    axes = plot.rounds(run).axes[1]
    drawn = [tuple(line.get_ydata()) for line in axes.get_lines()]
    assert any(np.allclose(y, [1 - m["coherence"] for m in healed(run)]) for y in drawn if len(y) == 8)
    assert any(np.allclose(y, [m["degenerate_frac"] for m in healed(run)]) for y in drawn if len(y) == 8)
    limits = [line.get_ydata()[0] for line in axes.get_lines() if list(line.get_xdata()) == [0, 1]]
    assert np.allclose(limits, [0.05, 0.15, 0.1, 0.5]), "good and broken of each metric"
    assert axes.get_ylim() == (0, 0.25), "the axis ends behind the values"
    bars = [segment[:, 1] for lines in axes.collections for segment in lines.get_segments() if len(segment)]
    assert any(np.allclose(bar, [0.0, 0.1]) for bar in bars), "0.02 - 0.05 to 0.02 + 0.08, not below 0"
    assert [text.get_text().split(" (")[0] for text in axes.get_legend().texts] == ["lost coherence", "broken texts"]


def test_the_axis_of_health_holds_the_intervals_of_what_is_lost(events):
    wide = [
        replace(e, metrics={**e.metrics, "coherence": 0.9, "coherence_lo": -0.6, "coherence_hi": -0.02})
        if isinstance(e, Measured) and e.state == "healed"
        else e
        for e in events
    ]
    axes = plot.rounds(Run(wide)).axes[1]
    ends = [y for lines in axes.collections for segment in lines.get_segments() if len(segment) for y in segment[:, 1]]
    assert 0.5 < max(ends) <= axes.get_ylim()[1]


def test_the_best_round_has_a_ring_if_there_is_a_choice(events):
    for run, best in ((Run(events), 7), (in_rounds(events, 1), None)):
        figure = plot.trajectory(run)
        rings = [line for axes in figure.axes for line in axes.get_lines() if line.get_markersize() == plot.RING["ms"]]
        seen = [(line.get_xdata()[0], line.get_ydata()[0]) for line in rings]
        expected = []
        if best is not None:
            value = healed(run)[best]["authority_nats"]
            expected = [(best, value), (0.1, value - run.measured("base")["authority_nats"])]
        assert np.allclose(seen, expected), seen
        ticks = [tick.get_text() for tick in figure.axes[2].get_xticklabels()]
        assert [tick for tick in ticks if "best" in tick] == ([] if best is None else [f"{best + 1}\nbest"])


def test_the_plane_shows_the_off_target_that_moved_most_or_the_first_other_metric(events):
    assert plot.second_metric(Run(events)).name == "liberty_nats"
    assert plot.second_metric(Run(with_trait(events, off_targets=()))).name == "text_tail_ppl_median"


def test_no_metric_is_known_by_name(events):
    names = {metric.name: f"m{i}" for i, metric in enumerate(METRICS)}
    run = in_rounds(events, 1)
    other = Run(renamed([*run.events, *run.steps], names))
    for draw in FIGURES.values():
        for a, b in zip(draw(run).axes, draw(other).axes, strict=True):
            assert labels(a).keys() == labels(b).keys() and len(a.lines) == len(b.lines)


@pytest.mark.parametrize("missing", ["authority_nats", "liberty_nats", "coherence", "authority_nats_lo"])
@pytest.mark.parametrize("states, value", [(["base"], None), (["steered", "healed"], float("inf"))])
def test_a_metric_without_a_finite_value_leaves_a_hole_and_no_error(missing, states, value):
    run = Run(with_metrics(run_events(1), {missing: value}, states))
    plot.trajectory(run).draw_without_rendering()


def test_a_run_without_health_metrics_is_drawn(events):
    metrics = tuple(metric for metric in METRICS if not metric.is_health)
    plot.trajectory(in_rounds(changed(events, RunStart, metrics=metrics), 1)).draw_without_rendering()


def test_the_curves_of_every_heal_share_their_scale_and_show_the_fall():
    events = [
        replace(event, step=replace(event.step, divergence=3.0))
        if isinstance(event, HealStepped) and event.round == 1
        else event
        for event in run_events(2)
    ]
    figures = plot.heal_curves(Run(events))
    assert list(figures) == [None, 0, 1]
    for panels in zip(*(figure.axes for figure in figures.values()), strict=True):
        assert len({axes.get_ylim() for axes in panels}) == 1
        low, high = panels[0].get_ylim()
        values = [y for axes in panels for line in axes.get_lines() for y in line.get_ydata()]
        assert low <= min(values) and max(values) <= high
    loss, divergence, _, pressure = figures[0].axes
    assert loss.get_ylim()[0] > 0.5, "the axis begins near the lowest loss, 0.76"
    assert 0.1 in [line.get_ydata()[0] for line in divergence.get_lines()], "tau"
    assert 1.0 in [line.get_ydata()[0] for line in pressure.get_lines()]
    assert plot.heal_curves(Run(until(events, Measured, None, "base"))) == {}


@pytest.mark.parametrize("n_rounds", [1, 3])
def test_every_interval_of_the_trait_s_metric_is_seen(n_rounds):
    run = Run(run_events(n_rounds))
    base = run.measured("base")["authority_nats"]
    wanted = {round(base + m[f"authority_nats_{end}"], 6) for m in healed(run) for end in ("lo", "hi")}
    panel = plot.rounds(run).axes[0]
    widths = [c.get_paths() for c in panel.collections if len(c.get_paths()) and c.get_datalim(panel.transData).height]
    seen = {round(y, 6) for paths in widths for path in paths for _, y in path.vertices}
    assert wanted <= seen
    assert n_rounds > 1 or any(isinstance(c, LineCollection) for c in panel.collections)


def test_a_comparison_shows_the_shift_and_the_health_of_every_run(events):
    runs = {"A": Run(events), "B": Run(run_events(2))}
    top, bottom = plot.comparison(runs).axes
    assert set(labels(top)) == {"A", "B"}
    for run in runs.values():
        base = run.measured("base")["authority_nats"]
        n = len(run.rounds)
        shifts = [m["authority_nats"] - base for m in healed(run)]
        assert any(np.allclose(line.get_ydata(), shifts) for line in top.get_lines() if len(line.get_ydata()) == n)
        lost = [m["degenerate_frac"] for m in healed(run)]
        assert any(np.allclose(line.get_ydata(), lost) for line in bottom.get_lines() if len(line.get_ydata()) == n)
    assert [text.get_text() for text in bottom.get_legend().texts] == ["lost coherence", "broken texts"]
    started = Run(events[:2])
    plot.comparison({"A": started, "B": started}).draw_without_rendering()


def test_a_compared_shift_is_over_the_items_that_both_states_have():
    def items(event, values):
        return replace(event, items={**event.items, Run(run_events(2)).trait_metric.item: values})

    for base, told in (([1.0, math.nan, math.nan], [math.log(2.0)] * 2), ([math.nan] * 3, [math.nan, math.nan])):
        run = Run([
            items(e, [2.0, 5.0, 5.0]) if isinstance(e, Measured) and e.state == "healed" else
            items(e, base) if isinstance(e, Measured) and e.state == "base" else e
            for e in run_events(2)
        ])  # fmt: skip
        (top, _) = plot.comparison({"A": run, "B": run}).axes
        lines = [line.get_ydata() for line in top.get_lines() if len(line.get_ydata()) == 2]
        assert any(np.allclose(y, told, equal_nan=True) for y in lines), told


def test_a_frontier_has_the_costs_that_every_row_has_and_the_null_band_beside_kl():
    rows = [{"arm": "a", "round": 0, "shift": 0.2, "broken": 0.1, "kl_base": kl, "panel": None} for kl in (0.1, 0.3)]
    figure = plot.frontier(rows, null=0.05)
    assert [axes.get_xlabel() for axes in figure.axes] == ["share of broken texts", "KL to base, nats"]
    broken, kl = figure.axes
    assert kl.lines[0].get_xdata() == pytest.approx([0.2]), "the mean over the rows of an arm"
    bars = [segment for line in kl.collections if hasattr(line, "get_segments") for segment in line.get_segments()]
    spread = 0.2 / 2**0.5
    assert any(bar[:, 0] == pytest.approx([0.2 - spread, 0.2 + spread]) for bar in bars), "of a sample, n - 1"
    band = max((c.get_paths()[0].vertices for c in kl.collections if c.get_zorder() == 0), key=len)
    at = band[band[:, 0].argmax()]
    assert abs(at[1]) == pytest.approx(0.05 * (at[0] / 0.1) ** 0.5)
    assert not [c for c in broken.collections if c.get_zorder() == 0], "the band is drawn beside KL alone"


def test_the_points_of_an_arm_are_in_the_order_of_its_rounds_and_scales():
    points = ((1, {"scale": 1.5}), (1, {}), (0, {}), (1, {"scale": -1.0}), (1, {"scale": 0.5}))
    rows = [{"arm": "a", "round": r, **at, "shift": (1 + r) * at.get("scale", 1.0), "broken": 0.1} for r, at in points]
    lines = [[*line.get_ydata()] for line in plot.frontier(rows).axes[0].lines[:3]]
    assert lines == [[1.0, 2.0], [1.0, 2.0, 3.0], [-2.0]], "rounds, scales, and none across the untouched model"


@pytest.mark.parametrize(
    "heal, told",
    [
        (HealCfg(), "tokens of the vector, kl_rev rmse, lam 0.1, tau 0.5"),
        (
            HealCfg(target="distribution", text="own", teacher="contrast", divergence="none"),
            "distribution of the contrast, no barrier",
        ),
    ],
)
def test_the_headline_names_what_is_learnt_and_the_barrier_where_there_is_one(heal, told):
    title = " ".join(plot.trajectory(Run(with_config(run_events(1), heal=heal))).get_suptitle().split())
    assert f"seed 42: {told} " in title
