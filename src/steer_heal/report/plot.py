"""Pictures of a run, drawn from its events alone: trajectory.png, map.png, and the figures of the page."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from adjustText import adjust_text
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.text import Text

from steer_heal.errors import printable
from steer_heal.records import Metric
from steer_heal.report.measurements import (
    MEASURED, Measurement, direction, health_of, is_high, measurements, metrics_of, run_start, shift, target_of,
    verdict,
)
from steer_heal.runs.events import heal_steps, of_stage, read_events
from steer_heal.runs.storage import atomic_write

Event = Mapping[str, Any]
COLOURS = {"base": "#6b6b6b", "prompted": "#3b6fb6", "control": "#b08900", "steered": "#c8452f", "healed": "#1f8a5b"}
MARKERS = {"base": "o", "prompted": "D", "control": "s", "steered": "^", "healed": "o"}
PLACES = {"base": -1.12, "prompted": -1.0, "control": -0.88}
"""Where the states before the loop stand on the axis of rounds."""
STROKES = ("-", "--", ":", "-.")
STYLE = {
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11,
    "axes.titlelocation": "left", "legend.frameon": False, "legend.fontsize": 9, "svg.hashsalt": "steer-heal",
}
CURVES = {
    "ce": "cross-entropy, nats a token", "divergence": "divergence to the reference, nats",
    "barrier": "barrier, nats of loss", "pressure": "gradient pressure of the barrier",
}
CURVE_POINTS = 200
SETTING_CHARACTERS = 200
LEAST_SHARE = 1e-4
PIXELS_APART = 4


def plot(folder: Path) -> Path | None:
    """Draws trajectory.png and map.png from the events alone; None where base was not measured yet."""
    events = read_events(folder)
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
    figure.suptitle(f"{_setting(events)}\n{verdict(events)}", x=0.01, ha="left", fontsize=11, parse_math=False)
    left, right = figure.subfigures(1, 2, width_ratios=(1.15, 1))
    axes = right.subplots()
    _write_labels(figure, {**_rounds(left, events), axes: _plane(axes, events)})
    return figure


@matplotlib.rc_context(STYLE)
def rounds(events: Sequence[Event]) -> Figure:
    """The left half of the trajectory, narrow enough to be read on a phone."""
    figure = Figure(figsize=(5.2, 6.4), layout="constrained")
    _write_labels(figure, _rounds(figure, events, wrap=46))
    return figure


@matplotlib.rc_context(STYLE)
def map_(events: Sequence[Event], headline: bool = True) -> Figure:
    """The plane of the target and a second metric, with 95 percent intervals against base on both axes."""
    figure = Figure(figsize=(6.2, 6.9) if headline else (5.2, 6.4), layout="constrained")
    if headline:
        lines = [line for text in (_setting(events), verdict(events)) for line in textwrap.wrap(text, 84)]
        figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=9.5, parse_math=False)
    axes = figure.subplots()
    _write_labels(figure, {axes: _plane(axes, events, intervals=True)})
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
        for (name, title), axes in zip(CURVES.items(), figure.subplots(2, 2, sharex=True).flat, strict=True):
            _curve(axes, name, mine[:: len(mine) // CURVE_POINTS + 1], color=COLOURS["prompted"], lw=1.0)
            _curve(axes, name, end.get("validation", ()), color=COLOURS["healed"], lw=2.0, marker="o", ms=3)
            if name in limits:
                axes.axhline(limits[name], color=COLOURS["steered"], lw=1, ls="--")
            axes.set_title(title, fontsize=9)
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


def _setting(events: Sequence[Event]) -> str:
    """What was run, in one line."""
    start = run_start(events)
    heal = start["config"]["heal"]
    line = printable(
        f"{start['trait']['name']} into {start['config']['model']}, seed {start['seed']}: {heal['divergence']} "
        f"{heal['aggregate']}, lam {heal['lam']:g}, tau {heal['tau']:g}"
    )
    return line if len(line) <= SETTING_CHARACTERS else f"{line[:SETTING_CHARACTERS]}..."


def _rounds(figure: FigureBase, events: Sequence[Event], wrap: int = 80) -> dict[Axes, list[Text]]:
    """The target above the health of the model, over the rounds. Returns the labels of each panel."""
    states, (target, sign) = measurements(events), target_of(events)
    health = health_of(metrics_of(events).values())
    panels = figure.subplots(1 + bool(health), 1, sharex=True, squeeze=False)[:, 0]
    title = f"{target.title or target.name}, wanted {direction(sign)} (bands: 95 % against base)"
    panels[0].set_title(textwrap.fill(title, wrap))
    panels[0].set_ylabel(f"{target.name}, {target.unit}")
    labels = {panels[0]: _target_panel(panels[0], states, target)}
    if health:
        panels[1].set_title(textwrap.fill("What is lost (bars: 95 % against base)", wrap))
        labels[panels[1]] = _health_panel(panels[1], states, health)
    last = max(m.round for m in states)
    panels[-1].set_xlim(-1.3, last + 0.3)
    panels[-1].set_xticks(range(-1, last + 1), ["before", *map(str, range(last + 1))])
    panels[-1].set_xlabel("round")
    return labels


def _series(states: Sequence[Measurement], metric: Metric) -> dict[str, np.ndarray]:
    """By stage, Float[n 4]: round, value, and the ends of the interval (of the value; NaN where it was not measured)."""
    base = next(m for m in states if m.stage == "base")[metric.name]
    rows: dict[str, list[tuple[float, ...]]] = {}
    for m in states:
        if (value := m[metric.name]) is not None:
            ends = [(m[f"{metric.name}_{end}"], base) for end in ("lo", "hi")]
            interval = [np.nan if None in end else sum(end) for end in ends]
            rows.setdefault(m.stage, []).append((PLACES.get(m.stage, m.round), value, *interval))
    return {stage: np.array(series) for stage, series in rows.items()}


def _target_panel(axes: Axes, states: Sequence[Measurement], target: Metric) -> list[Text]:
    labels = []
    for stage, series in _series(states, target).items():
        x, y, low, high = series.T
        style = {"color": COLOURS[stage], "marker": MARKERS[stage]}
        if stage == "base":
            axes.axhline(y[0], color=COLOURS[stage], lw=1)
        axes.plot(x, y, lw=1.8, **style)
        axes.fill_between(x, low, high, color=COLOURS[stage], alpha=0.14, lw=0)
        labels.append(axes.text(x[-1], y[-1], stage, color=COLOURS[stage]))
    axes.margins(y=0.15)
    return labels


def _health_panel(axes: Axes, states: Sequence[Measurement], health: Sequence[Metric]) -> list[Text]:
    """Each health metric as the share that is lost, and the limit of a whole model, on a log scale."""
    labels = []
    for stroke, metric in zip(itertools.cycle(STROKES), health):
        share = lambda value, high=is_high(metric): np.clip(1 - value if high else value, LEAST_SHARE, 1)
        name = f"lost {metric.title or metric.name}" if is_high(metric) else metric.title or metric.name
        filled = {} if stroke == STROKES[0] else {"mfc": "white"}
        for stage, series in _series(states, metric).items():
            x, y, low, high = series[:, :1].T[0], *share(series[:, 1:]).T
            axes.plot(x, y, stroke, color=COLOURS[stage], marker=MARKERS[stage], lw=1.6, **filled)
            axes.vlines(x, low, high, color=COLOURS[stage], lw=1)
            if stage in ("steered", "healed"):
                labels.append(axes.text(x[-1], y[-1], stage, color=COLOURS[stage]))
        limit = share(metric.good)
        axes.axhline(limit, color="#999999", lw=0.8, ls=stroke)
        axes.plot([], [], stroke, color="#444444", marker="o", **filled, label=f"{name} (good: up to {limit:.0%})")
    axes.set_yscale("log")
    axes.yaxis.set_minor_formatter("")
    axes.set_ylim(LEAST_SHARE / 1.6, 1.6)
    axes.set_ylabel(f"share, log scale ({LEAST_SHARE:g}: none seen)")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    return labels


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


def _plane(axes: Axes, events: Sequence[Event], intervals: bool = False) -> list[Text]:
    """Every state at its shifts from base; with `intervals`, a thin cross of their 95 percent intervals."""
    states, (y_metric, sign), x_metric = measurements(events), target_of(events), second_metric(events)
    base = next(m for m in states if m.stage == "base")
    axes.axhline(0, color="#cccccc", lw=0.8, zorder=0)
    axes.axvline(0, color="#cccccc", lw=0.8, zorder=0)
    paths: dict[str, list[tuple[float, float]]] = {"steered": [(0.0, 0.0)], "healed": [(0.0, 0.0)]}
    labels = []
    for m in states:
        x, y = shift(m, base, x_metric), shift(m, base, y_metric)
        if x is None or y is None:
            continue
        colour = COLOURS[m.stage]
        axes.plot(x, y, MARKERS[m.stage], color=colour, ms=7)
        paths.setdefault(m.stage, []).append((x, y))
        labels.append(axes.text(x, y, m.stage if m.round < 0 else f"{m.stage} {m.round}", color=colour))
        x_ends, y_ends = ([m[f"{metric.name}_{end}"] for end in ("lo", "hi")] for metric in (x_metric, y_metric))
        if intervals and None not in (*x_ends, *y_ends):
            axes.plot([*x_ends, np.nan, x, x], [y, y, np.nan, *y_ends], color=colour, lw=1, alpha=0.6)
    for stage, path in paths.items():
        axes.plot(*zip(*path, strict=True), color=COLOURS[stage], lw=1, alpha=0.5)
    if x_metric.unit == y_metric.unit:
        axes.set_aspect("equal", adjustable="datalim")
    axes.margins(0.15)
    title = f"The trait against {x_metric.title or x_metric.name}"
    axes.set_title(textwrap.fill(title, 50))
    axes.set_xlabel(f"{x_metric.name}: {x_metric.unit} from base")
    axes.set_ylabel(f"{y_metric.name}: {y_metric.unit} from base, wanted {direction(sign)}")
    return labels


def _write_labels(figure: Figure, labels: Mapping[Axes, list[Text]]) -> None:
    """Moves labels apart and off the lines; a thin line leads from a moved label to its point."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out: the labels lie inside the axes and must not move them
    leader = {"arrowstyle": "-", "color": "#777777", "lw": 0.6, "shrinkB": 3}
    for axes, mine in labels.items():
        x, y = axes.transData.inverted().transform(_drawn_pixels(axes)).T
        adjust_text(mine, x, y, ax=axes, iter_lim=500, arrowprops=leader)


def _drawn_pixels(axes: Axes) -> np.ndarray:
    """Points (n, 2) along every line of the axes, a few pixels apart."""
    parts = [np.empty((0, 2))]
    for line in axes.get_lines():
        ends = line.get_transform().transform(np.column_stack(line.get_data()).astype(float))
        for start, end in itertools.pairwise(ends[np.isfinite(ends).all(1)]):
            n = 2 + int(np.abs(end - start).max() / PIXELS_APART)
            parts.append(np.linspace(start, end, n))
    return np.concatenate(parts)
