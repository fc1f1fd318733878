"""Runs on a Ray cluster survive the death of their process and of their worker. RAY=1 runs it: it takes minutes."""

import os
import shutil
import signal
from dataclasses import replace
from importlib.util import find_spec

import psutil
import pytest
from runs import assert_same, started, undrawn
from test_sweep import SHORT, events_of, file_of

from steer_heal.presets import FAST_DEV_PRESET
from steer_heal.runs.events import RESULTS, read_results
from steer_heal.sweep.engine import drive
from steer_heal.sweep.plan import flags, load
from steer_heal.sweep.watch import Watch

pytestmark = [
    pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed: pip install 'steer-heal[ray]'"),
    pytest.mark.skipif("RAY" not in os.environ, reason="it takes minutes: RAY=1 runs it"),
]
SIX = SHORT.replace("[42]", "[41, 42, 43]") + "[grid]\nheal.tau = [0.0, 0.1]\n"


@pytest.fixture
def ray():
    import ray

    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


def process_of(job) -> psutil.Process | None:
    """The process of a job's run."""
    for process in psutil.process_iter(["cmdline"]):
        if str(job.folder) in (process.info["cmdline"] or []) and "run" in process.info["cmdline"]:
            return process
    return None


class Killer(Watch):
    """Kills the process of the first run once it has measured its base, and the worker of the second."""

    def __init__(self, jobs):
        super().__init__(jobs)
        self.victims = {"process": jobs[0], "worker": jobs[1]}
        self.killed = {}

    def show(self):
        for what, job in list(self.victims.items()):
            if "base" in events_of(job.folder) and (process := process_of(job)) is not None:
                victim = process if what == "process" else process.parent()
                self.killed[what] = (victim.pid, len(events_of(job.folder)))
                os.kill(victim.pid, signal.SIGKILL)
                del self.victims[what]


def test_a_killed_process_and_a_killed_worker_cost_nothing(ray, tmp_path):
    from steer_heal.sweep.cluster import Cluster

    jobs = load(file_of(tmp_path, SIX)).jobs
    assert len(jobs) == 6
    with Killer(jobs) as watch:
        drive(iter(jobs), Cluster(None, None, 1.0, 0.0), watch)
    assert watch.killed.keys() == {"process", "worker"}
    assert [row.state for row in watch.rows.values()] == ["done"] * 6, [row.message for row in watch.rows.values()]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with Watch(jobs) as again:
        drive(iter(jobs), Cluster(None, None, 1.0, 0.0), again)
    assert len(again.having("done")) == 6
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert before == after, "nothing was done the second time"
    assert len(read_results(tmp_path / "out" / RESULTS)) == 6
    for i, job in enumerate(jobs):
        alone = tmp_path / f"ray{i}" / job.folder.name  # its row of results.tsv alone beside it
        shutil.copytree(job.folder, alone)
        (row,) = (row for row in read_results(tmp_path / "out" / RESULTS) if row["run"] == job.folder.name)
        (alone.parent / RESULTS).write_text("\t".join(row) + "\n" + "\t".join(row.values()) + "\n")
        with undrawn():
            whole = started(tmp_path / f"plain{i}", flags(replace(job.cfg, folder=None), FAST_DEV_PRESET))
        assert_same(alone, whole)
