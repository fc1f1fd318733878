"""Tables of finished runs, and of arms over seeds, from results.tsv; and their frontier."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from steer_heal.errors import print_safe
from steer_heal.report.console import print_frame
from steer_heal.runs.events import RESULTS, read_results
from steer_heal.runs.storage import atomic_write
from steer_heal.sweep.plan import Job

SAME = ("arm", "trait", "n_rounds", "settings")
"""Runs that differ in any of these never share a row."""
WORDS = {
    *("run", "arm", "settings", "preset", "model", "trait", "target", "text", "teacher", "divergence", "aggregate"),
    *("reference", "state", "verdict", "last_hash"),
}
"""Columns of results.tsv that are no numbers."""
ARMS, FRONTIER = "arms.tsv", "frontier.png"


def frame(rows: Iterable[Mapping[str, str]]) -> pl.DataFrame:
    """Rows of results.tsv with numbers as numbers. What is empty, or is none where it should be, is null."""
    texts = pl.DataFrame([dict(row) for row in rows], infer_schema_length=None)
    return texts.with_columns(
        pl.col(name).cast(pl.Int64 if name in ("seed", "n_rounds") else pl.Float64, strict=False)
        for name in texts.columns
        if name not in WORDS
    )


def over_seeds(runs: pl.DataFrame) -> pl.DataFrame:
    """One row an arm: `n` seeds, and of every number its mean, and its sd as `<name>_sd`; of each seed the last run."""
    runs = runs.unique([*SAME, "seed"], keep="last", maintain_order=True)
    numbers = [name for name in runs.columns if name not in {*WORDS, *SAME, "seed"}]
    both = [column for name in numbers for column in (pl.mean(name), pl.std(name).name.suffix("_sd"))]
    return runs.group_by(SAME, maintain_order=True).agg(pl.len().alias("n"), *both)


def spread(arms: pl.DataFrame, names: Sequence[str]) -> pl.DataFrame:
    """The arms as people read them: `mean ± sd` of each named column, without sd of one value, empty of none."""
    mean = lambda name: pl.col(name).map_elements("{:.3f}".format, pl.String)
    cells = [
        pl.concat_str(mean(name), pl.format(" ± {}", mean(f"{name}_sd")).fill_null("")).fill_null("").alias(name)
        for name in names
        if name in arms.columns
    ]
    return arms.select(*SAME, "n", *cells)


def finished_runs(out: Path, jobs: Sequence[Job]) -> pl.DataFrame | None:
    """The rows of the jobs' runs that are finished, in the order of the jobs, with the labels of the sweep file."""
    rows = {row.get("run", ""): row for row in read_results(out / RESULTS)}
    mine = [(job, rows[job.folder.name]) for job in jobs if job.folder.name in rows]
    return frame({**row, "arm": job.arm.label} for job, row in mine) if mine else None


def write_arms(out: Path, runs: pl.DataFrame) -> pl.DataFrame:
    """Writes arms.tsv of finished runs to `out`; returns its rows."""
    arms = over_seeds(runs)
    with atomic_write(out / ARMS) as part:
        arms.write_csv(part, separator="\t")
    return arms


def show_results(out: Path, jobs: Sequence[Job]) -> None:
    """Prints the tables of runs and arms; writes arms.tsv and frontier.png to `out`."""
    runs = finished_runs(out, jobs)
    if runs is None:
        print_safe("no run of this sweep is finished yet")
        return
    arms = write_arms(out, runs)
    shown = ["shift", *dict.fromkeys(metric.name for job in jobs for metric in job.arm.health), "wall_s"]
    shown = [name for name in shown if name in runs.columns]
    verdict = pl.col("verdict").str.split(":").list.first()
    print_frame(runs.select("arm", "seed", pl.col(shown).round(3), verdict))
    print_frame(spread(arms, shown).drop("settings", "n_rounds"))
    drawn = draw(out / FRONTIER, runs, {job.arm.label: (job.arm.sign, job.arm.broken) for job in jobs})
    print_safe(f"{len(runs)} of {len(jobs)} runs are finished; arms are also in {out / ARMS}{drawn}")


def draw(path: Path, runs: pl.DataFrame, judges: Mapping[str, tuple[int, str | None]]) -> str:
    """The frontier of the arms, for which (sign, metric of broken texts) is known; what to say of it."""
    points: list[dict[str, Any]] = []
    for row in runs.iter_rows(named=True):
        sign, broken = judges[row["arm"]]
        if row["shift"] is not None and row.get(broken or "") is not None:
            points.append({"arm": row["arm"], "round": 0, "shift": sign * row["shift"], "broken": row[broken or ""]})
    if not points:
        return ""
    from steer_heal.report.plot import frontier

    with atomic_write(path) as part:
        frontier(points).savefig(part, format="png", dpi=130)
    return f", the picture is {path}"
