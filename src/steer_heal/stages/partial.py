"""What an unfinished stage has done so far, on disk, so that a run that was killed goes on instead of starting it again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from steer_heal.files import append_line, beside
from steer_heal.records import HealStep, UserError

Batch = list[tuple[int, ...]]


class TokenTape:
    """Decoded batches, one JSON line each, in the order in which the stage decodes them.

    A stage that starts again asks for the same rows in the same order: what is on the tape is handed out, then decoding
    goes on and is recorded. A batch is decoded whole or not at all, so its texts are what they would have been; how many rows
    it has is its own affair, so memory and batch size may have changed between.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b", buffering=0)
        self._file.seek(0)
        self._recorded: list[Batch] = []
        whole = 0
        for line in self._file.readall().splitlines(keepends=True):
            try:
                self._recorded.append([tuple(ids) for ids in json.loads(line)])
            except ValueError:
                break
            whole += len(line)
        self._file.truncate(whole)
        self._recorded.reverse()

    def __call__(self, decode: Callable[[], Batch]) -> Batch:
        if self._recorded:
            return self._recorded.pop()
        batch = decode()
        append_line(self._file, batch)
        return batch

    def close(self) -> None:
        self._file.close()


class HealFile:
    """A heal between two steps: the round's factors, AdamW's state, the spectral directions, and the curves so far."""

    def __init__(self, path: Path, every_s: float) -> None:
        self.path, self.every_s, self._saved = path, every_s, time.monotonic()

    def load(
        self, parameters: Sequence[Tensor], optimiser: torch.optim.Optimizer, directions: Sequence[Tensor]
    ) -> tuple[list[HealStep], list[dict[str, float]]]:
        """Puts the tensors back where they were; (steps, validation curve), empty where nothing was saved."""
        if not self.path.exists():
            return [], []
        try:
            with torch.no_grad(), safe_open(self.path, "pt") as file:
                for name in file.keys():
                    kind, i = name.split(".")
                    if kind == "factor":
                        parameters[int(i)].copy_(file.get_tensor(name))
                    elif kind == "direction":
                        directions[int(i)].copy_(file.get_tensor(name))
                    else:  # cloned: a tensor in the mapped file need not be aligned as one that torch allocated
                        where = "cpu" if kind == "step" else parameters[int(i)].device
                        optimiser.state[parameters[int(i)]][kind] = file.get_tensor(name).clone().to(where)
                words = file.metadata()
        except SafetensorError as error:
            raise damaged(self.path, error) from None
        return [HealStep(**step) for step in json.loads(words["steps"])], json.loads(words["curve"])

    def save(
        self, parameters: Sequence[Tensor], optimiser: torch.optim.Optimizer, directions: Sequence[Tensor], steps: Sequence[HealStep],
        curve: Sequence[dict[str, float]],
    ) -> None:
        """Where `every_s` seconds have passed since the last time."""
        if time.monotonic() - self._saved < self.every_s:
            return
        tensors = {f"factor.{i}": p.detach() for i, p in enumerate(parameters)} | {f"direction.{i}": d for i, d in enumerate(directions)}
        for i, parameter in enumerate(parameters):
            tensors |= {f"{kind}.{i}": value for kind, value in optimiser.state.get(parameter, {}).items()}
        with beside(self.path) as part:
            words = {"n_steps": str(len(steps)), "steps": json.dumps([asdict(step) for step in steps]), "curve": json.dumps(list(curve))}
            save_file({name: value.contiguous() for name, value in tensors.items()}, part, metadata=words)
        self._saved = time.monotonic()


def steps_saved(path: Path) -> int:
    """Optimiser steps that a HealFile holds; 0 where there is none."""
    if not path.exists():
        return 0
    try:
        with safe_open(path, "pt") as file:
            return int(file.metadata()["n_steps"])
    except SafetensorError as error:
        raise damaged(path, error) from None


def damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is damaged ({error}); delete it: the heal then starts again at its first step")
