"""Optional trackers, which receive the curves during a run and its pictures at the end.

The step of a value is the number of optimiser steps that the run had done. This module does not import any tracker.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Protocol

from steer_heal.errors import UserError, nearest

PROJECT = "steer-heal"
Event = Mapping[str, Any]


class Tracker(Protocol):
    """A run in one tracker. It has the name of the run's folder. A resumed run continues its earlier curves."""

    package: ClassVar[str] = ""
    """The name of the package, and of the extra that installs it."""

    def __init__(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        """`step` is the step at which the run is resumed. Values that the tracker has of later steps are replaced."""
        ...

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def picture(self, path: Path, step: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the subfolder `tensorboard` of the run."""

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


class Trackio:
    """A local database, which `trackio show` displays."""

    package: ClassVar[str] = "trackio"

    def __init__(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        self.trackio: Any = import_module(self.package)
        quiet = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
        self.run = self.trackio.init(project=PROJECT, name=folder.name, config=dict(config), resume="allow", **quiet)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def picture(self, path: Path, step: int) -> None:
        self.run.log({path.stem: self.trackio.Image(str(path))}, step=step)

    def close(self) -> None:
        self.trackio.finish()


class Wandb:
    """Weights & Biases. With WANDB_MODE=offline everything stays in the subfolder `wandb` of the run."""

    package: ClassVar[str] = "wandb"

    def __init__(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        self.wandb: Any = import_module(self.package)
        own = {"project": PROJECT, "id": folder.name, "name": folder.name, "dir": str(folder)}
        self.run = self.wandb.init(config=dict(config), resume="allow", **own)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def picture(self, path: Path, step: int) -> None:
        self.run.log({path.stem: self.wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        self.run.finish()


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "trackio": Trackio, "wandb": Wandb}


def check(names: Sequence[str]) -> None:
    """UserError for the first unknown tracker, or the first whose package is not installed."""
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"track is {name!r}: {nearest(name, TRACKERS)}")
        if not find_spec(package := TRACKERS[name].package):
            raise UserError(
                f"track is {name!r}: its package is not installed; pip install 'steer-heal[{package}]', or leave it out"
            )


class Tracking:
    """The trackers of a run. If a tracker fails, there is a warning and the run continues without it."""

    def __init__(self, names: Sequence[str], folder: Path, config: Mapping[str, Any], past: Sequence[Event]) -> None:
        """`past` are the earlier events of a resumed run."""
        self.step = sum(event["stage"] == "heal_step" for event in past)
        self.running: dict[str, Tracker] = {}
        for name in dict.fromkeys(names):
            with self._noted(name):
                self.running[name] = TRACKERS[name](folder, config, self.step)

    def see(self, event: Event) -> None:
        """Logs the numbers of an event."""
        self.step += event["stage"] == "heal_step"
        values = scalars(event)
        for name, tracker in list(self.running.items()) if values else []:
            with self._noted(name):
                tracker.log(values, self.step)

    def pictures(self, paths: Sequence[Path]) -> None:
        """Logs the pictures that exist."""
        drawn = [path for path in paths if path.exists()]
        for name, tracker in list(self.running.items()):
            with self._noted(name):
                for path in drawn:
                    tracker.picture(path, self.step)

    def close(self) -> None:
        for name, tracker in list(self.running.items()):
            with self._noted(name):
                tracker.close()

    @contextmanager
    def _noted(self, name: str) -> Iterator[None]:
        """Removes a tracker that fails, with a warning."""
        try:
            yield
        except Exception as error:  # network, login, disk or version: the run has nothing to do with it
            self.running.pop(name, None)
            warnings.warn(
                f"{name} failed; the run continues without it ({type(error).__name__}: {error})", stacklevel=3
            )


def scalars(event: Event) -> dict[str, float]:
    """The numbers of an event that are drawn as curves, by `<stage>/<name>`. Empty if it has none."""
    stage = event["stage"]
    r = event["round"]
    if stage == "heal_step":
        found = {name: event[name] for name in ("fit", "divergence", "barrier", "pressure", "lr")}
        stage = "heal" if r >= 0 else "control_heal"
    elif "items" in event:  # a measured state
        found = {name: value for name, value in event["metrics"].items() if not name.endswith(("_lo", "_hi"))}
    elif stage == "round":
        found = {name: event[name] for name in ("retain", "slope", "cosine_student_teacher", "cosine_student_first")}
    else:
        return {}
    known = {f"{stage}/{name}": float(value) for name, value in found.items() if value is not None}
    if r >= 0:
        known["round"] = float(r)
    return known
