"""Optional trackers: they get the curves of a run while it is running, and its pictures at the end.

The step of a value is the number of optimiser steps that the run had taken. Importing this module imports no tracker.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from steer_heal.errors import UserError, nearest
from steer_heal.events import AnyEvent, HealStepped, Measured, RoundDone, Run
from steer_heal.records import Values
from steer_heal.settings import as_json

PROJECT = "steer-heal"


@runtime_checkable
class Tracker(Protocol):
    """One run in a tracker, named like the run's folder. It continues what was tracked of that folder before."""

    package: ClassVar[str] = ""
    """Name of its package, and of the extra that installs it."""

    def __init__(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        """Values of later steps than `step` that the tracker already has are void: the run was stopped and resumed."""
        ...

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def picture(self, path: Path, step: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the folder `tensorboard` of the run's folder."""

    package: ClassVar[str] = "tensorboard"

    def __init__(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1, flush_secs=10)
        self.writer.add_text("config", f"```\n{json.dumps(config, indent=1)}\n```", step)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, path: Path, step: int) -> None:
        from matplotlib.image import imread

        self.writer.add_image(path.stem, imread(path), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class _Service:
    """A package with the interface of wandb."""

    package: ClassVar[str]

    def __init__(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        self.module: Any = import_module(self.package)
        about = {"project": PROJECT, "name": folder.name, "config": dict(config), "resume": "allow"}
        self.run = self.module.init(**about, **self.options(folder))

    def options(self, folder: Path) -> dict[str, Any]:
        """What the package is also told when the run begins. By default nothing."""
        return {}

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def picture(self, path: Path, step: int) -> None:
        self.run.log({path.stem: self.module.Image(str(path))}, step=step)

    def close(self) -> None:
        self.module.finish()


class Trackio(_Service):
    """A local database that `trackio show` displays."""

    package: ClassVar[str] = "trackio"

    def options(self, folder: Path) -> dict[str, Any]:
        return {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}


class Wandb(_Service):
    """Weights & Biases. With WANDB_MODE=offline everything stays in the folder `wandb` of the run's folder."""

    package: ClassVar[str] = "wandb"

    def options(self, folder: Path) -> dict[str, Any]:
        return {"id": folder.name, "dir": str(folder)}


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "trackio": Trackio, "wandb": Wandb}


def check(names: Sequence[str]) -> None:
    """UserError for the first name that is not a tracker's, or whose package is not installed."""
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"track is {name!r}, which is not a tracker; {nearest(name, TRACKERS)}")
        if not find_spec(package := TRACKERS[name].package):
            raise UserError(
                f"track is {name!r}: its package is not installed; pip install 'steer-heal[{package}]', or leave it out"
            )


class Tracking:
    """The trackers of a run. If a tracker fails, the run continues without it, after a warning."""

    def __init__(self, names: Sequence[str], run: Run, folder: Path) -> None:
        """Starts the trackers, or continues them where the run was stopped."""
        self.run = run
        self.running: dict[str, Tracker] = {}
        for name in dict.fromkeys(names):
            with self._optional(name):
                self.running[name] = TRACKERS[name](folder, as_json(run.start.config), run.n_steps)

    def see(self, event: AnyEvent) -> None:
        """Logs the numbers of an event that the run has just recorded."""
        values = scalars(event)
        if values:
            self._each(lambda tracker: tracker.log(values, self.run.n_steps))

    def pictures(self, paths: Sequence[Path]) -> None:
        """Logs each picture whose file exists."""
        for path in filter(Path.exists, paths):
            self._each(lambda tracker, path=path: tracker.picture(path, self.run.n_steps))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())

    def _each(self, do: Callable[[Tracker], object]) -> None:
        for name, tracker in list(self.running.items()):
            with self._optional(name):
                do(tracker)

    @contextmanager
    def _optional(self, name: str) -> Iterator[None]:
        """If the tracker fails inside, it is dropped."""
        try:
            yield
        except Exception as error:  # of the network, a login, the disk, a version
            self.running.pop(name, None)
            warnings.warn(
                f"{name} failed; the run continues without it ({type(error).__name__}: {error})", stacklevel=2
            )


def scalars(event: AnyEvent) -> dict[str, float]:
    """The numbers of an event that make curves, named `<state or stage>/<name>`. Empty for an event without any."""
    found: Values
    if isinstance(event, HealStepped):
        stage = "control_heal" if event.round is None else "heal"
        found = {name: getattr(event.step, name) for name in ("fit", "divergence", "barrier", "pressure", "lr")}
    elif isinstance(event, Measured):
        stage = event.state
        found = {name: value for name, value in event.metrics.items() if not name.endswith(("_lo", "_hi"))}
    elif isinstance(event, RoundDone):
        stage = "round"
        names = ("retain", "slope", "cosine_student_teacher", "cosine_student_first")
        found = {name: getattr(event, name) for name in names}
    else:
        return {}
    known = {f"{stage}/{name}": value for name, value in found.items() if value is not None and isfinite(value)}
    if event.round is not None:
        known["round"] = float(event.round)
    return known
