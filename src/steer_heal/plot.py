"""events.jsonl -> trajectory.png.

    python -m steer_heal.plot out/<run>
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from steer_heal.events import read_events  # noqa: E402
from steer_heal.readings import Reading, moved_most, nats_name, readings, shift, target_of, verdict  # noqa: E402

COLOURS = {"base": "#6b6b6b", "prompted": "#3b6fb6", "control": "#b08900", "steered": "#c8452f", "healed": "#1f8a5b"}
MARKERS = {"base": "o", "prompted": "D", "control": "s", "steered": "^", "healed": "o"}
INCOHERENCE_FLOOR = 1e-4
BASE_X = -1.0


def plot(folder: Path) -> Path | None:
    """Draws trajectory.png from the events alone; None where base was not measured yet."""
    events = read_events(folder)
    reads = readings(events)
    if not any(r.stage == "base" for r in reads):
        return None
    target, sign = target_of(events)
    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11, "axes.titlelocation": "left"}):
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
        start = next(e for e in events if e["stage"] == "run_start")
        config = start["config"]
        heal = config["heal"]
        figure.suptitle(
            f"{start['trait']['name']} into {config['model']}, seed {start['seed']}: {heal['divergence']} {heal['aggregate']}, lam {heal['lam']:g}, "
            f"tau {heal['tau']:g}\n{verdict(events)}", x=0.01, ha="left", fontsize=11,
        )
        for axes, texts in labels.items():
            _write_labels(figure, axes, texts)
        path, beside = folder / "trajectory.png", folder / ".trajectory.tmp.png"
        figure.savefig(beside, dpi=130)
        plt.close(figure)
    beside.replace(path)
    return path


def _series(reads: Sequence[Reading], stage: str, metric: str) -> list[tuple[float, Reading]]:
    return [(float(r.round), r) for r in reads if r.stage == stage and r[metric] is not None]


@dataclass
class Label:
    """Text that belongs to the point x, y."""

    x: float
    y: float
    text: str
    colour: str


LABEL_HEIGHT_POINTS, LABEL_WIDTH_POINTS = 12.0, 70.0


def _write_labels(figure: Figure, axes: Axes, labels: Sequence[Label]) -> None:
    """Each label right of its point, pushed up or down until none covers another."""
    figure.draw_without_rendering()
    pixels = axes.transData.transform([(label.x, label.y) for label in labels])
    points = sorted(zip(pixels * 72 / figure.dpi, labels, strict=True), key=lambda pair: pair[0][1])
    heights = [y for (_, y), _ in points]
    for _ in range(60):
        for i in range(len(points)):
            for j in range(i + 1, len(points)):
                overlap = LABEL_HEIGHT_POINTS - (heights[j] - heights[i])
                if overlap > 0 and abs(points[i][0][0] - points[j][0][0]) < LABEL_WIDTH_POINTS:
                    heights[i], heights[j] = heights[i] - overlap / 2, heights[j] + overlap / 2
    for ((_, y), label), height in zip(points, heights, strict=True):
        axes.annotate(
            label.text, (label.x, label.y), xytext=(9, height - y), textcoords="offset points", color=label.colour, va="center", fontsize=9.5
        )


def _trait(axes: Axes, reads: Sequence[Reading], target: str, sign: int) -> list[Label]:
    metric = nats_name(target)
    base = next(r for r in reads if r.stage == "base")
    axes.axhline(base[metric], color=COLOURS["base"], lw=1)
    labels = []
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
        low, high = ([base[metric] + (r[f"{metric}_{side}"] or 0.0) for _, r in points] for side in ("lo", "hi"))
        axes.fill_between(x, low, high, color=COLOURS[stage], alpha=0.14, lw=0)
        labels.append(Label(x[-1], y[-1], stage, COLOURS[stage]))
    axes.set_title(f"The trait: log mean p({target}), wanted {'down' if sign < 0 else 'up'} (band: 95% against base)")
    axes.set_ylabel("nats")
    axes.tick_params(labelbottom=False)
    axes.margins(y=0.12)
    return labels


def _incoherence(axes: Axes, reads: Sequence[Reading]) -> list[Label]:
    has_oracle = any(r["oracle"] is not None for r in reads)
    text, text_name = ("oracle", "impossible sentences") if has_oracle else ("degenerate_frac", "degenerate texts")
    lines = {
        ("coherence", "-"): lambda r: 1 - r["coherence"],
        (text, "--"): lambda r: 1 - r[text] if text == "oracle" else r[text],
    }
    labels = []
    for (metric, style), value in lines.items():
        for stage in ("base", "prompted", "control", "steered", "healed"):
            points = _series(reads, stage, metric)
            if not points:
                continue
            x, y = [p[0] for p in points], [max(INCOHERENCE_FLOOR, value(r)) for _, r in points]
            filled = COLOURS[stage] if metric == "coherence" else "white"
            axes.plot(x, y, style, marker=MARKERS[stage], color=COLOURS[stage], mfc=filled, lw=1.6)
            if stage in ("steered", "healed"):
                labels.append(Label(x[-1], y[-1], f"{stage}: {text_name if metric == text else 'answer slot'}", COLOURS[stage]))
    axes.set_yscale("log")
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
        path = [(0.0, 0.0)] + [(shift(r, base, x_name), shift(r, base, y_name)) for _, r in _series(reads, stage, y_name)]
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


def main(runs: Annotated[list[Path], tyro.conf.Positional]) -> int:
    """Draws trajectory.png of each run folder again, from its events.jsonl alone."""
    for folder in runs:
        if not (folder / "events.jsonl").exists():
            print(f"error: {folder} has no events.jsonl; give a run folder such as out/<timestamp>_<name>", file=sys.stderr)
            return 1
        print(plot(folder) or f"{folder}: base was not measured yet, nothing to draw")
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
