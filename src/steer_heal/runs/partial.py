"""What an unfinished stage has done so far, on disk: written completions, and a heal between two steps.

Files of `partial/` in the folder of a run. Once the event of the stage is written, its file is removed. Each batch of
completions and each heal is stored with a checksum of its own, since no event names these files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from steer_heal.errors import UserError
from steer_heal.records import Completion, HealStep, round_label
from steer_heal.runs.storage import append_line, atomic_write

if TYPE_CHECKING:
    from torch import Tensor

    from steer_heal.stages.generate import Batch
    from steer_heal.stages.heal import SavedHeal


PARTIAL = "partial"
ASKED = "asked.jsonl"
"""What evals keep between measurements, by a hash: the replies of a judge, the texts of the classifier."""


def texts_path(folder: Path, r: int | None) -> Path:
    """Where the completions of a round, or of the control, are kept."""
    return folder / PARTIAL / f"texts-{round_label(r)}.jsonl"


def heal_path(folder: Path, r: int | None) -> Path:
    """Where the heal of a round, or of the control, is kept."""
    return folder / PARTIAL / f"heal-{round_label(r)}.safetensors"


class WrittenTexts:
    """Token ids of finished completions by seed and dose of their request: one JSON line for each decoded batch.

    A line that is torn or damaged is dropped with all that follow it, and those batches are decoded again.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b", buffering=0)
        self._file.seek(0)
        self.known: list[Batch] = []
        whole = 0
        for line in self._file.readall().split(b"\n")[:-1]:
            try:
                self.known.append(_batch(line))
            except (ValueError, TypeError, LookupError, RecursionError):
                break
            whole += len(line) + 1
        self._file.truncate(whole)

    def add(self, batch: Sequence[Completion]) -> None:
        rows = [(row.seed, row.dose, row.completion_ids) for row in batch]
        append_line(self._file, {"sha256": _sha256(rows), "batch": rows})

    def close(self) -> None:
        self._file.close()


class KeptAnswers(dict[str, Any]):
    """What evals keep between measurements, such as the replies of a judge. Each entry is a JSON line, which is on disk
    before the entry can be read. A line that is torn or damaged is left out."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._lock = Lock()
        content = path.read_bytes() if path.exists() else b""
        self._torn = not content.endswith(b"\n") and content != b""
        for line in content.split(b"\n"):
            with suppress(ValueError, TypeError, RecursionError):
                key, value = json.loads(line)
                super().__setitem__(key, value)

    def __setitem__(self, key: str, value: Any) -> None:
        with self._lock, self._path.open("ab", buffering=0) as file:
            if self._torn:
                file.write(b"\n")
            self._torn = False
            append_line(file, [key, value])
            super().__setitem__(key, value)


def _batch(line: bytes) -> Batch:
    """The batch of a line. Any of several errors where it is not as it was written."""
    value = json.loads(line)
    if _sha256(value["batch"]) != value["sha256"]:
        raise ValueError("the checksum is not that of the batch")
    return {(seed, dose): tuple(ids) for seed, dose, ids in value["batch"]}


def _sha256(value: Any, tensors: dict[str, Tensor] | None = None) -> str:
    """SHA-256 of a value made of JSON types, and of tensors with their names."""
    from torch import uint8  # a folder without a run is refused without torch

    digest = hashlib.sha256(json.dumps(value).encode())
    for name, tensor in sorted((tensors or {}).items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(uint8).numpy().tobytes())
    return digest.hexdigest()


def save_heal(path: Path, heal: SavedHeal) -> None:
    from safetensors.torch import save_file

    curves = {"steps": [asdict(step) for step in heal.steps], "curve": list(heal.curve)}
    words = {"curves": json.dumps(curves), "sha256": _sha256(curves, heal.tensors)}
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
            words = file.metadata() or {}
        curves = json.loads(words["curves"])
        if _sha256(curves, tensors) != words["sha256"]:
            raise ValueError("its checksum is not the recorded one")
        return SavedHeal(tensors, tuple(HealStep(**step) for step in curves["steps"]), tuple(curves["curve"]))
    except (SafetensorError, OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged ({error}); delete it: the heal then starts again at its first step"
        ) from None


def saved_steps(path: Path) -> int:
    """Optimiser steps of a saved heal; 0 where there is none. UserError where the file is damaged."""
    heal = load_heal(path)
    return 0 if heal is None else len(heal.steps)
