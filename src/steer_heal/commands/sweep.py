"""steer-heal sweep FILE.toml: makes every run that the file asks for and that is not finished yet."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from steer_heal.errors import UserError, print_safe
from steer_heal.flags import parsed
from steer_heal.runs.signals import Stopped
from steer_heal.settings import Count, NotNegative, Positive, settings

if TYPE_CHECKING:  # polars, optuna, ray: only what the file asks for is loaded
    from steer_heal.sweep.engine import Engine
    from steer_heal.sweep.plan import Plan
    from steer_heal.sweep.watch import Watch


@settings("")
class Sweep:
    """Run all unfinished runs of a sweep file, then compare them. docs/sweeps.md describes the file.

    A stopped run is resumed. A run that another process is working on is left alone. To continue a stopped sweep, give
    the same command again.
    """

    file: tyro.conf.Positional[Path]
    """TOML file with the preset, the seeds, the [fixed] settings, and [grid], [[runs]] or [search]."""
    engine: Literal["local", "ray", "print"] = "local"
    """local: run processes on this machine. ray: run tasks on a Ray cluster (pip install 'steer-heal[ray]'). print:
    only print the commands, one per line, for a scheduler."""
    jobs: Count | None = None
    """Number of runs at the same time. Default: 1 with local. With ray, as many as fit on the cluster."""
    results: bool = False
    """Start nothing. Show the results of the finished runs."""
    address: str | None = None
    """With ray: an existing cluster, such as auto or ray://host:10001. Default: a new one on this machine."""
    cpus: Positive | None = None
    """With ray: number of CPUs for each run. Default: 1."""
    gpus: NotNegative | None = None
    """With ray: number of GPUs for each run. 0.5 puts two runs on one GPU. Default: 0."""


def main(argv: Sequence[str]) -> int:
    given, _ = parsed(Sweep, argv, "sweep")
    require_effect(given)
    from steer_heal.sweep.plan import load

    try:
        plan = load(given.file)
        if given.engine == "print":
            return print_commands(plan)
        return make(plan, given)
    except Stopped as stopped:
        print_safe(f"interrupted\ncontinue with: {shlex.join(['steer-heal', 'sweep', *argv])}", sys.stderr)
        return stopped.status


def require_effect(given: Sweep) -> None:
    """UserError with a line for each flag that has no effect beside the others."""
    idle = [name for name in ("address", "cpus", "gpus") if given.engine != "ray" and getattr(given, name) is not None]
    lines = [f"{name} is {getattr(given, name)}: only --engine ray uses it; leave it out" for name in idle]
    if given.engine == "print" and given.jobs is not None:
        lines.append(f"jobs is {given.jobs}: --engine print starts no run; leave it out")
    if given.engine == "print" and given.results:
        lines.append("engine is 'print': --results prints no commands; leave one of them out")
    if lines:
        raise UserError(*lines)


def print_commands(plan: Plan) -> int:
    """Prints one command per line for every run, finished or not, so that the lines keep their numbers."""
    if plan.search:
        raise UserError("engine is 'print': a search proposes runs by the results of others; use local or ray")
    for job in plan.jobs:
        print_safe(shlex.join(["steer-heal", *job.command()]))
    return 0


def make(plan: Plan, given: Sweep) -> int:
    """Makes the runs of a plan, or the trials of its search, that are not finished. Shows the results. Returns the exit
    status."""
    from steer_heal.runs.storage import lock_run
    from steer_heal.sweep.engine import drive
    from steer_heal.sweep.results import show_results
    from steer_heal.sweep.watch import Watch

    trials = None
    if plan.search:
        from steer_heal.sweep.search import Trials

        trials = Trials(plan)
    n_failed = 0
    if not given.results:
        engine = engine_of(given, ahead=trials is None)
        if trials is None:
            with Watch(plan.jobs) as watch:
                drive(iter(plan.jobs), engine, watch)
        else:
            with lock_run(plan.out), Watch([]) as watch:  # two processes would not know of each other's proposals
                drive(trials.source(), engine, watch, trials.ended)
        n_failed = report(watch)
    if trials is None:
        show_results(plan.out, plan.jobs)
    else:
        trials.show()
    return 1 if n_failed else 0


def engine_of(given: Sweep, *, ahead: bool) -> Engine:
    """`ahead`: whether Ray may be given all runs at once. A search proposes a run by the results of the others."""
    from steer_heal.sweep.cluster import Cluster
    from steer_heal.sweep.engine import Local

    if given.engine == "ray":
        shares = {"cpus": given.cpus or 1.0, "gpus": given.gpus or 0.0}
        return Cluster(given.jobs, address=given.address, **shares, ahead=ahead)
    return Local(given.jobs or 1)


def report(watch: Watch) -> int:
    """Says which runs failed and which were left alone. Returns the number of failed runs."""
    from steer_heal.sweep.engine import log_of

    for row in watch.having("in use"):
        print_safe(f"in use: another process is running {row.job.folder}; it was left alone")
    failed = watch.having("failed")
    for row in failed:
        print_safe(f"failed: {row.job.folder} ({log_of(row.job)}): {row.message}", sys.stderr)
    return len(failed)
