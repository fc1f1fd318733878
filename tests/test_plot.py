"""The pictures, from synthetic events: what is drawn, labels that can be told apart, runs with holes."""

from itertools import combinations

import pytest
from matplotlib.text import Text
from test_report import run_events, write_run

from steer_heal import plot


def labels(figure):
    """The direct labels and their boxes, without the lines that lead to the points."""
    figure.draw_without_rendering()
    return [
        (text.get_text(), Text.get_window_extent(text))
        for axes in figure.axes
        for text in axes.texts
        if text.get_text() != "0.05"
    ]


@pytest.fixture(scope="module")
def events():
    """Eight rounds that slow down: the late ones crowd."""
    out = run_events(8)
    for event in out:
        if event["stage"] == "steered":
            event["metrics"] |= {"auth_nats": -2.4 - 3.0 * 0.5 ** event["round"], "liberty_nats": -1.8}
        if event["stage"] == "healed":
            event["metrics"] |= {"auth_nats": -2.5 + 0.5 ** event["round"], "liberty_nats": -1.9}
    return out


def test_both_pictures_are_drawn_from_the_events_alone(events, tmp_path):
    assert plot.plot(write_run(tmp_path, events)) == tmp_path / "trajectory.png"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["events.jsonl", "map.png", "trajectory.png"]
    assert (tmp_path / "map.png").stat().st_size > 20_000


def test_nothing_is_drawn_before_the_base(events, tmp_path):
    assert plot.plot(write_run(tmp_path, events[:1])) is None
    assert [p.name for p in tmp_path.iterdir()] == ["events.jsonl"]


@pytest.mark.parametrize("headline", [True, False])
def test_every_state_of_the_map_has_a_label_and_none_covers_another(events, headline):
    figure = plot.map_(events, headline)
    boxes = labels(figure)
    assert {text for text, _ in boxes} == {"base", "prompted", "control"} | {
        f"{stage} {r}" for stage in ("steered", "healed") for r in range(8)
    }
    for (one, a), (other, b) in combinations(boxes, 2):
        overlap = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert min(overlap) <= 1.0, f"{one} covers {other}"
    plot.plt.close(figure)


def test_labels_of_the_narrow_picture_stay_inside_it(events):
    figure = plot.rounds(events)
    for text, box in labels(figure):
        assert 0 <= box.x0 and box.x1 <= figure.bbox.x1, text
    plot.plt.close(figure)


@pytest.mark.parametrize("missing", ["auth_nats", "liberty_nats", "coherence", "oracle", "auth_nats_lo"])
@pytest.mark.parametrize("stages", [("base",), ("steered", "healed")])
def test_a_metric_that_is_missing_leaves_a_hole_and_no_error(missing, stages):
    events = run_events(1)
    for event in events:
        if event["stage"] in stages:
            event["metrics"][missing] = None
    for draw in (plot.trajectory, plot.rounds, plot.map_):
        plot.plt.close(draw(events))


def test_a_dollar_in_the_model_s_name_is_no_formula(events, tmp_path):
    start = events[0] | {"config": events[0]["config"] | {"model": "a$\\nonsense{$b"}}
    assert plot.plot(write_run(tmp_path, [start, *events[1:3]])) is not None


def test_the_curves_of_every_round_share_their_scale():
    events = run_events(2)
    for event in events:
        if event["stage"] == "heal_step" and event["round"] == 1:
            event["divergence"] = 3.0
    first, second = plot.heal_curves(events)
    assert [panel["top"] for panel in first["panels"]] == [panel["top"] for panel in second["panels"]]
    assert all(
        panel["top"] >= value
        for curves in (first, second)
        for panel in curves["panels"]
        for _, value in panel["steps"] + panel["checks"]
    )
    assert next(panel for panel in first["panels"] if panel["title"].startswith("divergence"))["limit"] == 0.1
    assert list(plot.heal_curves(events[:5])) == []
