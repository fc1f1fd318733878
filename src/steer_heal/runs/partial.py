"""What an unfinished stage has done so far, on disk: written completions, and a heal between two steps.

Files of `partial/` in the folder of a run. Once the event of the stage is written, its file is removed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from steer_heal.errors import UserError
from steer_heal.records import Completion, HealStep, round_label
from steer_heal.runs.storage import append_line, atomic_write

if TYPE_CHECKING:
    from steer_heal.stages.heal import SavedHeal


PARTIAL = "partial"


def texts_path(folder: Path, r: int | None) -> Path:
    """Where the completions of a round, or of the control, are kept."""
    return folder / PARTIAL / f"texts-{round_label(r)}.jsonl"


def heal_path(folder: Path, r: int | None) -> Path:
    """Where the heal of a round, or of the control, is kept."""
    return folder / PARTIAL / f"heal-{round_label(r)}.safetensors"


class WrittenTexts:
    """Token ids of finished completions by seed and dose of their request: one JSON line for each decoded batch.

    A text depends on its request alone, so a resumed run may decode the rest in other batches.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b", buffering=0)
        self._file.seek(0)
        self.known: dict[tuple[int, float], tuple[int, ...]] = {}
        whole = 0
        for line in self._file.readall().splitlines(keepends=True):
            try:
                self.known |= {(seed, dose): tuple(ids) for seed, dose, ids in json.loads(line)}
            except ValueError:  # torn: the run died while writing it
                break
            whole += len(line)
        self._file.truncate(whole)

    def add(self, batch: Sequence[Completion]) -> None:
        append_line(self._file, [(row.seed, row.dose, row.completion_ids) for row in batch])

    def close(self) -> None:
        self._file.close()


def save_heal(path: Path, heal: SavedHeal) -> None:
    from safetensors.torch import save_file  # torch: a folder without a run is refused without it

    words = {"steps": json.dumps([asdict(step) for step in heal.steps]), "curve": json.dumps(heal.curve)}
    with atomic_write(path) as part:
        save_file({name: value.contiguous() for name, value in heal.tensors.items()}, part, metadata=words)


def load_heal(path: Path) -> SavedHeal | None:
    """None where nothing was saved. UserError where the file is damaged."""
    from steer_heal.stages.heal import SavedHeal

    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            # cloned: a tensor in the mapped file need not be aligned as one that torch allocated
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            words = file.metadata()
    except SafetensorError as error:
        raise UserError(
            f"{path} is damaged ({error}); delete it: the heal then starts again at its first step"
        ) from None
    steps = tuple(HealStep(**step) for step in json.loads(words["steps"]))
    return SavedHeal(tensors, steps, tuple(json.loads(words["curve"])))


def saved_steps(path: Path) -> int:
    """Optimiser steps of a saved heal; 0 where there is none."""
    saved = load_heal(path)
    return 0 if saved is None else len(saved.steps)
