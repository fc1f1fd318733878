"""events.jsonl -> trajectory.png and map.png.

    python -m steer_heal.plot out/<run>
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from steer_heal.events import heal_steps, of_stage, read_events, redraw  # noqa: E402
from steer_heal.readings import Reading, moved_most, nats_name, readings, shift, target_of, verdict  # noqa: E402
from steer_heal.terminal import printable  # noqa: E402

Event = Mapping[str, Any]
COLOURS = {"base": "#6b6b6b", "prompted": "#3b6fb6", "control": "#b08900", "steered": "#c8452f", "healed": "#1f8a5b"}
MARKERS = {"base": "o", "prompted": "D", "control": "s", "steered": "^", "healed": "o"}
STYLE = {
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11, "axes.titlelocation": "left",
    "svg.hashsalt": "steer-heal",
}
CURVES = {
    "sft": "cross-entropy, nats a token", "divergence": "divergence to the reference, nats", "barrier": "barrier, nats of loss",
    "pressure": "gradient pressure of the barrier",
}
CURVE_POINTS = 200
SETTING_CHARACTERS = 200
INCOHERENCE_FLOOR = 1e-4
BASE_X = -1.0


def plot(folder: Path) -> Path | None:
    """Draws trajectory.png and map.png from the events alone; None where base was not measured yet."""
    events = read_events(folder)
    if not measured(events):
        return None
    path = _save(trajectory(events), folder / "trajectory.png")
    _save(map_(events), folder / "map.png")
    return path


def measured(events: Sequence[Event]) -> bool:
    """Whether there is a base to draw the other states against."""
    return bool(of_stage(events, "base"))


def _save(figure: Figure, path: Path) -> Path:
    beside = path.with_name(f".{path.stem}.tmp{path.suffix}")
    figure.savefig(beside, dpi=130)
    plt.close(figure)
    beside.replace(path)
    return path


@plt.rc_context(STYLE)
def trajectory(events: Sequence[Event]) -> Figure:
    """The trait and the incoherence over the rounds, beside the plane of target and the foundation that moved most."""
    reads = readings(events)
    target, sign = target_of(events)
    figure = plt.figure(figsize=(12.5, 7), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=[1.15, 1])
    trait = figure.add_subplot(grid[0, 0])
    incoherence = figure.add_subplot(grid[1, 0], sharex=trait)
    plane = figure.add_subplot(grid[:, 1])
    labels = {
        trait: _trait(trait, reads, target, sign),
        incoherence: _incoherence(incoherence, reads),
        plane: _plane(plane, reads, target, moved_most(reads, target)),
    }
    figure.suptitle(f"{_setting(events)}\n{verdict(events)}", x=0.01, ha="left", fontsize=11, parse_math=False)
    _write_labels(figure, labels)
    return figure


@plt.rc_context(STYLE)
def rounds(events: Sequence[Event]) -> Figure:
    """The left half of the trajectory, narrow enough to be read on a phone."""
    reads = readings(events)
    figure, (trait, incoherence) = plt.subplots(2, 1, figsize=(5.2, 6.2), sharex=True, layout="constrained")
    labels = {trait: _trait(trait, reads, *target_of(events)), incoherence: _incoherence(incoherence, reads, brief=True)}
    for axes in labels:
        axes.set_title(textwrap.fill(axes.get_title("left"), 46))
    _write_labels(figure, labels)
    return figure


@plt.rc_context(STYLE)
def map_(events: Sequence[Event], headline: bool = True) -> Figure:
    """The plane of the target and the foundation that moved most, with 95 percent intervals against base on both axes."""
    reads = readings(events)
    target, sign = target_of(events)
    other = moved_most(reads, target)
    figure, axes = plt.subplots(figsize=(6.2, 6.9) if headline else (5.2, 6.2), layout="constrained")
    labels = [replace(label, side=-1 if label.colour == COLOURS["healed"] else 1) for label in _plane(axes, reads, target, other)]
    _intervals(axes, reads, nats_name(other), nats_name(target))
    axes.set_title(textwrap.fill(f"The trait against the foundation that moved most besides it: {other}", 50))
    axes.set_ylabel(f"{target}: nats from base, wanted {'down' if sign < 0 else 'up'}")
    if headline:
        lines = textwrap.wrap(_setting(events), 84) + textwrap.wrap(verdict(events), 84)
        figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=9.5, parse_math=False)
    _write_labels(figure, {axes: labels}, leaders=True)
    return figure


def heal_curves(events: Sequence[Event]) -> Iterator[dict[str, Any]]:
    """Small multiples of each round's heal: (epoch, value) of the training steps and of the held-out prompts, scaled alike in all rounds."""
    steps, ends = heal_steps(events), {e["round"]: e for e in of_stage(events, "heal")}
    config = next(iter(of_stage(events, "run_start")))["config"]["heal"]
    checks = [row for end in ends.values() for row in end["validation"]]
    top = {name: max((row[name] for row in [*steps, *checks] if row.get(name) is not None), default=0.0) for name in CURVES}
    for r in sorted({e["round"] for e in steps}):
        end, mine = ends.get(r, {}), [e for e in steps if e["round"] == r]
        limits = {"divergence": end.get("tau", config["tau"]), "pressure": 1.0}
        points = lambda name, rows: [(row["epoch"], row[name]) for row in rows if row.get(name) is not None]
        yield {"round": r, "n_steps": len(mine), "epochs": config["epochs"], "end": end, "panels": [
            {"title": title, "limit": limits.get(name), "top": 1.08 * max(top[name], 1.1 * (limits.get(name) or 0.0)) or 1.0,
             "steps": points(name, mine[:: len(mine) // CURVE_POINTS + 1]), "checks": points(name, end.get("validation", ()))}
            for name, title in CURVES.items()
        ]}


def _setting(events: Sequence[Event]) -> str:
    """What was run, in one line."""
    start = next(iter(of_stage(events, "run_start")))
    config, heal = start["config"], start["config"]["heal"]
    line = printable(
        f"{start['trait']['name']} into {config['model']}, seed {start['seed']}: {heal['divergence']} {heal['aggregate']}, lam {heal['lam']:g}, "
        f"tau {heal['tau']:g}"
    )
    return line if len(line) <= SETTING_CHARACTERS else f"{line[:SETTING_CHARACTERS]}..."


def _series(reads: Sequence[Reading], stage: str, metric: str) -> list[tuple[float, Reading]]:
    return [(float(r.round), r) for r in reads if r.stage == stage and r[metric] is not None]


@dataclass
class Label:
    """Text that belongs to the point x, y."""

    x: float
    y: float
    text: str
    colour: str
    side: int = 1
    """1: right of the point; -1: left of it."""


LABEL_HEIGHT_POINTS, LABEL_WIDTH_POINTS = 12.0, 70.0


def _write_labels(figure: Figure, labels: Mapping[Axes, Sequence[Label]], leaders: bool = False) -> None:
    """Each label beside its point, pushed up or down until none covers another on its side of the axes; with
    `leaders`, a thin line leads from a pushed label to its point."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out: the labels lie inside the axes and must not move them
    for axes, mine in labels.items():
        for side in (1, -1):
            _write_side(figure, axes, [label for label in mine if label.side == side], leaders)


def _write_side(figure: Figure, axes: Axes, labels: Sequence[Label], leaders: bool) -> None:
    pixels = axes.transData.transform([(label.x, label.y) for label in labels] or [(0.0, 1.0)])
    points = sorted(zip(pixels * 72 / figure.dpi, labels), key=lambda pair: pair[0][1])
    heights = [y for (_, y), _ in points]
    for _ in range(300):
        for i in range(len(points)):
            for j in range(i + 1, len(points)):
                overlap = LABEL_HEIGHT_POINTS - (heights[j] - heights[i])
                if overlap > 0 and abs(points[i][0][0] - points[j][0][0]) < LABEL_WIDTH_POINTS:
                    heights[i], heights[j] = heights[i] - overlap / 2, heights[j] + overlap / 2
    for ((_, y), label), height in zip(points, heights, strict=True):
        leader = {"arrowstyle": "-", "color": label.colour, "lw": 0.6, "alpha": 0.6, "shrinkA": 0, "shrinkB": 3}
        axes.annotate(
            label.text, (label.x, label.y), xytext=((22 if leaders else 9) * label.side, height - y), textcoords="offset points", color=label.colour,
            va="center", ha="left" if label.side > 0 else "right", fontsize=9.5, arrowprops=leader if leaders else None,
        )


def _trait(axes: Axes, reads: Sequence[Reading], target: str, sign: int) -> list[Label]:
    metric = nats_name(target)
    base = next(r for r in reads if r.stage == "base")
    labels: list[Label] = []
    if base[metric] is not None:
        axes.axhline(base[metric], color=COLOURS["base"], lw=1)
    for stage in ("base", "prompted", "control"):
        for x, r in _series(reads, stage, metric):
            axes.plot(x, r[metric], MARKERS[stage], color=COLOURS[stage])
            labels.append(Label(x, r[metric], stage, COLOURS[stage]))
    for stage in ("steered", "healed"):
        points = _series(reads, stage, metric)
        if not points:
            continue
        x, y = [p[0] for p in points], [p[1][metric] for p in points]
        axes.plot(x, y, "-" + MARKERS[stage], color=COLOURS[stage], lw=1.8)
        if base[metric] is not None:
            low, high = ([base[metric] + (r[f"{metric}_{side}"] or 0.0) for _, r in points] for side in ("lo", "hi"))
            axes.fill_between(x, low, high, color=COLOURS[stage], alpha=0.14, lw=0)
        labels.append(Label(x[-1], y[-1], stage, COLOURS[stage]))
    axes.set_title(f"The trait: log mean p({target}), wanted {'down' if sign < 0 else 'up'} (band: 95% against base)")
    axes.set_ylabel("nats")
    axes.tick_params(labelbottom=False)
    axes.margins(y=0.12)
    return labels


def _incoherence(axes: Axes, reads: Sequence[Reading], brief: bool = False) -> list[Label]:
    text, text_name = "degenerate_frac", "broken texts"
    lines = {
        ("coherence", "-"): lambda r: 1 - r["coherence"],
        (text, "--"): lambda r: r[text],
    }
    names = {text: "text" if brief else text_name, "coherence": "slot" if brief else "answer slot"}
    labels: list[Label] = []
    for (metric, style), value in lines.items():
        for stage in ("base", "prompted", "control", "steered", "healed"):
            points = _series(reads, stage, metric)
            if not points:
                continue
            x, y = [p[0] for p in points], [max(INCOHERENCE_FLOOR, value(r)) for _, r in points]
            filled = COLOURS[stage] if metric == "coherence" else "white"
            axes.plot(x, y, style, marker=MARKERS[stage], color=COLOURS[stage], mfc=filled, lw=1.6)
            if stage in ("steered", "healed"):
                labels.append(Label(x[-1], y[-1], f"{stage}: {names[metric]}", COLOURS[stage]))
    axes.set_yscale("log")
    axes.yaxis.set_minor_formatter("")
    axes.set_ylim(INCOHERENCE_FLOOR / 1.6, 1.6)
    axes.axhline(0.05, color="#999999", lw=0.8, ls=":")
    axes.annotate("0.05", (0, 0.05), xycoords=("axes fraction", "data"), xytext=(3, 3), textcoords="offset points", fontsize=8, color="#777777")
    axes.set_title(f"Incoherence: lost answer mass (solid), {text_name} (dashed)")
    axes.set_ylabel(f"share, log scale ({INCOHERENCE_FLOOR:g}: none seen)")
    last = max(r.round for r in reads)
    axes.set_xlim(BASE_X - 0.25, last + 0.25 + 0.45 * (last + 1.5))
    axes.set_xticks(range(-1, last + 1), ["before", *map(str, range(last + 1))])
    axes.set_xlabel("round")
    return labels


def _plane(axes: Axes, reads: Sequence[Reading], target: str, other: str) -> list[Label]:
    x_name, y_name = nats_name(other), nats_name(target)
    base = next(r for r in reads if r.stage == "base")
    axes.axhline(0, color="#cccccc", lw=0.8, zorder=0)
    axes.axvline(0, color="#cccccc", lw=0.8, zorder=0)
    for stage in ("steered", "healed"):
        shifts = [(shift(r, base, x_name), shift(r, base, y_name)) for r in reads if r.stage == stage]
        path = [(0.0, 0.0)] + [(x, y) for x, y in shifts if x is not None and y is not None]
        axes.plot(*zip(*path), "-", color=COLOURS[stage], lw=1, alpha=0.5)
    labels = []
    for r in reads:
        x, y = shift(r, base, x_name), shift(r, base, y_name)
        if x is None or y is None:
            continue
        axes.plot(x, y, MARKERS[r.stage], color=COLOURS[r.stage], ms=7)
        labels.append(Label(x, y, r.stage if r.round < 0 else f"{r.stage} {r.round}", COLOURS[r.stage]))
    axes.set_aspect("equal", adjustable="datalim")
    axes.margins(0.15)
    axes.set_title(f"Against the foundation that moved most: {other}")
    axes.set_xlabel(f"{other}: nats from base")
    axes.set_ylabel(f"{target}: nats from base")
    return labels


def _intervals(axes: Axes, reads: Sequence[Reading], x_name: str, y_name: str) -> None:
    """A thin cross through each state: the 95 percent intervals of its shift on both axes."""
    base = next(r for r in reads if r.stage == "base")
    for r in reads:
        x, y = shift(r, base, x_name), shift(r, base, y_name)
        if x is None or y is None:
            continue
        for name, line in ((x_name, lambda low, high: ((low, high), (y, y))), (y_name, lambda low, high: ((x, x), (low, high)))):
            low, high = r[f"{name}_lo"], r[f"{name}_hi"]
            if low is not None and high is not None:
                axes.plot(*line(low, high), "-", color=COLOURS[r.stage], lw=1, alpha=0.6)


def main(runs: Annotated[list[Path], tyro.conf.Positional]) -> int:
    """Draws trajectory.png and map.png of each run folder again, from its events.jsonl alone."""
    return redraw(runs, plot, "base was not measured yet, nothing to draw")


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
