"""Pictures of a run, drawn from its events alone: trajectory.png, map.png, and the figures of the page."""

from __future__ import annotations

import base64
import io
import itertools
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib
import numpy as np
from adjustText import adjust_text
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Text

from steer_heal.errors import printable
from steer_heal.events import HealStepped, Measured, Run, Trained
from steer_heal.records import Metric
from steer_heal.report.view import model_words, true_minus
from steer_heal.runs.storage import atomic_write
from steer_heal.verdict import best_round, direction, shift, title, verdict

COLOURS = {"base": "#6b6b6b", "prompted": "#3b6fb6", "control": "#b08900", "steered": "#c8452f", "healed": "#1f8a5b"}
MARKERS = {"base": "o", "prompted": "D", "control": "X", "steered": "s", "healed": "o"}
PLACES = {"base": -0.03, "prompted": 0.0, "control": 0.03}
"""Offsets of the states before the loop from -1 on the axis of rounds, as a share of its length."""
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
    "fit": "loss of the fit, nats per token",
    "divergence": "divergence, nats",
    "barrier": "barrier, nats of loss",
    "pressure": "gradient pressure",
}
CURVE_POINTS = 200
SETTING_CHARACTERS = 200
TICKS = (0, 0.01, 0.05, 0.1, 0.25, 0.5, 1)
"""Tick marks on the axis of health, as shares."""
RUN_COLOURS = ("#3b6fb6", "#c8452f", "#1f8a5b", "#b08900", "#7b52ab", "#6b6b6b")
DODGE = 0.01
"""Distance between the intervals of two metrics in one round, as a share of the axis."""
STATE_DODGE = {"steered": -0.0025, "healed": 0.0025}
"""The same for two states."""
PIXELS_APART = 6
"""Spacing of the points on lines that labels avoid."""
CIRCLE = np.column_stack([np.cos(np.arange(8) * np.pi / 4), np.sin(np.arange(8) * np.pi / 4)])
"""Points around a marker of radius 1."""
LEADER: dict[str, Any] = {"arrowstyle": "-", "color": "#777777", "lw": 0.6, "shrinkA": 0, "shrinkB": 3}
"""The line from a distant label to its point."""


def save(run: Run, folder: Path) -> None:
    """Draws trajectory.png and map.png into the folder of a run, once its base is measured."""
    if run.measured("base") is None:
        return
    for name, figure in (("trajectory.png", trajectory(run)), ("map.png", plane(run, headline=True))):
        with atomic_write(folder / name) as part:
            figure.savefig(part, format="png", dpi=130)


@matplotlib.rc_context(STYLE)
def trajectory(run: Run) -> Figure:
    """The trait's metric and the health of the model by round, beside the plane of the trait's and a second metric."""
    figure = Figure(figsize=(12.5, 7.4), layout="constrained")
    _headline(figure, run, 150)
    grid = figure.add_gridspec(2, 2, width_ratios=(1.6, 1))
    top = figure.add_subplot(grid[0, 0])
    right = figure.add_subplot(grid[:, 1])
    labels = _draw_rounds(top, figure.add_subplot(grid[1, 0], sharex=top), run) + _draw_plane(right, run)
    _place_labels(figure, labels)
    return figure


@matplotlib.rc_context(STYLE)
def rounds(run: Run) -> Figure:
    """The left half of the trajectory, narrow enough for a phone."""
    figure = Figure(figsize=(5.2, 6.4), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    _place_labels(figure, _draw_rounds(top, bottom, run))
    return figure


@matplotlib.rc_context(STYLE)
def plane(run: Run, headline: bool = False) -> Figure:
    """The plane of the trait's metric and a second one, with 95 percent intervals against base on both axes."""
    figure = Figure(figsize=(6.2, 7.2) if headline else (5.2, 6.4), layout="constrained")
    if headline:
        _headline(figure, run, 75)
    _place_labels(figure, _draw_plane(figure.subplots(), run, intervals=True))
    return figure


@matplotlib.rc_context(STYLE)
def comparison(runs: Mapping[str, Run]) -> Figure:
    """By name of the run, all with one target: its shift over the healed rounds, above the health of the model."""
    figure = Figure(figsize=(5.2, 6.4), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    top.axhline(0, color=COLOURS["base"], lw=1)
    _square_root_scale(bottom)
    labels: list[Text] = []
    strokes: dict[str, str] = {}
    for (name, run), colour in zip(runs.items(), itertools.cycle(RUN_COLOURS), strict=False):
        labels += _draw_shift(top, run, name, colour)
        for metric in filter(lambda metric: metric.is_share, run.metrics.values()):
            stroke = strokes.setdefault(_lost_words(metric), STROKES[len(strokes) % len(STROKES)])
            series = _series(run, metric).get("healed", np.empty((0, 4)))
            bottom.plot(series[:, 0] + 1, _lost(metric, series[:, 1]), stroke, color=colour, marker="o", lw=1.6)
    wanted = dict.fromkeys(
        f"{_axis(run.trait_metric)}, wanted {direction(run.start.trait.sign)}" for run in runs.values()
    )
    top.set_title("\n".join(["Shift from base, healed rounds (bar: 95 %)", *wanted]))
    bottom.set_title("Health: what is lost")
    _share_axis(bottom, max([0.0, *(y for line in bottom.get_lines() for y in np.asarray(line.get_ydata()))]))
    bottom.set_xlabel("round")
    bottom.xaxis.get_major_locator().set_params(integer=True)
    top.margins(0.1)
    for words, stroke in strokes.items():
        bottom.plot([], [], stroke, color="#444444", label=words)
    if strokes:
        bottom.legend(loc="upper center", bbox_to_anchor=(0.45, -0.26), ncols=2)
    _place_labels(figure, labels)
    return figure


def data_uri(figure: Figure) -> str:
    """The figure as an SVG inside of a page."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


# --- heals -------------------------------------------------------------------------------------------------------
@matplotlib.rc_context(STYLE)
def heal_curves(run: Run) -> dict[int | None, Figure]:
    """Small multiples of each heal by its round, the control's first. All heals have the same scales."""
    steps: dict[int | None, list[HealStepped]] = {}
    for step in run.steps:
        steps.setdefault(step.round, []).append(step)
    figures: dict[int | None, Figure] = {}
    for r in sorted(steps, key=lambda r: -1 if r is None else r):
        figures[r] = _heal_figure(run, steps[r], run.at(Trained, r))
    for panels in zip(*(figure.axes for figure in figures.values()), strict=True):
        limits = [axes.get_ylim() for axes in panels]
        for axes in panels:
            axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    return figures


def _heal_figure(run: Run, steps: Sequence[HealStepped], end: Trained | None) -> Figure:
    """One heal: its steps, its validation and its limits."""
    heal = run.start.config.heal
    figure = Figure(figsize=(5.2, 4.0), layout="constrained")
    limits = {"divergence": heal.tau if end is None else end.tau, "pressure": 1.0}
    drawn = [event.step for event in steps[:: len(steps) // CURVE_POINTS + 1]]
    for (name, heading), axes in zip(CURVES.items(), figure.subplots(2, 2, sharex=True).flat, strict=True):
        _curve(axes, [(step.epoch, getattr(step, name)) for step in drawn], color=COLOURS["prompted"], lw=1.0)
        validation = [] if end is None else [(row["epoch"], row.get(name)) for row in end.validation]
        _curve(axes, validation, color=COLOURS["healed"], lw=2.0, marker="o", ms=3)
        if name in limits:
            axes.axhline(limits[name], color=COLOURS["steered"], lw=1, ls="--")
        axes.set_title(heading, fontsize=9)
        axes.set_xlim(0, heal.epochs)
    figure.supxlabel("epoch", fontsize=9)
    return figure


def _curve(axes: Axes, points: Iterable[tuple[float, float | None]], **style: Any) -> None:
    """A line through the points that have a finite value."""
    known = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
    if known:
        axes.plot(*zip(*known, strict=True), **style)


# --- rounds ------------------------------------------------------------------------------------------------------
def _headline(figure: Figure, run: Run, width: int) -> None:
    """What was run, and the verdict."""
    config = run.start.config
    heal = config.heal
    barrier = f"{heal.divergence} {heal.aggregate}, lam {heal.lam:g}, tau {heal.tau:g}"
    setting = printable(
        f"{run.start.trait.name} into {model_words(run)}, seed {config.seed}: {heal.target} of the {heal.teacher}, "
        f"{'no barrier' if heal.divergence == 'none' else barrier}"
    )
    shown = setting if len(setting) <= SETTING_CHARACTERS else f"{setting[:SETTING_CHARACTERS]}..."
    lines = [line for text in (shown, true_minus(verdict(run))) for line in textwrap.wrap(text, width)]
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=10)


def _draw_rounds(top: Axes, bottom: Axes, run: Run) -> list[Text]:
    """The trait's metric above the health of the model, by round. Returns the labels."""
    best = _marked(run)
    metric = run.trait_metric
    labels = _draw_trait(top, run)
    ring = ""
    if best is not None:
        top.plot(np.array([best.round], dtype=float), [_finite(best[metric.name])], **RING)
        ring = "; ring: best round"
    top.set_title(f"{title(metric)}, wanted {direction(run.start.trait.sign)} (band: 95 %{ring})")
    top.set_ylabel(_axis(metric))
    top.tick_params(labelbottom=False)
    _draw_health(bottom, run)
    bottom.set_title("Health: what is lost (bar: 95 %)\nlimits: thin line good, thick line broken")
    last = _last_round(run)
    length = _length(run)
    bottom.set_xlim(-1 - 0.06 * length, last + 0.08 * length)
    named = [f"{r + 1}\nbest" if best is not None and best.round == r else str(r + 1) for r in range(last + 1)]
    bottom.set_xticks(range(-1, last + 1), ["before", *named])
    bottom.set_xlabel("round")
    return labels


def _marked(run: Run) -> Measured | None:
    """The best round, if several rounds are healed."""
    n_healed = sum(m.state == "healed" for m in run.each(Measured))
    best = best_round(run) if n_healed > 1 else None
    return None if best is None else best.state


def _last_round(run: Run) -> int:
    """The last round with a measured state; -1: there is none."""
    return max(-1 if m.round is None else m.round for m in run.each(Measured))


def _length(run: Run) -> int:
    """Length of the axis of rounds, from the states before the loop, at -1, to the last round."""
    return _last_round(run) + 1 or 1


def _finite(value: float | None) -> float:
    """The value; NaN if it is missing or infinite, so that it leaves a hole."""
    return value if value is not None and math.isfinite(value) else math.nan


def _series(run: Run, metric: Metric) -> dict[str, np.ndarray]:
    """By state, Float[n 4]: place on the axis, value, and the ends of the interval of the value (NaN: unknown)."""
    rows: dict[str, list[tuple[float, float, float, float]]] = {}
    states = run.each(Measured)
    base = next(_finite(m[metric.name]) for m in states if m.state == "base")
    for m in states:
        value = _finite(m[metric.name])
        if not math.isnan(value):
            x = (-1 if m.round is None else m.round) + PLACES.get(m.state, 0.0) * _length(run)
            low = base + _finite(m[f"{metric.name}_lo"])
            high = base + _finite(m[f"{metric.name}_hi"])
            rows.setdefault(m.state, []).append((x, value, low, high))
    return {state: np.array(series) for state, series in rows.items()}


def _draw_trait(axes: Axes, run: Run) -> list[Text]:
    """The trait's metric of every state. Returns the labels."""
    labels = []
    for state, series in _series(run, run.trait_metric).items():
        x, y, low, high = series.T
        colour = COLOURS[state]
        if state == "base":
            axes.axhline(y[0], color=colour, lw=1)
        axes.plot(x, y, lw=1.8, color=colour, marker=MARKERS[state])
        axes.fill_between(x, low, high, color=colour, alpha=0.14, lw=0)
        if len(x) == 1:  # a band of one round has no width
            axes.vlines(x, low, high, color=colour, lw=1, alpha=0.5)
        labels.append(_label(axes, (x[-1], y[-1]), state, colour))
    axes.margins(y=0.15)
    return labels


def _draw_shift(axes: Axes, run: Run, name: str, colour: str) -> list[Text]:
    """The shift of the trait's metric from base over the healed rounds of one run. Returns the label."""
    metric = run.trait_metric
    series = _series(run, metric)
    if "healed" not in series or "base" not in series:
        return []
    base = run.measured("base")
    assert base is not None
    x = series["healed"][:, 0] + 1  # people count rounds from 1
    _, low, high = (series["healed"][:, 1:] - series["base"][0, 1]).T
    healed = [m for m in run.each(Measured) if m.state == "healed" and math.isfinite(_finite(m[metric.name]))]
    y = [_finite(shift(m, base, metric)) for m in healed]
    axes.plot(x, y, color=colour, marker="o", lw=1.8)
    axes.vlines(x, low, high, color=colour, lw=1, alpha=0.5)
    return [_label(axes, (x[-1], y[-1]), name, colour)]


def _axis(metric: Metric) -> str:
    """A metric with its unit."""
    return f"{metric.name}, {metric.unit}" if metric.unit else metric.name


# --- health ------------------------------------------------------------------------------------------------------
def _lost(metric: Metric, value: Any) -> Any:
    """A health metric as the share that is lost, 0 to 1."""
    return np.clip(1 - value if metric.high_is_good else value, 0, 1)


def _lost_words(metric: Metric) -> str:
    return f"lost {title(metric)}" if metric.high_is_good else title(metric)


def _draw_health(axes: Axes, run: Run) -> None:
    """Each health metric that is a share as what is lost of it, with its limits."""
    _square_root_scale(axes)
    health = [metric for metric in run.metrics.values() if metric.is_share]
    highest = 0.0
    for i, (metric, stroke) in enumerate(zip(health, itertools.cycle(STROKES), strict=False)):
        hollow: dict[str, Any] = {} if stroke == STROKES[0] else {"mfc": "white"}
        for state, series in _series(run, metric).items():
            dodge = DODGE * (i - (len(health) - 1) / 2) + STATE_DODGE.get(state, 0.0)
            x = series[:, 0] + _length(run) * dodge
            y, low, high = _lost(metric, series[:, 1:]).T
            style: dict[str, Any] = {"color": COLOURS[state], "clip_on": False}
            axes.plot(x, y, stroke, marker=MARKERS[state], lw=1.6, **style, **hollow)
            axes.vlines(x, low, high, lw=1, alpha=0.5, **style)
            highest = max(highest, np.nanmax([*y, *low, *high]))
        good = float(_lost(metric, metric.good))
        broken = float(_lost(metric, metric.broken))
        axes.axhline(good, color="#999999", lw=0.8, ls=stroke)
        axes.axhline(broken, color="#666666", lw=2.0, ls=stroke)
        highest = max(highest, good)
        name = f"{_lost_words(metric)} ({good:.0%}, {broken:.0%})"
        axes.plot([], [], stroke, color="#444444", marker="o", **hollow, label=name)
    _share_axis(axes, highest)
    if health:
        axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.26), ncols=2)


def _square_root_scale(axes: Axes) -> None:
    """Small shares are as easy to read as large ones."""
    axes.set_yscale("function", functions=(lambda share: np.sqrt(np.maximum(share, 0)), np.square))


def _share_axis(axes: Axes, highest: float) -> None:
    """An axis of shares that ends at the first tick from `highest` on."""
    top = next(tick for tick in TICKS if tick >= min(1.0, max(0.25, highest)))
    axes.set_ylim(0, top)
    axes.set_yticks([tick for tick in TICKS if tick <= top], [f"{100 * tick:g} %" for tick in TICKS if tick <= top])
    axes.set_ylabel("share, square-root scale")


# --- the plane ---------------------------------------------------------------------------------------------------
def second_metric(run: Run) -> Metric:
    """What the trait's metric is drawn against: the off-target that moved most in any healed (else any) state. Without
    off-targets, the first shown metric that is not about health; without one, the trait's metric itself."""
    states = run.each(Measured)
    base = next(m for m in states if m.state == "base")
    healed = [m for m in states if m.state == "healed"] or states

    def moved(metric: Metric) -> float:
        return max(abs(shift(state, base, metric) or 0.0) for state in healed)

    off_targets = [metric for name, metric in run.metrics.items() if name in run.start.trait.off_targets]
    if off_targets:
        return max(off_targets, key=moved)
    others = [m for m in run.metrics.values() if m.shown and not m.is_health and m.name != run.trait_metric.name]
    return next(iter(others), run.trait_metric)


def _draw_plane(axes: Axes, run: Run, intervals: bool = False) -> list[Text]:
    """Every state at its shifts from base, with its round in the marker; with `intervals`, a cross of the 95 percent
    intervals. Returns the labels, one for each state. Base is the origin and needs none."""
    x_metric = second_metric(run)
    y_metric = run.trait_metric
    axes.axhline(0, color="#cccccc", lw=0.8, zorder=0)
    axes.axvline(0, color="#cccccc", lw=0.8, zorder=0)
    paths: dict[str, list[tuple[float, float]]] = {}
    for i, m in enumerate(run.each(Measured)):
        x, y = _shifts(run, m, (x_metric, y_metric))
        if math.isnan(x) or math.isnan(y):
            continue
        paths.setdefault(m.state, [(0.0, 0.0)]).append((x, y))
        if intervals:
            ends = [_finite(m[f"{metric.name}_{end}"]) for metric in (x_metric, y_metric) for end in ("lo", "hi")]
            axes.plot([*ends[:2], np.nan, x, x], [y, y, np.nan, *ends[2:]], color=COLOURS[m.state], lw=1, alpha=0.6)
        order = 3 + i / 100  # later states cover earlier ones
        size = 8 if m.round is None else 12
        axes.plot(x, y, MARKERS[m.state], color=COLOURS[m.state], ms=size, mec="white", zorder=order)
        if m.round is not None:
            where: dict[str, Any] = {"ha": "center", "va": "center_baseline", "zorder": order}
            axes.annotate(str(m.round + 1), (x, y), color="white", fontsize=7, **where)
    for state in [state for state in paths if state in ("steered", "healed")]:
        axes.plot(*zip(*paths[state], strict=True), color=COLOURS[state], lw=1, alpha=0.5, zorder=1)
    if x_metric.unit == y_metric.unit:
        axes.set_aspect("equal", adjustable="datalim")
    axes.margins(0.2)
    axes.locator_params(nbins=7)
    axes.ticklabel_format(scilimits=(-3, 4))
    ring = ""
    if (best := _marked(run)) is not None:
        x, y = _shifts(run, best, (x_metric, y_metric))
        axes.plot([x], [y], **RING)
        ring = ", ring: best round"
    axes.set_title(f"Against {title(x_metric)}\nnumbers: rounds{ring}")
    axes.set_xlabel(f"{_axis(x_metric)} from base")
    axes.set_ylabel(f"{_axis(y_metric)} from base, wanted {direction(run.start.trait.sign)}")
    return [_label(axes, path[-1], state, COLOURS[state]) for state, path in paths.items() if state != "base"]


def _shifts(run: Run, m: Measured, metrics: Iterable[Metric]) -> list[float]:
    """The shift of each metric from base. NaN: it has no value."""
    base = run.measured("base")
    assert base is not None
    return [_finite(shift(m, base, metric)) for metric in metrics]


# --- labels ------------------------------------------------------------------------------------------------------
def _label(axes: Axes, point: tuple[float, float], name: str, colour: str) -> Text:
    """A name at its point, until `_place_labels` moves it."""
    text = axes.text(*point, name, ha="center", va="center", color=colour, zorder=9)
    text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
    return text


def _place_labels(figure: Figure, labels: Sequence[Text]) -> None:
    """Moves each label to where no line, label or edge is in its way."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out: the labels lie inside the axes and must not move them
    for axes in figure.axes:
        texts = [label for label in labels if label.axes is axes]
        if texts:
            x, y = axes.transData.inverted().transform(_drawn_pixels(axes)).T
            adjust_text(texts, x, y, ax=axes, iter_lim=100, min_arrow_len=12, arrowprops=LEADER)


def _drawn_pixels(axes: Axes) -> np.ndarray:
    """Points (n, 2) along every line of the axes, a few pixels apart."""
    parts = [np.empty((0, 2))]
    for line in axes.get_lines():
        ends = line.get_transform().transform(np.column_stack(line.get_data()).astype(float))
        radius = 0.0 if line.get_marker() in ("", "None", None) else line.get_markersize() * axes.figure.dpi / 144
        parts += [ends, *(ends + radius * side for side in CIRCLE)]
        for start, end in itertools.pairwise(ends):
            if np.isfinite([start, end]).all():
                parts.append(np.linspace(start, end, 2 + int(np.abs(end - start).max() / PIXELS_APART)))
    points = np.concatenate(parts)
    return points[np.isfinite(points).all(-1)]


COSTS = {
    "broken": "share of broken texts",
    "kl_base": "KL to base, nats",
    "panel": "RMS shift of other traits, nats per token",
}
"""What a trait may cost, and how an axis names it."""


def _spread(column: Sequence[float]) -> float:
    """The standard deviation of a sample, as the tables have it. One value has none."""
    return stdev(column) if len(column) > 1 else 0.0


SPREAD = (mean, _spread)


def _lines(rows: Sequence[Mapping[str, Any]]) -> list[list[list[Mapping[str, Any]]]]:
    """The lines of an arm, each a list of points, each a list of rows: its rounds, then the scales of the adapter after
    the last round. No line crosses scale 0, the untouched model."""
    at: dict[tuple[int, float], list[Mapping[str, Any]]] = {}
    for row in rows:
        at.setdefault((row["round"], row.get("scale", 1.0)), []).append(row)
    last = max(r for r, _ in at)
    rounds = [at[point] for point in sorted(at) if point[1] == 1]
    scales = [scale for r, scale in sorted(at) if r == last]
    sides = [[s for s in scales if s >= 0], [s for s in scales if s < 0]]
    return [rounds, *([at[last, scale] for scale in side] for side in sides if side and len(scales) > 1)]


@matplotlib.rc_context(STYLE)
def frontier(points: Sequence[Mapping[str, Any]], null: float = 0.0) -> Figure | None:
    """The trait against each of COSTS that every row has, from rows {arm, round, shift, <cost> ...}, of which some have
    a scale. None: there is no such cost.

    Each arm has a line of its rounds and a dashed one of the scales of its adapter. A point is the mean over its rows,
    with bars of one standard deviation. The grey band is what teachers do that have nothing to do with the trait:
    `null` at 0.1 nats, in proportion to the root of KL.
    """
    costs = [cost for cost in COSTS if all(row.get(cost) is not None for row in points)]
    if not costs:
        return None
    figure = Figure(figsize=(0.6 + 3.1 * len(costs), 4.2), layout="constrained")
    for axes, cost in zip(figure.subplots(1, len(costs), sharey=True, squeeze=False)[0], costs, strict=True):
        for k, arm in enumerate(dict.fromkeys(row["arm"] for row in points)):
            n_colours = len(RUN_COLOURS)
            style = {"color": RUN_COLOURS[k % n_colours], "marker": "o^sDvX"[k // n_colours % 6], "elinewidth": 0.7}
            label = printable(arm) if cost == costs[0] else None
            for i, line in enumerate(_lines([row for row in points if row["arm"] == arm])):
                ends = [f([row[name] for row in rows]) for rows in line for name in (cost, "shift") for f in SPREAD]
                x, x_sd, y, y_sd = np.reshape(ends, (-1, 4)).T
                dashes = "-" if i == 0 else "--"
                axes.errorbar(x, y, xerr=x_sd, yerr=y_sd, label=label if i == 0 else None, lw=1.6, ls=dashes, **style)
        axes.set_xlim(0, 1.08 * axes.get_xlim()[1])
        axes.axhline(0, color=COLOURS["base"], lw=1)
        if cost == "kl_base" and null:
            kl = np.linspace(0, axes.get_xlim()[1])
            band = null * np.sqrt(kl / 0.1)
            style = {"color": COLOURS["base"], "alpha": 0.14, "lw": 0, "zorder": 0}
            axes.fill_between(kl, -band, band, label="unrelated teachers", **style)
        axes.set_xlabel(COSTS[cost])
    figure.axes[0].set_ylabel("shift of the trait, wanted direction")
    figure.legend(loc="outside lower center", ncols=4, fontsize=9)
    return figure
