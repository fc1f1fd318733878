"""Tables of finished runs, and of arms over seeds, from results.tsv, and the frontier of the arms."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from steer_heal.errors import plural, print_safe
from steer_heal.report import tables
from steer_heal.runs.results import RESULTS, read_results
from steer_heal.runs.storage import atomic_write
from steer_heal.sweep.plan import Arm, Job, readable

SAME = ("arm", "trait", "n_rounds", "settings")
"""Runs that differ in any of these never share a row."""
WORDS = {
    *("run", "arm", "settings", "preset", "model", "trait", "target", "text", "teacher", "divergence", "aggregate"),
    *("reference", "state", "verdict", "last_hash"),
}
"""Columns of results.tsv that do not hold numbers."""
ARMS = "arms.tsv"
FRONTIER = "frontier.png"


def frame(rows: Iterable[Mapping[str, str]]) -> pl.DataFrame:
    """Rows of results.tsv with numbers as numbers. A cell that should hold a number and does not is null."""
    texts = pl.DataFrame([dict(row) for row in rows], infer_schema_length=None)
    return texts.with_columns(
        pl.col(name).cast(pl.Int64 if name in ("seed", "n_rounds") else pl.Float64, strict=False)
        for name in texts.columns
        if name not in WORDS
    )


def over_seeds(runs: pl.DataFrame) -> pl.DataFrame:
    """One row per arm: `n` seeds, the mean of each number, its standard deviation as `<name>_sd`, and the number of
    seeds that have it as `<name>_n`. The last run of a seed counts."""
    runs = runs.unique([*SAME, "seed"], keep="last", maintain_order=True)
    numbers = [name for name in runs.columns if name not in {*WORDS, *SAME, "seed"}]
    columns = [
        column
        for name in numbers
        for column in (pl.mean(name), pl.std(name).name.suffix("_sd"), pl.count(name).name.suffix("_n"))
    ]
    return runs.group_by(SAME, maintain_order=True).agg(pl.len().alias("n"), *columns)


def spread(arms: pl.DataFrame, names: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of the arms with `mean ± sd` in each named column, and in brackets the number of seeds that have a value
    if some have none."""
    shown = [name for name in names if name in arms.columns]
    return [
        {name: row[name] for name in (*SAME, "n")} | {name: _mean_sd(row, name) for name in shown}
        for row in arms.iter_rows(named=True)
    ]


def _mean_sd(row: Mapping[str, Any], name: str) -> str:
    """`mean ± sd`. A single value has no sd; without a value it is empty."""
    mean, sd, n = (row[column] for column in (name, f"{name}_sd", f"{name}_n"))
    if mean is None:
        return ""
    short = f" ({n})" if n < row["n"] else ""
    return f"{mean:.3f}{short}" if sd is None else f"{mean:.3f} ± {sd:.3f}{short}"


def finished_runs(out: Path, jobs: Sequence[Job]) -> pl.DataFrame | None:
    """The rows of those runs of the jobs that are finished, in the order of the jobs, with the labels of the sweep
    file. A run that went on to more rounds than its job asks for has none. None: there are none."""
    mine = [(job, row) for job, row in _rows(out, jobs) if row.get("n_rounds") == str(job.cfg.n_rounds)]
    return frame({**row, "arm": job.arm.label} for job, row in mine) if mine else None


def _rows(out: Path, jobs: Sequence[Job]) -> list[tuple[Job, dict[str, str]]]:
    """The row of each job whose folder exists and whose run has finished."""
    rows = {row.get("run", ""): row for row in read_results(out / RESULTS)}
    return [(job, rows[job.folder.name]) for job in jobs if job.folder.name in rows and job.folder.is_dir()]


def write_arms(out: Path, runs: pl.DataFrame) -> pl.DataFrame:
    """Writes arms.tsv of finished runs to `out` and returns its rows."""
    arms = over_seeds(runs)
    with atomic_write(out / ARMS) as part:
        arms.write_csv(part, separator="\t")
    return arms


def show_results(out: Path, jobs: Sequence[Job]) -> None:
    """Prints the tables of runs and arms, and writes arms.tsv and the frontiers to `out`."""
    runs = finished_runs(out, jobs)
    for job, row in _rows(out, jobs):
        if row.get("n_rounds") != str(job.cfg.n_rounds):
            print_safe(
                f"left out: {job.folder.name}, which has {row.get('n_rounds')} rounds in place of {job.cfg.n_rounds}"
            )
    if runs is None:
        print_safe("no run of this sweep is finished yet")
        return
    arms = write_arms(out, runs)
    shown = ["shift", *dict.fromkeys(metric.name for job in jobs for metric in job.arm.health), "wall_s"]
    grade = pl.col("verdict").str.split(":").list.first()
    tables.show(runs.select("arm", "seed", *(name for name in shown if name in runs.columns), grade).to_dicts())
    tables.show([{name: row[name] for name in row if name in ("arm", "n", *shown)} for row in spread(arms, shown)])
    drawn = [draw(path, runs, mine) for path, mine in _pictures(out, jobs).items()]
    print_safe(f"finished: {len(runs)} of {plural(len(jobs), 'run')}; arms are also in {out / ARMS}{''.join(drawn)}")


def _pictures(out: Path, jobs: Sequence[Job]) -> dict[Path, list[Arm]]:
    """The arms of each frontier, which all have one model and one trait, by its file."""
    groups: dict[tuple[str, str], list[Arm]] = {}
    for arm in {job.arm.label: job.arm for job in jobs}.values():
        groups.setdefault((arm.cfg.model, arm.cfg.trait), []).append(arm)
    if len(groups) == 1:
        (arms,) = groups.values()
        return {out / FRONTIER: arms}
    pictures: dict[Path, list[Arm]] = {}
    for (model, trait), arms in groups.items():
        name = f"frontier_{readable(f'{Path(model).name}_{trait}')}"
        names = itertools.chain([name], (f"{name}_{i}" for i in itertools.count(2)))
        pictures[next(path for each in names if (path := out / f"{each}.png") not in pictures)] = arms
    return pictures


def draw(path: Path, runs: pl.DataFrame, arms: Sequence[Arm]) -> str:
    """Draws the frontier of the arms. Returns what to say of it."""
    mine = {arm.label: arm for arm in arms}
    points: list[dict[str, Any]] = []
    for row in runs.iter_rows(named=True):
        arm = mine.get(row["arm"])
        broken = row.get(arm.broken_texts or "") if arm else None
        if arm and row["shift"] is not None and broken is not None:
            costs = {"broken": broken, "kl_base": row.get("kl_base"), "panel": row.get("panel_rms_nats")}
            points.append({"arm": row["arm"], "round": 0, "shift": arm.sign * row["shift"], **costs})
    if not points:
        return ""
    from steer_heal.report.plot import frontier

    with atomic_write(path) as part:
        figure = frontier(points)
        assert figure is not None, "every point has a share of broken texts"
        figure.savefig(part, format="png", dpi=200)
    return f", the picture is {path}"
