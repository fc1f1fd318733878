"""What every kind of adapter must do. A new kind is a module, and a line in `ADAPTERS` of student.py.

A kind holds up to two factors on one model, each under its name: HISTORY, the rounds that are baked, and ROUND, the
round in training. It never writes to the base weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn

from steer_heal.errors import UserError
from steer_heal.model.lm import LM
from steer_heal.settings import AdapterCfg

HISTORY, ROUND = "history", "round"
Factors = dict[str, Tensor]
"""The weights of one factor by name, in float32 on the CPU. The names are those in the kind's files."""


@dataclass(frozen=True)
class Lost:
    """What a smaller rank loses, as a share of the squared Frobenius norm of the updates: 0 nothing, 1 all."""

    share: float
    """Over all matrices."""
    most: float
    """Of the matrix that loses most."""
    where: str
    """The name of that matrix."""


class Adapter(ABC):
    """One kind of adapter on one model. All factors are off unless `acting` turns them on."""

    kind: ClassVar[str]
    """Its name in `adapter.kind`."""
    title: ClassVar[str]
    """A few words for cards and pages."""
    updates_weights: ClassVar[bool] = False
    """Whether a factor is an update of weight matrices: then `updates`, `reduced` and `merged_state` work."""

    def __init__(self, lm: LM, cfg: AdapterCfg) -> None:
        self.lm = lm
        self.cfg = cfg
        self.logits_as_saved: Tensor | None = None
        """`short_logits` of an adapter that was opened, as the library that wrote it lets it act. None for a kind that
        no other library writes."""

    @classmethod
    @abstractmethod
    def open(cls, lm: LM, folder: Path) -> Adapter:
        """An adapter with the factor of a saved folder as its HISTORY. UserError if the kind cannot act as saved."""

    @property
    @abstractmethod
    def names(self) -> Collection[str]:
        """Names of the factors that are attached."""

    @property
    def merging_is_lossy(self) -> bool:
        """Whether a factor that acts merged is rounded more than one that acts apart."""
        return False

    def unadapted(self) -> tuple[str, ...]:
        """Weights of two or more axes that the kind leaves out although it adapts their like, by their name within a
        block. UserError if the model has nothing to adapt."""
        self.lm.band("adapter.layers", self.cfg.layers)
        return ()

    @abstractmethod
    def describe(self) -> str:
        """What this adapter is, as a noun phrase with its settings."""

    # --- factors -----------------------------------------------------------------------------------------------
    @abstractmethod
    def fresh(self, seed: int) -> None:
        """Attaches a new ROUND that leaves the model as it is. Random numbers come from `seed` alone."""

    @abstractmethod
    def attach(self, name: str, factors: Factors, n_rounds: int) -> None:
        """Attaches a factor that holds `n_rounds` rounds. UserError if it does not fit the model."""

    @abstractmethod
    def drop(self, name: str) -> None:
        """Removes an attached factor."""

    @abstractmethod
    def detach(self) -> None:
        """Removes every factor and leaves the model as it was before the first one."""

    @abstractmethod
    def factors(self, name: str) -> Factors:
        """A copy of an attached factor."""

    @abstractmethod
    def fold(self, history: Factors, own: Factors) -> Factors:
        """One factor that acts as both together. Folding does not round."""

    @abstractmethod
    def parameters(self) -> list[nn.Parameter]:
        """What is trained of ROUND, in float32, always in the same order."""

    @abstractmethod
    def outputs(self, name: str) -> list[nn.Parameter]:
        """The weights of an attached factor to which what it adds is proportional. Its other weights stay when these
        are scaled."""

    @abstractmethod
    def acting(self, merged: Sequence[str], apart: Sequence[str]) -> AbstractContextManager[None]:
        """While inside, exactly these factors act on the model. What acted before acts again afterwards.

        Those in `apart` pass gradients on and keep their precision. Those in `merged` cost a token the least.
        """

    # --- files ---------------------------------------------------------------------------------------------------
    @abstractmethod
    def save(self, folder: Path, n_rounds: int) -> None:
        """Writes HISTORY, which holds `n_rounds` rounds: ADAPTER_FILE and, as JSON, OWN_CONFIG_FILE with the `kind`."""

    # --- for kinds with `updates_weights` ----------------------------------------------------------------------------
    def updates(self) -> list[tuple[Tensor, Tensor, float]]:
        """(A, B, scale) of every matrix that ROUND adapts: it adds scale * B A to it."""
        raise UserError(
            f"heal.spectral needs weight matrices, and adapter.kind {self.kind!r} adapts none; give --heal.spectral 0"
        )

    def reduced(self, history: Factors, rank: int) -> tuple[Factors, Lost]:
        """(factors of this rank with scale 1, what is lost): for each matrix the closest update of that rank."""
        raise UserError(f"rank is {rank}: adapter.kind {self.kind!r} adapts no matrices, so it has none; leave it out")

    def merged_state(self) -> dict[str, Tensor]:
        """The state dict of the plain model with the factors that are now merged into its weights."""
        if self.names:
            raise UserError(
                f"adapter.kind {self.kind!r} cannot be merged into the weights of {self.lm.name!r}, so the student "
                "cannot be exported; share a checkpoint in its place",
                resumable=False,
            )
        return self.lm.model.state_dict()

    def require_fit(self, given: Factors, expected: Factors) -> None:
        """UserError naming the first weight whose shape is not that of the `expected` factor."""
        shapes = {key: list(value.shape) for key, value in given.items()}
        wanted = {key: list(value.shape) for key, value in expected.items()}
        if shapes == wanted:
            return
        key = next(key for key in sorted(shapes | wanted) if shapes.get(key) != wanted.get(key))
        raise UserError(
            f"the adapter does not fit {self.lm.name!r}: {key} is {shapes.get(key, 'no such weight')} in the file, "
            f"{wanted.get(key, 'no such weight')} in the model; give an adapter of this model"
        )
