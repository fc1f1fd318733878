"""The engine `ray`: each run is a task of a Ray cluster, in a folder that all nodes share."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from steer_heal.errors import UserError
from steer_heal.sweep.engine import log_of
from steer_heal.sweep.plan import Job
from steer_heal.sweep.task import Killed, make

RETRIES = 3
"""How often a run is started again if its worker, node or process was killed. It is then resumed."""
STOP_S = 60.0
"""How long to wait for runs that were asked to stop, in seconds."""


class Cluster:
    """Tasks of a Ray cluster: the one that this process has joined, the one at `address`, or a new one here."""

    def __init__(self, slots: int | None, *, address: str | None, cpus: float, gpus: float, ahead: bool) -> None:
        """`cpus` and `gpus` are those of one run. Without `slots` Ray is given all runs at once or, unless `ahead`, as
        many as the nodes hold. UserError if Ray is not installed, or no cluster answers."""
        if find_spec("ray") is None:
            raise UserError("engine is 'ray': its package is not installed; pip install 'steer-heal[ray]'")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else Ray reports to its makers
        ray: Any = import_module("ray")
        if not ray.is_initialized():
            own = {"address": address} if address else {"include_dashboard": False}
            try:
                ray.init(**own, log_to_driver=False, logging_level="ERROR")
            except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
                raise UserError(f"address is {address!r}: {_why(error)}") from None
        self.ray = ray
        self.n_threads = max(1, int(cpus))
        shares = {"num_cpus": cpus, "num_gpus": gpus}
        self._fits(shares)
        self.slots = slots or (10**6 if ahead else self._room(shares))
        self.task = ray.remote(max_retries=RETRIES, retry_exceptions=[Killed], **shares)(make)

    def _fits(self, shares: dict[str, float]) -> None:
        """UserError if no node is large enough for one run."""
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        for name, key in (("num_cpus", "CPU"), ("num_gpus", "GPU")):
            most = max((node.get(key, 0.0) for node in nodes), default=0.0)
            if shares[name] > most:
                flag = f"{key.lower()}s"
                raise UserError(f"{flag} is {shares[name]:g}: no node has more than {most:g}; give a lower --{flag}")

    def _room(self, shares: dict[str, float]) -> int:
        """The number of runs that the nodes hold at once."""
        have = self.ray.cluster_resources()
        needs = (("CPU", shares["num_cpus"]), ("GPU", shares["num_gpus"]))
        return max(1, int(min(have.get(key, 0.0) / share for key, share in needs if share)))

    def start(self, job: Job) -> Any:
        folder = job.folder.resolve()
        arguments = replace(job, cfg=replace(job.cfg, folder=folder)).command(self.n_threads)
        folder.parent.mkdir(parents=True, exist_ok=True)
        log = log_of(job).resolve()
        before = _touched(log)  # a worker may begin at once
        return self.task.remote(arguments, folder, log, Path.cwd()), job, before

    def poll(self, handle: Any) -> int | None:
        task, job, _ = handle
        ended, _ = self.ray.wait([task], timeout=0)
        if not ended:
            return None
        try:
            return self.ray.get(task)
        except self.ray.exceptions.RayError as error:  # of the last attempt
            with log_of(job).open("a", encoding="utf-8") as log:
                log.write(f"error: {str(error).strip().splitlines()[-1]}\n")
            return 1

    def runs(self, handle: Any) -> bool:
        """A worker touches the log of its run when it begins."""
        _, job, before = handle
        return _touched(log_of(job)) != before

    def stop(self, handles: Iterable[Any]) -> None:
        tasks = [task for task, *_ in handles]
        for task in tasks:
            self.ray.cancel(task)
        if tasks:
            with suppress(KeyboardInterrupt):  # a second Ctrl-C does not wait for their end
                self.ray.wait(tasks, num_returns=len(tasks), timeout=STOP_S)


def _touched(log: Path) -> int | None:
    """When a log was last changed, in ns. None if it does not exist."""
    try:
        return log.stat().st_mtime_ns
    except OSError:
        return None


def _why(error: Exception) -> str:
    """Why a cluster was not joined. Ray finds a token by itself only if the address is `auto`."""
    if "token" in f"{error} {error.__cause__}".lower():
        return (
            "the Ray cluster there asks for its token; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH if the token "
            "is not in ~/.ray/auth_token"
        )
    return f"no Ray cluster answers there ({error})"
