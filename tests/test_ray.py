"""Runs on a Ray cluster survive the death of their process and of their worker, and Ctrl-C. RAY=1 runs it: it takes
minutes."""

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
from places import ROOT
from runs import assert_same, started, undrawn
from test_sweep import SHORT, file_of, measured

from steer_heal.presets import FAST_DEV_PRESET
from steer_heal.runs.results import RESULTS, read_results
from steer_heal.runs.verify import violations
from steer_heal.sweep.engine import drive
from steer_heal.sweep.plan import as_flags, load
from steer_heal.sweep.progress import run_status
from steer_heal.sweep.watch import Watch

pytestmark = [
    pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed: pip install 'steer-heal[ray]'"),
    pytest.mark.skipif("RAY" not in os.environ, reason="it takes minutes: RAY=1 runs it"),
]
SIX = SHORT.replace("[42]", "[41, 42, 43]") + "[grid]\nheal.tau = [0.0, 0.1]\n"


def waited(condition, process, limit_s=300):
    began = time.monotonic()
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - began < limit_s
        time.sleep(0.05)


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
            if measured(job.folder) and (process := process_of(job)) is not None:
                victim = process if what == "process" else process.parent()
                self.killed[what] = victim.pid
                os.kill(victim.pid, signal.SIGKILL)
                del self.victims[what]


def test_a_killed_process_and_a_killed_worker_cost_nothing(ray, tmp_path):
    from steer_heal.sweep.cluster import Cluster

    jobs = load(file_of(tmp_path, SIX)).jobs
    assert len(jobs) == 6
    with Killer(jobs) as watch:
        drive(iter(jobs), Cluster(None, address=None, cpus=1.0, gpus=0.0, ahead=True), watch)
    assert watch.killed.keys() == {"process", "worker"}
    assert [row.state for row in watch.rows.values()] == ["done"] * 6, [row.message for row in watch.rows.values()]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with Watch(jobs) as again:
        drive(iter(jobs), Cluster(None, address=None, cpus=1.0, gpus=0.0, ahead=True), again)
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
            whole = started(tmp_path / f"plain{i}", as_flags(replace(job.cfg, folder=None), FAST_DEV_PRESET))
        assert_same(alone, whole)


@pytest.fixture
def cluster():
    """The address of a cluster with one GPU, which is declared and not there. It was started in the background of a
    script: its processes ignore SIGINT."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tempfile.mkdtemp(prefix="ray")  # names of sockets are short
    command = [Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--port", str(port)]
    command += ["--num-cpus", "4", "--num-gpus", "1", "--include-dashboard", "false", "--temp-dir", folder]
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)
    head = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment())
    signal.signal(signal.SIGINT, ignored)
    waited(lambda: answers(port), head)
    yield f"127.0.0.1:{port}"
    head.terminate()
    head.wait()
    shutil.rmtree(folder, ignore_errors=True)


def answers(port):
    with socket.socket() as asked:
        return asked.connect_ex(("127.0.0.1", port)) == 0


def environment():
    """Without a token, which a user of this machine may have."""
    return os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "RAY_AUTH_MODE": "disabled"}


def test_ctrl_c_stops_the_runs_of_a_cluster_and_the_same_command_goes_on(cluster, tmp_path):
    file = file_of(tmp_path, SHORT.replace("[42]", "[41, 42, 43]"))
    *shared, last = load(file).jobs
    command = [sys.executable, "-m", "steer_heal", "sweep", str(file), "--engine", "ray", "--address", cluster]
    command += ["--gpus", "0.5"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT, "env": environment()}
    first = subprocess.Popen(command, **pipes)
    waited(lambda: all(measured(job.folder) for job in shared), first)
    assert not last.folder.exists(), "there is room for two on the card"
    first.send_signal(signal.SIGINT)
    out, err = first.communicate(timeout=300)
    assert first.returncode == 130, (out, err)
    assert err.endswith(f"continue with: {shlex.join(['steer-heal', *command[3:]])}\n"), err
    assert [run_status(job.folder) for job in (*shared, last)] == ["stopped", "stopped", "new"]
    begun = [job.folder.joinpath("events.jsonl").read_bytes().split(b"\n")[0] for job in shared]
    second = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment())
    assert second.returncode == 0 and "finished: 3 of 3 runs" in second.stdout, second
    for job in (*shared, last):
        assert violations(job.folder) == []
    assert begun == [job.folder.joinpath("events.jsonl").read_bytes().split(b"\n")[0] for job in shared], "they went on"
