"""A bias per block: a trained vector [d] is added to the residual stream after each adapted block.

Like BitFit (Ben Zaken et al. 2022), which trains a model's own bias terms, but for models that have none.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from steer_heal.errors import UserError, validated_json
from steer_heal.inputs.files import ADAPTER_FILE, OWN_CONFIG_FILE
from steer_heal.model.adapter import HISTORY, ROUND, Adapter, Factors
from steer_heal.model.lm import LM
from steer_heal.settings import AdapterCfg


@dataclass(frozen=True)
class SavedBias:
    """The JSON file beside the vectors."""

    kind: str
    base_model: str
    """What the vectors were trained on, as `LM.base` names it."""
    blocks: tuple[int, ...]
    """Blocks that have a vector, counted from 0. Its tensor is called `blocks.<block>.bias`."""


class BlockBias(Adapter):
    """A vector [d] in float32 per adapted block. It is added in float32, and the sum takes the dtype of the stream."""

    kind = "bias"
    title = "bias adapter"

    def __init__(self, lm: LM, cfg: AdapterCfg) -> None:
        super().__init__(lm, cfg)
        self._vectors: dict[str, dict[int, nn.Parameter]] = {}
        """By name of the factor, then by block."""
        self._acting: tuple[str, ...] = ()
        self._hooks: list[Any] = []

    @classmethod
    def open(cls, lm: LM, folder: Path) -> BlockBias:
        path = folder / OWN_CONFIG_FILE
        saved = validated_json(SavedBias, path.read_bytes(), str(path))
        adapter = cls(lm, AdapterCfg(kind=cls.kind))
        beyond = [block for block in saved.blocks if not 0 <= block < len(lm.blocks)]
        if beyond:
            raise UserError(
                f"{path} has a vector for block {beyond[0]}, and {lm.name!r} has {len(lm.blocks)} blocks; give an "
                "adapter of this model"
            )
        adapter._attach(HISTORY, load_file(folder / ADAPTER_FILE), saved.blocks)
        return adapter

    @property
    def names(self) -> Collection[str]:
        return self._vectors

    def describe(self) -> str:
        opened = self._vectors.get(HISTORY)
        blocks = sorted(opened) if opened else self.lm.band("adapter.layers", self.cfg.layers)
        return f"a {self.title}, one vector of width {self.lm.width} after each of blocks {blocks[0]} to {blocks[-1]}"

    # --- factors -----------------------------------------------------------------------------------------------
    def fresh(self, seed: int) -> None:
        """Zeros: nothing is drawn."""
        blocks = self.lm.band("adapter.layers", self.cfg.layers)
        self._attach(ROUND, {_key(block): torch.zeros(self.lm.width) for block in blocks}, blocks)

    def attach(self, name: str, factors: Factors, n_rounds: int) -> None:
        self._attach(name, factors, self.lm.band("adapter.layers", self.cfg.layers))

    def _attach(self, name: str, factors: Factors, blocks: Sequence[int]) -> None:
        self.require_fit(factors, {_key(block): torch.empty(self.lm.width) for block in blocks})
        here = {block: factors[_key(block)].to(self.lm.device, torch.float32, copy=True) for block in blocks}
        self._vectors[name] = {block: nn.Parameter(value, requires_grad=False) for block, value in here.items()}
        if not self._hooks:  # before any hook that steers or reads, so that those see the stream with the bias
            self._hooks = [self.lm.after_block(i, partial(self._biased, i)) for i in range(len(self.lm.blocks))]

    def drop(self, name: str) -> None:
        del self._vectors[name]

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._vectors = {}
        self._hooks = []

    def factors(self, name: str) -> Factors:
        return {_key(block): value.detach().cpu().clone() for block, value in self._vectors[name].items()}

    def fold(self, history: Factors, own: Factors) -> Factors:
        """The sum, which is also what is added to the stream while both factors act."""
        return {key: value + own[key] for key, value in history.items()}

    def parameters(self) -> list[nn.Parameter]:
        return list(self._vectors[ROUND].values())

    def outputs(self, name: str) -> list[nn.Parameter]:
        return list(self._vectors[name].values())

    # --- what acts on the model ------------------------------------------------------------------------------------
    @contextmanager
    def acting(self, merged: Sequence[str], apart: Sequence[str]) -> Iterator[None]:
        """A vector acts in one way, merged or apart."""
        before = self._acting
        self._acting = (*merged, *apart)
        try:
            yield
        finally:
            self._acting = before

    def _biased(self, block: int, hidden: Tensor) -> Tensor | None:
        acting = [self._vectors[name] for name in self._acting]
        vectors = [each[block] for each in acting if block in each]
        return (hidden.float() + sum(vectors)).to(hidden.dtype) if vectors else None

    # --- files ---------------------------------------------------------------------------------------------------
    def save(self, folder: Path, n_rounds: int) -> None:
        """Writes SavedBias as JSON, and the vectors. PEFT finds no adapter in this folder."""
        folder.mkdir(parents=True, exist_ok=True)
        saved = SavedBias(self.kind, self.lm.base, tuple(self._vectors[HISTORY]))
        (folder / OWN_CONFIG_FILE).write_text(
            json.dumps(asdict(saved), indent=2) + "\n", encoding="utf-8", newline="\n"
        )
        save_file(self.factors(HISTORY), folder / ADAPTER_FILE, metadata={"kind": self.kind})


def _key(block: int) -> str:
    return f"blocks.{block}.bias"
