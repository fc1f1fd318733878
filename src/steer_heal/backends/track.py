"""Optional trackers as sinks of the event log: curves while a run goes on, its pictures at the end.

The step of a value is the number of optimiser steps that the run had taken. Importing this needs no tracker.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from steer_heal.errors import UserError, nearest

PROJECT = "steer-heal"
Event = Mapping[str, Any]


@runtime_checkable
class Tracker(Protocol):
    """One tracker's run. It has the name of the run's folder, and goes on where that was tracked before."""

    package: ClassVar[str] = ""
    """What it is imported by, and the name of its extra."""

    def __init__(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        """`step`: where a run goes on; values of later steps that a tracker already has are void."""
        ...

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def picture(self, path: Path, step: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the folder `tensorboard` of the run."""

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
    """A local database, which `trackio show` reads."""

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
    """Weights & Biases; WANDB_MODE=offline keeps everything in the folder `wandb` of the run."""

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
    """UserError for the first name that is no tracker, or whose package is not installed."""
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"track is {name!r}: {nearest(name, TRACKERS)}")
        if not find_spec(package := TRACKERS[name].package):
            raise UserError(
                f"track is {name!r}: its package is not installed; pip install 'steer-heal[{package}]', or leave it out"
            )


class Tracking:
    """The trackers of a run. One that fails is left out from then on, with a warning: it never stops the run."""

    def __init__(self, names: Sequence[str], folder: Path, config: Mapping[str, Any], past: Sequence[Event]) -> None:
        """`past`: events of a run that goes on."""
        self.step = sum(event["stage"] == "heal_step" for event in past)
        self.running: dict[str, Tracker] = {}
        for name in dict.fromkeys(names):
            self._try(name, lambda name=name: self.running.update({name: TRACKERS[name](folder, config, self.step)}))

    def see(self, event: Event) -> None:
        """Logs the numbers of an event."""
        self.step += event["stage"] == "heal_step"
        if values := scalars(event):
            self._all(lambda tracker: tracker.log(values, self.step))

    def pictures(self, paths: Sequence[Path]) -> None:
        """Logs those of the pictures that are there."""
        for path in paths:
            if path.exists():
                self._all(lambda tracker, path=path: tracker.picture(path, self.step))

    def close(self) -> None:
        self._all(lambda tracker: tracker.close())

    def _all(self, do: Callable[[Tracker], object]) -> None:
        for name, tracker in list(self.running.items()):
            self._try(name, lambda tracker=tracker: do(tracker))

    def _try(self, name: str, do: Callable[[], object]) -> None:
        try:
            do()
        except Exception as error:  # a network, a login, a disk, a version: nothing of it is the run's
            self.running.pop(name, None)
            warnings.warn(f"{name} failed and is left out from here on ({type(error).__name__}: {error})", stacklevel=2)


def scalars(event: Event) -> dict[str, float]:
    """The numbers of an event that make curves, by `<stage>/<name>`; none for events without any."""
    stage, r = event["stage"], event["round"]
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
    return known | ({"round": float(r)} if r >= 0 else {})
