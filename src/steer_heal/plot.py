"""events.jsonl -> trajectory.png.

    python -m steer_heal.plot out/<run>
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import matplotlib
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

from steer_heal.events import read_events  # noqa: E402
from steer_heal.readings import Event, Reading, moved_most, nats_name, readings, shift, target_of, verdict  # noqa: E402

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
        _trait(trait, reads, target, sign)
        _incoherence(incoherence, reads)
        _plane(plane, reads, target, moved_most(reads, target))
        start = next(e for e in events if e["stage"] == "run_start")
        config = start["config"]
        heal = config["heal"]
        figure.suptitle(
            f"{start['trait']['name']} into {config['model']}, seed {start['seed']}: {heal['divergence']} {heal['aggregate']}, lam {heal['lam']:g}, "
            f"tau {heal['tau']:g}\n{verdict(events)}", x=0.01, ha="left", fontsize=11,
        )
        path, beside = folder / "trajectory.png", folder / ".trajectory.tmp.png"
        figure.savefig(beside, dpi=130)
        plt.close(figure)
    beside.replace(path)
    return path


def _series(reads: Sequence[Reading], stage: str, metric: str) -> list[tuple[float, Reading]]:
    return [(float(r.round), r) for r in reads if r.stage == stage and r[metric] is not None]


def _end_label(axes: Axes, x: float, y: float, text: str, colour: str, dy: int = 0) -> None:
    axes.annotate(text, (x, y), xytext=(7, dy), textcoords="offset points", color=colour, va="center", fontsize=9.5)


def _trait(axes: Axes, reads: Sequence[Reading], target: str, sign: int) -> None:
    metric = nats_name(target)
    base = next(r for r in reads if r.stage == "base")
    axes.axhline(base[metric], color=COLOURS["base"], lw=1)
    axes.plot(BASE_X, base[metric], MARKERS["base"], color=COLOURS["base"])
    _end_label(axes, BASE_X, base[metric], "base", COLOURS["base"], 9)
    for stage in ("prompted", "control"):
        for x, r in _series(reads, stage, metric):
            axes.plot(x, r[metric], MARKERS[stage], color=COLOURS[stage])
            _end_label(axes, x, r[metric], stage, COLOURS[stage], -9 if stage == "control" else 0)
    for stage in ("steered", "healed"):
        points = _series(reads, stage, metric)
        if not points:
            continue
        x, y = [p[0] for p in points], [p[1][metric] for p in points]
        axes.plot(x, y, "-" + MARKERS[stage], color=COLOURS[stage], lw=1.8)
        low, high = ([base[metric] + (r[f"{metric}_{side}"] or 0.0) for _, r in points] for side in ("lo", "hi"))
        axes.fill_between(x, low, high, color=COLOURS[stage], alpha=0.14, lw=0)
        _end_label(axes, x[-1], y[-1], stage, COLOURS[stage])
    axes.set_title(f"The trait: log mean p({target}), wanted {'down' if sign < 0 else 'up'} (band: 95% interval against base)")
    axes.set_ylabel("nats")
    axes.tick_params(labelbottom=False)
    axes.margins(x=0.12)


def _incoherence(axes: Axes, reads: Sequence[Reading]) -> None:
    has_oracle = any(r["oracle"] is not None for r in reads)
    text, text_name = ("oracle", "impossible sentences") if has_oracle else ("degenerate_frac", "degenerate texts")
    lines = {
        ("coherence", "-"): lambda r: 1 - r["coherence"],
        (text, "--"): lambda r: 1 - r[text] if text == "oracle" else r[text],
    }
    for (metric, style), value in lines.items():
        for stage in ("base", "prompted", "control", "steered", "healed"):
            points = _series(reads, stage, metric)
            if not points:
                continue
            x, y = [p[0] for p in points], [max(INCOHERENCE_FLOOR, value(r)) for _, r in points]
            filled = COLOURS[stage] if metric == "coherence" else "white"
            axes.plot(x, y, style, marker=MARKERS[stage], color=COLOURS[stage], mfc=filled, lw=1.6)
            if stage in ("steered", "healed"):
                _end_label(axes, x[-1], y[-1], f"{stage}: {text_name if metric == text else 'answer slot'}", COLOURS[stage])
    axes.set_yscale("log")
    axes.set_ylim(INCOHERENCE_FLOOR / 1.6, 1.6)
    axes.axhline(0.05, color="#999999", lw=0.8, ls=":")
    axes.annotate("0.05", (0, 0.05), xycoords=("axes fraction", "data"), xytext=(3, 3), textcoords="offset points", fontsize=8, color="#777777")
    axes.set_title(f"Incoherence (log): solid 1 - answer mass, dashed {text_name}; {INCOHERENCE_FLOOR:g} means none seen")
    axes.set_ylabel("share")
    axes.set_xlabel("round (base, prompted and control stand at -1)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.3)


def _plane(axes: Axes, reads: Sequence[Reading], target: str, other: str) -> None:
    x_name, y_name = nats_name(other), nats_name(target)
    base = next(r for r in reads if r.stage == "base")
    axes.axhline(0, color="#cccccc", lw=0.8, zorder=0)
    axes.axvline(0, color="#cccccc", lw=0.8, zorder=0)
    for stage in ("steered", "healed"):
        path = [(0.0, 0.0)] + [(shift(r, base, x_name), shift(r, base, y_name)) for _, r in _series(reads, stage, y_name)]
        axes.plot(*zip(*path), "-", color=COLOURS[stage], lw=1, alpha=0.5)
    for r in reads:
        x, y = shift(r, base, x_name), shift(r, base, y_name)
        if x is None or y is None:
            continue
        axes.plot(x, y, MARKERS[r.stage], color=COLOURS[r.stage], ms=7)
        label = r.stage if r.round < 0 else f"{r.stage} {r.round}"
        axes.annotate(label, (x, y), xytext=(7, 4), textcoords="offset points", fontsize=9, color=COLOURS[r.stage])
    axes.set_aspect("equal", adjustable="datalim")
    axes.margins(0.15)
    axes.set_title(f"Against the foundation that moved most: {other}")
    axes.set_xlabel(f"{other}: nats from base")
    axes.set_ylabel(f"{target}: nats from base")


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
