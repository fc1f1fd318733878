"""tasks.json beside a run: what standard tasks read of the base and of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from steer_heal.errors import validated_json
from steer_heal.runs.storage import atomic_write

TASKS = "tasks.json"


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One metric of one task, with standard errors. None: lm-evaluation-harness gives none."""

    task: str
    metric: str
    n: int
    """Items that were read."""
    base: float
    base_stderr: float | None
    healed: float
    healed_stderr: float | None
    change_stderr: float | None
    """Standard error of healed - base, paired by item."""
    higher_is_better: bool | None

    @property
    def change(self) -> float:
        return self.healed - self.base

    @property
    def cost(self) -> float | None:
        """How much worse the healed model is; below 0 it is better. None: the task does not say which way is better."""
        return None if self.higher_is_better is None else (-1 if self.higher_is_better else 1) * self.change


def read_readings(run: Path) -> dict[str, list[Reading]]:
    """By checkpoint, as in `ckpt/r3`. Empty where no task was read. UserError where the file is damaged."""
    path = run / TASKS
    return validated_json(dict[str, list[Reading]], path.read_bytes(), str(path)) if path.is_file() else {}


def add_readings(run: Path, checkpoint: str, found: Sequence[Reading]) -> None:
    """Adds readings of a checkpoint to the file. A task that was read again replaces what was there of it."""
    known = read_readings(run)
    again = {reading.task for reading in found}
    known[checkpoint] = [*(old for old in known.get(checkpoint, []) if old.task not in again), *found]
    with atomic_write(run / TASKS) as part:
        rows = {name: [asdict(reading) for reading in readings] for name, readings in known.items()}
        part.write_text(json.dumps(rows, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def with_stderr(value: float, stderr: float | None, form: str = ".4f") -> str:
    """A value and its standard error, where there is one."""
    return format(value, form) + ("" if stderr is None else f" \u00b1 {stderr:.4f}")
