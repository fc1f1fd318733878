"""steer-heal sweep FILE.toml: makes every run that the file asks for and that is not finished yet."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from steer_heal.errors import UserError, print_error, print_safe

if TYPE_CHECKING:
    from steer_heal.sweep.engine import Engine
    from steer_heal.sweep.plan import Plan
    from steer_heal.sweep.watch import Watch


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Make the runs of a sweep file that are not finished, and compare them. The file: docs/sweeps.md.

    A run that was stopped goes on. A run that another process works on is left alone. The same command, given again,
    does what is left.
    """

    file: tyro.conf.Positional[Path]
    """TOML: preset, seeds, [fixed] settings, and [grid], [[runs]] or [search]."""
    engine: Literal["local", "ray", "print"] = "local"
    """local: processes of this machine; ray: tasks of a Ray cluster (pip install 'steer-heal[ray]'); print: only write
    the commands, one a line, for a scheduler."""
    jobs: int | None = None
    """Runs at a time. None: 1 on this machine, on Ray as many as fit."""
    results: bool = False
    """Start nothing; show the results of the runs that are finished."""
    address: str | None = None
    """Of ray: an existing cluster, such as auto or ray://host:10001. None: one on this machine."""
    cpus: float = 1.0
    """Of ray: CPUs of one run."""
    gpus: float = 0.0
    """Of ray: GPUs of one run; 0.5 puts two runs on a card."""

    def check(self) -> None:
        """UserError for a number that is out of range."""
        for name, value, holds, limit in (
            ("jobs", self.jobs, self.jobs is None or self.jobs >= 1, "at least 1"),
            ("cpus", self.cpus, self.cpus > 0, "above 0"),
            ("gpus", self.gpus, self.gpus >= 0, "0 or more"),
        ):
            if not holds:
                raise UserError(f"{name} is {value}: it must be {limit}")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 nothing failed, 1 a run failed, 2 a wrong argument or file, 130 by Ctrl-C, 143 by SIGTERM."""
    from steer_heal.runs.signals import Stopped

    argv = sys.argv[1:] if argv is None else argv
    given = tyro.cli(Sweep, args=argv, prog="steer-heal sweep")
    try:
        given.check()
        from steer_heal.sweep.plan import load

        plan = load(given.file)
        if given.engine == "print":
            return print_commands(plan)
        return search(plan, given) if plan.search else make(plan, given)
    except Stopped as stopped:
        print_safe(f"stopped; go on with: {shlex.join(['steer-heal', 'sweep', *argv])}", sys.stderr)
        return stopped.status
    except (UserError, OSError, ValueError) as error:
        print_error(error)
        return 2


def print_commands(plan: Plan) -> int:
    """One command a line for every run, finished or not, so that the lines keep their numbers."""
    if plan.search:
        raise UserError("engine is 'print': a search proposes runs by the results of others; use local or ray")
    for job in plan.jobs:
        print_safe(shlex.join(["steer-heal", *job.command()]))
    return 0


def make(plan: Plan, given: Sweep) -> int:
    """Every run of a plan without a search; then its results. Returns the exit status."""
    from steer_heal.sweep.engine import drive
    from steer_heal.sweep.results import show_results
    from steer_heal.sweep.watch import Watch

    failed = 0
    if not given.results:
        engine = engine_of(given)
        with Watch(plan.jobs) as watch:
            drive(iter(plan.jobs), engine, watch)
        failed = report(watch)
    show_results(plan.out, plan.jobs)
    return 1 if failed else 0


def search(plan: Plan, given: Sweep) -> int:
    """The trials that are left of a search; then its Pareto front. Returns the exit status."""
    from steer_heal.runs.storage import lock_run
    from steer_heal.sweep.engine import drive
    from steer_heal.sweep.search import Trials
    from steer_heal.sweep.watch import Watch

    trials, failed = Trials(plan), 0
    if not given.results:
        engine = engine_of(given)
        with lock_run(plan.out), Watch([]) as watch:  # two processes would propose trials past each other
            drive(trials.source(), engine, watch, trials.ended)
        failed = report(watch)
    trials.show()
    return 1 if failed else 0


def engine_of(given: Sweep) -> Engine:
    from steer_heal.sweep.cluster import Cluster
    from steer_heal.sweep.engine import Local

    if given.engine == "ray":
        return Cluster(given.jobs, given.address, given.cpus, given.gpus)
    return Local(given.jobs or 1)


def report(watch: Watch) -> int:
    """Says which runs failed, and which were left alone; returns how many failed."""
    from steer_heal.sweep.engine import log_of

    for row in watch.having("in use"):
        print_safe(f"in use: another process is running {row.job.folder}; it was left alone")
    failed = watch.having("failed")
    for row in failed:
        print_safe(f"failed: {row.job.folder} ({log_of(row.job)}): {row.message}", sys.stderr)
    return len(failed)
