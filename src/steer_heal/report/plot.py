"""Pictures of a run, drawn from its events alone: trajectory.png, map.png, and the figures of the page."""

from __future__ import annotations

import base64
import io
import itertools
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation, Text

from steer_heal.errors import printable
from steer_heal.records import Metric
from steer_heal.report.measurements import (
    Measurement,
    best_round,
    direction,
    health_of,
    is_high,
    measurements,
    metrics_of,
    run_start,
    shift,
    target_of,
    title,
    verdict,
)
from steer_heal.runs.events import current, heal_steps, of_stage, read_events
from steer_heal.runs.storage import atomic_write

Event = Mapping[str, Any]
Label = tuple[Axes, Annotation]
COLOURS = {"base": "#6b6b6b", "prompted": "#3b6fb6", "control": "#b08900", "steered": "#c8452f", "healed": "#1f8a5b"}
MARKERS = {"base": "o", "prompted": "D", "control": "X", "steered": "s", "healed": "o"}
PLACES = {"base": -0.03, "prompted": 0.0, "control": 0.03}
"""Where the states before the loop stand around -1 on the axis of rounds, as a share of its length."""
RING: dict[str, Any] = {"marker": "o", "ms": 17, "mfc": "none", "mec": COLOURS["healed"], "ls": "", "zorder": 5}
"""Around the best round."""
STROKES = ("-", "--", ":", "-.")
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.hashsalt": "steer-heal",
    "text.parse_math": False,
}
CURVES = {
    "fit": "loss of the fit, nats a token",
    "divergence": "divergence, nats",
    "barrier": "barrier, nats of loss",
    "pressure": "gradient pressure",
}
CURVE_POINTS = 200
SETTING_CHARACTERS = 200
TICKS = (0, 0.01, 0.05, 0.1, 0.25, 0.5, 1)
"""Shares that the axis of health is marked at."""
_SQUARE_ROOT = (lambda share: np.sqrt(np.maximum(share, 0)), np.square)
RUN_COLOURS = ("#3b6fb6", "#c8452f", "#1f8a5b", "#b08900", "#7b52ab", "#6b6b6b")
DODGE, STAGE_DODGE = 0.01, {"steered": -0.0025, "healed": 0.0025}
"""By what share of the axis intervals of one round stand apart: per metric, per stage."""
PIXELS_APART = 6
"""Spacing of the points on lines that labels avoid."""
LABEL_POINTS = (4, 9, 15, 22, 30, 40, 52, 66)
"""Distances of a label from its point that are tried, in points. From the third on, a line leads to it."""


def plot(folder: Path) -> Path | None:
    """Draws trajectory.png and map.png from the events alone; None where base was not measured yet."""
    events = current(read_events(folder))
    if not is_measured(events):
        return None
    for name, draw in (("trajectory.png", trajectory), ("map.png", map_)):
        with atomic_write(folder / name) as part:
            draw(events).savefig(part, format="png", dpi=130)
    return folder / "trajectory.png"


def is_measured(events: Sequence[Event]) -> bool:
    """Whether there is a base to draw the other states against."""
    return any(e["stage"] == "base" for e in events)


@matplotlib.rc_context(STYLE)
def trajectory(events: Sequence[Event]) -> Figure:
    """The target and the health of the model over the rounds, beside the plane of the target and a second metric."""
    figure = Figure(figsize=(12.5, 7.4), layout="constrained")
    _headline(figure, events, 150)
    grid = figure.add_gridspec(2, 2, width_ratios=(1.6, 1))
    top, plane = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[:, 1])
    labels = _rounds(top, figure.add_subplot(grid[1, 0], sharex=top), events) + _plane(plane, events)
    _place_labels(figure, labels)
    return figure


@matplotlib.rc_context(STYLE)
def rounds(events: Sequence[Event]) -> Figure:
    """The left half of the trajectory, narrow enough to be read on a phone."""
    figure = Figure(figsize=(5.2, 6.4), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    _place_labels(figure, _rounds(top, bottom, events))
    return figure


@matplotlib.rc_context(STYLE)
def comparison(runs: Mapping[str, Sequence[Event]]) -> Figure:
    """By name of the run: the shift of its target over the healed rounds, above its health."""
    figure = Figure(figsize=(8.6, 7.2), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    top.axhline(0, color=COLOURS["base"], lw=1)
    bottom.set_yscale("function", functions=_SQUARE_ROOT)
    labels, targets, strokes = [], {}, {}
    for (name, events), colour in zip(runs.items(), itertools.cycle(RUN_COLOURS), strict=False):
        states, (target, sign), health = measurements(events), target_of(events), health_of(metrics_of(events).values())
        base = next(m for m in states if m.stage == "base")
        targets[f"{_axis(target)}, wanted {direction(sign)}"] = None
        if (healed := _series(states, target).get("healed")) is not None and base[target.name] is not None:
            x, (y, low, high) = healed[:, 0], (healed[:, 1:] - base[target.name]).T
            top.plot(x, y, color=colour, marker="o", lw=1.8)
            top.vlines(x, low, high, color=colour, lw=1, alpha=0.5)
            labels.append(_label(top, (x[-1], y[-1]), name, colour))
        for metric in health:
            told = f"lost {title(metric)}" if is_high(metric) else title(metric)
            stroke = strokes.setdefault(told, STROKES[len(strokes) % len(STROKES)])
            series = _series(states, metric).get("healed", np.empty((0, 4)))
            bottom.plot(series[:, 0], _lost(metric, series[:, 1]), stroke, color=colour, marker="o", lw=1.6)
    top.set_title("\n".join(["Shift of the target from base, healed rounds (bar: 95 %)", *targets]))
    bottom.set_title("Health: what is lost")
    _share_axis(bottom, max([0.0, *(y for line in bottom.get_lines() for y in np.asarray(line.get_ydata()))]))
    bottom.set_xlabel("round")
    bottom.xaxis.get_major_locator().set_params(integer=True)
    top.margins(0.1)
    for told, stroke in strokes.items():
        bottom.plot([], [], stroke, color="#444444", label=told)
    if strokes:
        bottom.legend(loc="upper center", bbox_to_anchor=(0.45, -0.2), ncols=3)
    _place_labels(figure, labels)
    return figure


def data_uri(figure: Figure) -> str:
    """The figure as an SVG inside of a page."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


@matplotlib.rc_context(STYLE)
def map_(events: Sequence[Event], headline: bool = True) -> Figure:
    """The plane of the target and a second metric, with 95 percent intervals against base on both axes."""
    figure = Figure(figsize=(6.2, 7.2) if headline else (5.2, 6.4), layout="constrained")
    if headline:
        _headline(figure, events, 75)
    _place_labels(figure, _plane(figure.subplots(), events, intervals=True))
    return figure


@matplotlib.rc_context(STYLE)
def heal_curves(events: Sequence[Event]) -> dict[int, Figure]:
    """Small multiples of each heal by its round (the control's is -1), scaled alike in all rounds."""
    config, ends = run_start(events)["config"]["heal"], {e["round"]: e for e in of_stage(events, "heal")}
    steps: dict[int, list[Event]] = {}
    for step in heal_steps(events):
        steps.setdefault(step["round"], []).append(step)
    figures = {}
    for r, mine in sorted(steps.items()):
        figure, end = Figure(figsize=(5.2, 4.0), layout="constrained"), ends.get(r, {})
        limits = {"divergence": end.get("tau", config["tau"]), "pressure": 1.0}
        for (name, heading), axes in zip(CURVES.items(), figure.subplots(2, 2, sharex=True).flat, strict=True):
            _curve(axes, name, mine[:: len(mine) // CURVE_POINTS + 1], color=COLOURS["prompted"], lw=1.0)
            _curve(axes, name, end.get("validation", ()), color=COLOURS["healed"], lw=2.0, marker="o", ms=3)
            if limits.get(name) is not None:
                axes.axhline(limits[name], color=COLOURS["steered"], lw=1, ls="--")
            axes.set_title(heading, fontsize=9)
            axes.set_xlim(0, config["epochs"])
        figure.supxlabel("epoch", fontsize=9)
        figures[r] = figure
    for panels in zip(*(figure.axes for figure in figures.values()), strict=True):
        low, high = zip(*(axes.get_ylim() for axes in panels), strict=True)
        for axes in panels:
            axes.set_ylim(min(low), max(high))
    return figures


def _curve(axes: Axes, name: str, rows: Sequence[Event], **style: Any) -> None:
    points = [(row["epoch"], row[name]) for row in rows if row.get(name) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), **style)


def _headline(figure: Figure, events: Sequence[Event], width: int) -> None:
    """What was run, and the verdict."""
    start = run_start(events)
    heal = start["config"]["heal"]
    setting = printable(
        f"{start['trait']['name']} into {start['config']['model']}, seed {start['seed']}: {heal['divergence']} "
        f"{heal['aggregate']}, lam {heal['lam']:g}, tau {heal['tau']:g}"
    )
    shown = setting if len(setting) <= SETTING_CHARACTERS else f"{setting[:SETTING_CHARACTERS]}..."
    lines = [line for text in (shown, verdict(events)) for line in textwrap.wrap(text, width)]
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=10)


def _rounds(top: Axes, bottom: Axes, events: Sequence[Event]) -> list[Label]:
    """The target above the health of the model, over the rounds. Returns the labels."""
    states, (target, sign), best = measurements(events), target_of(events), _marked(events)
    labels = _target_panel(top, states, target)
    ring = ""
    if best is not None:
        top.plot([best.round], np.array([best[target.name]], dtype=float), **RING)
        ring = "; ring: best round"
    top.set_title(f"{title(target)}, wanted {direction(sign)} (band: 95 %{ring})")
    top.set_ylabel(_axis(target))
    top.tick_params(labelbottom=False)
    _health_panel(bottom, states, health_of(metrics_of(events).values()))
    bottom.set_title("Health: what is lost (bar: 95 %)\nlimits: thin line good, thick line broken")
    last, length = max(m.round for m in states), _length(states)
    bottom.set_xlim(-1 - 0.06 * length, last + 0.08 * length)
    named = [f"{r}\nbest" if best and best.round == r else str(r) for r in range(last + 1)]
    bottom.set_xticks(range(-1, last + 1), ["before", *named])
    bottom.set_xlabel("round")
    return labels


def _marked(events: Sequence[Event]) -> Measurement | None:
    """The best round, where there is one to choose from."""
    n_healed = sum(m.stage == "healed" for m in measurements(events))
    best = best_round(events) if n_healed > 1 else None
    return best and best.state


def _length(states: Sequence[Measurement]) -> int:
    """Of the axis of rounds, from the states before the loop to the last round."""
    return max(m.round for m in states) + 1 or 1


def _series(states: Sequence[Measurement], metric: Metric) -> dict[str, np.ndarray]:
    """By stage, Float[n 4]: round, value, and the ends of the interval of the value (NaN where there is none)."""
    base = next(m for m in states if m.stage == "base")[metric.name]
    rows: dict[str, list[tuple[float, ...]]] = {}
    for m in states:
        if (value := m[metric.name]) is not None:
            ends = (m[f"{metric.name}_lo"], m[f"{metric.name}_hi"])
            interval = [np.nan if end is None or base is None else base + end for end in ends]
            x = m.round + PLACES.get(m.stage, 0.0) * _length(states)
            rows.setdefault(m.stage, []).append((x, value, *interval))
    return {stage: np.array(series) for stage, series in rows.items()}


def _target_panel(axes: Axes, states: Sequence[Measurement], target: Metric) -> list[Label]:
    labels = []
    for stage, series in _series(states, target).items():
        x, y, low, high = series.T
        style: dict[str, Any] = {"color": COLOURS[stage], "marker": MARKERS[stage]}
        if stage == "base":
            axes.axhline(y[0], color=COLOURS[stage], lw=1)
        axes.plot(x, y, lw=1.8, **style)
        axes.fill_between(x, low, high, color=COLOURS[stage], alpha=0.14, lw=0)
        if len(x) == 1:  # a band of one round has no width
            axes.vlines(x, low, high, color=COLOURS[stage], lw=1, alpha=0.5)
        labels.append(_label(axes, (x[-1], y[-1]), stage, COLOURS[stage]))
    axes.margins(y=0.15)
    return labels


def _lost(metric: Metric, value: Any) -> Any:
    """A health metric as the share that is lost, 0 to 1."""
    return np.clip(1 - value if is_high(metric) else value, 0, 1)


def _health_panel(axes: Axes, states: Sequence[Measurement], health: Sequence[Metric]) -> None:
    """Each health metric as the share that is lost, with its limits, on a square-root scale."""
    axes.set_yscale("function", functions=_SQUARE_ROOT)
    highest = 0.0
    for i, (metric, stroke) in enumerate(zip(health, itertools.cycle(STROKES), strict=False)):
        hollow: dict[str, Any] = {} if stroke == STROKES[0] else {"mfc": "white"}
        for stage, series in _series(states, metric).items():
            x, (y, low, high) = series[:, 0], _lost(metric, series[:, 1:]).T
            x = x + _length(states) * (DODGE * (i - (len(health) - 1) / 2) + STAGE_DODGE.get(stage, 0.0))
            style: dict[str, Any] = {"color": COLOURS[stage], "clip_on": False}
            axes.plot(x, y, stroke, marker=MARKERS[stage], lw=1.6, **style, **hollow)
            axes.vlines(x, low, high, lw=1, alpha=0.5, **style)
            highest = max(highest, np.nanmax([*y, *high]))
        good, broken = (float(_lost(metric, limit)) for limit in (metric.good, metric.broken))
        axes.axhline(good, color="#999999", lw=0.8, ls=stroke)
        axes.axhline(broken, color="#666666", lw=2.0, ls=stroke)
        highest = max(highest, good)
        name = f"lost {title(metric)}" if is_high(metric) else title(metric)
        axes.plot([], [], stroke, color="#444444", marker="o", **hollow, label=f"{name} ({good:.0%}, {broken:.0%})")
    _share_axis(axes, highest)
    if health:
        axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.26), ncols=2)


def _share_axis(axes: Axes, highest: float) -> None:
    """An axis of shares that ends at the first tick from `highest` on."""
    top = next(tick for tick in TICKS if tick >= min(1.0, max(0.25, highest)))
    axes.set_ylim(0, top)
    axes.set_yticks([tick for tick in TICKS if tick <= top], [f"{100 * tick:g} %" for tick in TICKS if tick <= top])
    axes.set_ylabel("share, square-root scale")


def second_metric(events: Sequence[Event]) -> Metric:
    """What the target is drawn against: the off-target that moved most in any healed (else any) state. Without
    off-targets, the first shown metric that says nothing of health; without such a one, the target itself."""
    states, metrics, (target, _) = measurements(events), metrics_of(events), target_of(events)
    base = next(m for m in states if m.stage == "base")
    healed = [m for m in states if m.stage == "healed"] or states
    off_targets = [m for name, m in metrics.items() if name in run_start(events)["trait"]["off_targets"]]
    moved = lambda metric: max(abs(shift(state, base, metric) or 0.0) for state in healed)
    others = [m for m in metrics.values() if m.shown and m.name != target.name and m not in health_of(metrics.values())]
    return max(off_targets, key=moved) if off_targets else next(iter(others), target)


def _plane(axes: Axes, events: Sequence[Event], intervals: bool = False) -> list[Label]:
    """Every state at its shifts from base, with its round in the marker; with `intervals`, a cross of the 95 percent
    intervals. Returns the labels, one a stage. Base is the origin and needs none."""
    states, (y_metric, sign), x_metric = measurements(events), target_of(events), second_metric(events)
    base = next(m for m in states if m.stage == "base")
    axes.axhline(0, color="#cccccc", lw=0.8, zorder=0)
    axes.axvline(0, color="#cccccc", lw=0.8, zorder=0)
    paths: dict[str, list[tuple[float, float]]] = {}
    for m in states:
        x, y = shift(m, base, x_metric), shift(m, base, y_metric)
        if x is None or y is None:
            continue
        paths.setdefault(m.stage, [(0.0, 0.0)]).append((x, y))
        if intervals:
            ends = [m[f"{metric.name}_{end}"] for metric in (x_metric, y_metric) for end in ("lo", "hi")]
            cross = np.array([[*ends[:2], None, x, x], [y, y, None, *ends[2:]]], dtype=float)
            axes.plot(*cross, color=COLOURS[m.stage], lw=1, alpha=0.6)
        order, size = 3 + states.index(m) / 100, 8 if m.round < 0 else 12  # later states cover earlier ones
        axes.plot(x, y, MARKERS[m.stage], color=COLOURS[m.stage], ms=size, mec="white", zorder=order)
        if m.round >= 0:
            where: dict[str, Any] = {"ha": "center", "va": "center_baseline", "zorder": order}
            axes.annotate(str(m.round), (x, y), color="white", fontsize=7, **where)
    for stage in [stage for stage in paths if stage in ("steered", "healed")]:
        axes.plot(*zip(*paths[stage], strict=True), color=COLOURS[stage], lw=1, alpha=0.5, zorder=1)
    if x_metric.unit == y_metric.unit:
        axes.set_aspect("equal", adjustable="datalim")
    axes.margins(0.2)
    axes.locator_params(nbins=7)
    axes.ticklabel_format(scilimits=(-3, 4))
    ring = ""
    if best := _marked(events):
        axes.plot(*np.array([[shift(best, base, metric)] for metric in (x_metric, y_metric)], dtype=float), **RING)
        ring = ", ring: best round"
    axes.set_title(f"Against {title(x_metric)}\nnumbers: rounds{ring}")
    axes.set_xlabel(f"{_axis(x_metric)} from base")
    axes.set_ylabel(f"{_axis(y_metric)} from base, wanted {direction(sign)}")
    return [_label(axes, path[-1], stage, COLOURS[stage]) for stage, path in paths.items() if stage != "base"]


def _axis(metric: Metric) -> str:
    return f"{metric.name}, {metric.unit}" if metric.unit else metric.name


def _label(axes: Axes, point: tuple[float, float], name: str, colour: str) -> Label:
    """A name at its point, until `_place_labels` moves it."""
    leader = {"arrowstyle": "-", "color": "#777777", "lw": 0.6, "shrinkA": 0, "shrinkB": 3}
    how: dict[str, Any] = {"ha": "center", "va": "center", "color": colour, "arrowprops": leader, "zorder": 9}
    text = axes.annotate(name, point, (0, 0), textcoords="offset points", **how)
    text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
    return axes, text


def _place_labels(figure: Figure, labels: Sequence[Label]) -> None:
    """Moves each label to the nearest place around its point where no line, label or edge is in the way. A thin line
    leads from a distant label to its point."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out: the labels lie inside the axes and must not move them
    pixels_a_point, angles = figure.dpi / 72, np.arange(16) * np.pi / 8
    distances = np.repeat(LABEL_POINTS, len(angles)) * pixels_a_point
    towards = np.tile(np.column_stack([np.cos(angles), np.sin(angles)]), (len(LABEL_POINTS), 1))
    taken: dict[Axes, np.ndarray] = {}
    for axes, label in labels:
        if axes not in taken:
            taken[axes] = _drawn_pixels(axes)
        point, box, frame = axes.transData.transform(label.xy), Text.get_window_extent(label), axes.get_window_extent()
        half = np.array([box.width, box.height]) / 2 + 1
        middles = point + towards * (distances[:, None] + half)
        inside = (np.abs(taken[axes] - middles[:, None]) < half).all(-1).sum(-1)
        outside = ((middles - half < frame.min) | (middles + half > frame.max)).any(-1)
        best = int(np.argmin(inside * 100 + outside * 1000 + distances))
        label.set_position(tuple((middles[best] - point) / pixels_a_point))
        assert label.arrow_patch is not None
        label.arrow_patch.set_visible(distances[best] >= LABEL_POINTS[2] * pixels_a_point)
        corners = np.mgrid[-1:1:9j, -1:1:3j].reshape(2, -1).T * half
        leader = np.linspace(point, middles[best], 2 + int(distances[best] / PIXELS_APART))
        taken[axes] = np.concatenate([taken[axes], middles[best] + corners, leader])


def _drawn_pixels(axes: Axes) -> np.ndarray:
    """Points (n, 2) along every line of the axes, a few pixels apart."""
    parts = [np.empty((0, 2))]
    for line in axes.get_lines():
        ends = line.get_transform().transform(np.column_stack(line.get_data()).astype(float))
        if (size := line.get_markersize() * axes.figure.dpi / 144) and line.get_marker() not in ("", "None", None):
            parts.append((ends[:, None] + size * np.array([(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)])).reshape(-1, 2))
        for start, end in itertools.pairwise(ends):
            if np.isfinite([start, end]).all():
                parts.append(np.linspace(start, end, 2 + int(np.abs(end - start).max() / PIXELS_APART)))
    return np.concatenate(parts)


def frontier(points: Sequence[Mapping[str, Any]]) -> Figure:
    """Broken texts against the trait, from rows {arm, round, shift, broken}: of each arm a point a round, the mean over
    its rows, with bars of one standard deviation."""
    figure = Figure(figsize=(8.5, 5.5), layout="constrained")
    axes = figure.add_subplot()
    for k, arm in enumerate(dict.fromkeys(row["arm"] for row in points)):
        ends = []
        for r in sorted({row["round"] for row in points if row["arm"] == arm}):
            mine = [row for row in points if (row["arm"], row["round"]) == (arm, r)]
            columns = [[row[name] for row in mine] for name in ("broken", "shift")]
            ends.append([f(column) for column in columns for f in (mean, pstdev)])
        x, x_sd, y, y_sd = zip(*ends, strict=True)
        style = {"color": f"C{k % 10}", "marker": "o^sD"[k // 10 % 4], "capsize": 2, "elinewidth": 0.7}
        axes.errorbar(x, y, xerr=x_sd, yerr=y_sd, label=printable(arm), linewidth=1, **style)
    axes.set_xlabel("share of broken texts")
    axes.set_ylabel("shift of the target from base, as it should go")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure
