"""A base model with a history of healed rounds over one adapter: which rounds act on it, folding, and checkpoints."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from steer_heal.errors import UserError, nearest
from steer_heal.inputs.files import ADAPTER_FILE, OWN_CONFIG_FILE, PEFT_CONFIG_FILE
from steer_heal.model.adapter import HISTORY, ROUND, Adapter, Factors, Lost
from steer_heal.model.bias import BlockBias
from steer_heal.model.lm import LM
from steer_heal.model.lora import Lora
from steer_heal.model.processor import copy_processor
from steer_heal.model.self_check import shares, short_logits
from steer_heal.settings import STRONGEST, AdapterCfg

UNREADABLE = (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, SafetensorError, re.error)
"""What libraries raise on a damaged folder."""
WHOLE_MODEL = re.compile(r"(model|pytorch_model)[^/]*\.(safetensors|bin)(\.index\.json)?|.*\.gguf")
"""Names of files that hold the weights of a model."""
ROUND_FILE = "round.safetensors"
AdapterState = Literal["base", "prev", "full"]
"""Which rounds act: none (bit-identical to the untouched model), 0..k-1, or 0..k."""
FOLDED = "folded"
CHECKED_ROWS, CHECKED_TOKENS = 4, 64
TRIED_SHIFT = 0.5
"""The most by which an adapter of random factors moves a token's final hidden state, as a share of its length."""
SAME_FORWARD = {torch.float32: 5e-5, torch.float16: 0.02, torch.bfloat16: 0.1}
"""Difference of a token's final hidden state that may be rounding, as a share of its length. The medians measured on
the families of docs/families.md, with small and with large factors, are at most 1.4e-6, 0.0044 and 0.042."""
AS_SAVED = {torch.float32: 5e-5, torch.float16: 0.005, torch.bfloat16: 0.02}
"""Difference of a token's logits, as a share of their length, that may be rounding where both readings of a saved
adapter keep its factors apart: they take the same steps."""
ADAPTERS: dict[str, type[Adapter]] = {each.kind: each for each in (Lora, BlockBias)}
"""Every kind of adapter by the name that `adapter.kind` takes."""


class Student:
    """A base model with the rounds healed into it so far. The base weights are never written to.

    Outside of `using` the adapter is off. Reading and writing text runs on merged factors (`using`), so that a token
    costs the same however many rounds are baked; so does training, unless merging would round the factors (`training`).
    """

    def __init__(self, lm: LM, cfg: AdapterCfg, adapter: Adapter | None = None) -> None:
        """`adapter` is one that holds a saved factor as its HISTORY; by default a new one of the kind in `cfg`."""
        if cfg.kind not in ADAPTERS:
            raise UserError(f"adapter.kind is {cfg.kind!r}: {nearest(cfg.kind, ADAPTERS)}")
        self.lm = lm
        self.cfg = cfg
        self.adapter = adapter or ADAPTERS[cfg.kind](lm, cfg)
        self.n_rounds = 0 if adapter is None else 1

    @property
    def rounds_in(self) -> dict[AdapterState, list[str]]:
        """Factors that act in each state."""
        history = [HISTORY] if self.n_rounds else []
        live = [ROUND] if self.is_open else []
        return {"base": [], "prev": history, "full": history + live}

    @property
    def is_open(self) -> bool:
        """Whether there is a factor of this round that is not baked."""
        return ROUND in self.adapter.names

    # --- what acts on the model ---------------------------------------------------------------------------
    @contextmanager
    def using(self, which: AdapterState, exact: bool = False) -> Iterator[LM]:
        """The model as base (bit-identical to the untouched weights), prev (rounds 0..k-1) or full (0..k).

        `exact` keeps factors apart where merging would round them: slower. On a quantized model they always act apart,
        since nothing can be added to its codes.
        """
        with self._acting(self.rounds_in[which], exact):
            yield self.lm

    def _acting(self, names: list[str], exact: bool = False) -> AbstractContextManager[None]:
        apart = self.adapter.merging_is_lossy and (exact or self.lm.quantized)
        return self.adapter.acting(merged=[] if apart else names, apart=names if apart else [])

    @contextmanager
    def training(self) -> Iterator[list[nn.Parameter]]:
        """History and this round's factor both act, forward and backward; yields what is trained.

        The history is merged where that is not lossy, so that a step costs the same after every round.
        """
        history = self.rounds_in["prev"]
        merged, apart = ([], history) if self.adapter.merging_is_lossy else (history, [])
        with self.adapter.acting(merged=merged, apart=[*apart, ROUND]):
            parameters = self.adapter.parameters()
            for parameter in parameters:
                assert parameter.dtype == torch.float32, "adapters train in float32: in bfloat16 small steps are lost"
                parameter.requires_grad_(True)
            try:
                yield parameters
            finally:
                for parameter in parameters:
                    parameter.requires_grad_(False)

    @torch.no_grad()
    def require_sound(self) -> None:
        """UserError if the model has nothing to adapt, or a new round would not act alike in all its states.

        A round of random factors is tried and dropped. It must be the first. The factors are made smaller until they
        move the final hidden states by at most TRIED_SHIFT of their length: a model that is thrown off further
        amplifies every rounding.
        """
        assert not self.adapter.names
        quantizer = getattr(self.lm.model, "hf_quantizer", None)
        if self.lm.quantized and not getattr(quantizer, "is_trainable", True):
            raise UserError(
                f"model {self.lm.name!r} is stored in a quantized format through which no gradient flows "
                f"({self.lm.model.quantization_method}); give the model as it was before, with --quantize nf4 if it "
                "does not fit into memory"
            )
        self.adapter.unadapted()
        row = self.lm.chat("Hello.")
        plain = self.lm.hidden([row])[0]
        try:
            self.new_round(0)
            generator = torch.Generator().manual_seed(0)
            with self.training() as parameters:
                for parameter in parameters:
                    random = torch.randn(parameter.shape, generator=generator)
                    parameter.data.copy_(random * max(parameter.shape) ** -0.5)
                for _ in range(20):
                    if shares(plain, self.lm.hidden([row])[0]).median() <= TRIED_SHIFT:
                        break
                    for parameter in parameters:
                        parameter.data.mul_(0.7)
            self.require_same_forward([row])
        finally:
            self.detach()

    @torch.no_grad()
    def require_same_forward(self, rows: Sequence[Sequence[int]]) -> None:
        """UserError unless the open round acts alike while it trains, while it is measured, and once it is folded.

        It reads the beginnings of a few `rows` of token ids three times. Per token, it takes the distance between the
        final hidden states as a share of their length; the median is compared with what rounding gives (SAME_FORWARD).
        """
        rows = [row[:CHECKED_TOKENS] for row in rows[:CHECKED_ROWS]]
        mask = self.lm.pad(rows)[1].bool()
        with self.training():
            trained = self.lm.hidden(rows)[mask]
        with self.using("full"):
            self._require_same("measured", trained, self.lm.hidden(rows)[mask])
        if not self.n_rounds:
            return  # the first round is the history as it is
        folded = self.adapter.fold(self.factors(HISTORY), self.factors(ROUND))
        self.adapter.attach(FOLDED, folded, self.n_rounds + 1)
        try:
            with self._acting([FOLDED]):
                self._require_same("folded", trained, self.lm.hidden(rows)[mask])
        finally:
            self.adapter.drop(FOLDED)

    def require_as_saved(self, folder: Path, base: Float[Tensor, "n v"]) -> None:
        """UserError unless a history that was opened acts as the library that wrote it lets it act, and the base gives
        the logits that it gave before the adapter was attached."""
        expected = self.adapter.logits_as_saved
        if expected is None:
            return
        where = f"the adapter in {str(folder)!r}"
        fix = "merge it into its model with the library that wrote it, and give the merged model as --model"
        if not torch.equal(short_logits(self.lm), base):
            raise UserError(f"{where} changes the weights of {self.lm.name!r} itself; {fix}")
        with self.using("full"):
            merged = shares(expected, short_logits(self.lm)).median().item()
        with self.adapter.acting(merged=[], apart=[HISTORY]):
            apart = shares(expected, short_logits(self.lm)).max().item()
        dtype = self.lm.head.weight.dtype
        for how, share, limit in (("merged", merged, SAME_FORWARD[dtype]), ("apart", apart, AS_SAVED[dtype])):
            if not share <= limit:
                raise UserError(
                    f"{where} acts otherwise here than where it was trained: with its factors {how}, the logits differ "
                    f"by {share:.2g} of their length, and rounding explains {limit:g}; {fix}"
                )

    def _require_same(self, how: str, trained: Float[Tensor, "n d"], other: Float[Tensor, "n d"]) -> None:
        share = shares(trained, other).median().item()
        limit = SAME_FORWARD[trained.dtype]
        if not share <= limit:
            raise UserError(
                f"adapter.kind {self.adapter.kind!r} is unsound on {self.lm.name!r}: the student does not act as it "
                f"was trained once it is {how}. Final hidden states differ by {share:.2g} of their length, and "
                f"rounding explains {limit:g}; use another --adapter.kind",
                resumable=False,
            )

    @contextmanager
    def scaled(self, scale: float) -> Iterator[None]:
        """Inside the context, every round that acts adds `scale` times as much: 1 as it was trained, 0 nothing, -1 the
        reverse. UserError unless -STRONGEST <= scale <= STRONGEST."""
        if not -STRONGEST <= scale <= STRONGEST:
            raise UserError(
                f"adapter_scale is {scale:g}: it must be from -{STRONGEST} to {STRONGEST}; choose a factor in it"
            )
        weights = [weight for name in self.adapter.names for weight in self.adapter.outputs(name)]
        before = [weight.data for weight in weights]
        for weight in weights:
            weight.data = scale * weight.data
        try:
            yield
        finally:
            for weight, value in zip(weights, before, strict=True):
                weight.data = value

    @contextmanager
    def of_rank(self, rank: int) -> Iterator[Lost]:
        """Inside the context, the baked rounds are the closest adapter of this rank; yields what that loses. UserError
        unless 1 <= rank < rank of the rounds together, and for a kind without matrices."""
        history, n_rounds, cfg = self.history(), self.n_rounds, self.cfg
        if not 1 <= rank < cfg.rank * n_rounds:
            raise UserError(f"rank is {rank}: the adapter has rank {cfg.rank * n_rounds}; give a smaller one, from 1")
        reduced, lost = self.adapter.reduced(history, rank)
        self.cfg = self.adapter.cfg = replace(cfg, rank=rank, alpha=float(rank))
        try:
            self._replace_history(reduced, 1)
            yield lost
        finally:
            self.cfg = self.adapter.cfg = cfg
            self._replace_history(history, n_rounds)

    # --- rounds ------------------------------------------------------------------------------------------------
    def new_round(self, seed: int) -> None:
        """A fresh factor for this round, from `seed` alone. The student starts where it was."""
        self.adapter.fresh(seed)

    def factors(self, name: str) -> Factors:
        """A copy of a factor's weights on the CPU."""
        return self.adapter.factors(name)

    def bake(self) -> Factors:
        """Folds this round into the history without rounding; returns the round's own factor."""
        own = self.factors(ROUND)
        folded = self.adapter.fold(self.factors(HISTORY), own) if self.n_rounds else own
        self._replace_history(folded, self.n_rounds + 1)
        return own

    def discard_round(self) -> None:
        """Drops this round's factor as if it had never been trained."""
        if self.is_open:
            self.adapter.drop(ROUND)

    def reset(self) -> None:
        """Drops every round: the untouched model again."""
        for name in list(self.adapter.names):
            self.adapter.drop(name)
        self.n_rounds = 0

    def detach(self) -> None:
        """Drops every round and takes the adapter out of the model again."""
        self.adapter.detach()
        self.n_rounds = 0

    def history(self) -> Factors:
        """A copy of every round that is baked; empty before the first."""
        return self.factors(HISTORY) if self.n_rounds else {}

    def take(self, history: Factors, n_rounds: int) -> None:
        """Puts back what `history` gave after `n_rounds` rounds."""
        if n_rounds:
            self._replace_history(history, n_rounds)
        else:
            self.reset()

    def _replace_history(self, factors: Factors, n_rounds: int) -> None:
        self.reset()
        self.adapter.attach(HISTORY, factors, n_rounds)
        self.n_rounds = n_rounds

    # --- files ---------------------------------------------------------------------------------------------------
    def save(self, folder: Path, own: Factors) -> None:
        """Writes the cumulative student in the files of its kind, and this round's own factor in ROUND_FILE."""
        self.adapter.save(folder, self.n_rounds)
        save_file(own, folder / ROUND_FILE, metadata={"format": "pt"})

    def restore(self, folder: Path, n_rounds: int) -> None:
        """Takes a checkpoint of this project, of `n_rounds` rounds, as the history."""
        self._replace_history(load_file(folder / ADAPTER_FILE), n_rounds)

    def restore_round(self, folder: Path) -> None:
        """Takes the factor of a checkpoint's own round as the open one, on the history of the rounds before it: `prev`
        is then the student that it was steered from, `full` the healed one, up to a rounding."""
        self.adapter.attach(ROUND, load_file(folder / ROUND_FILE), 1)

    def merged_state(self) -> dict[str, Tensor]:
        """The state dict of the plain model with the baked rounds in its weights. UserError for a kind of adapter that
        cannot be merged, and for a quantized model."""
        if self.lm.quantized:
            raise UserError(
                "a quantized model cannot be merged; take its adapter (--format peft), and merge it into the "
                "unquantized model"
            )
        with self.using("full"):
            return self.adapter.merged_state()

    def export(self, folder: Path) -> None:
        """The merged student as a plain transformers model, with its tokenizer, its processor's files and its own
        generation config. Errors as of `merged_state`."""
        state = self.merged_state()
        sampled_with = self.lm.model.generation_config
        self.lm.model.generation_config = self.lm.own_generation or sampled_with
        try:
            self.lm.model.save_pretrained(folder, state_dict=state)
        finally:
            self.lm.model.generation_config = sampled_with
        self.lm.tokenizer.save_pretrained(folder)
        copy_processor(self.lm, folder)


def attach_saved(lm: LM, folder: Path) -> Student:
    """A student holding a saved adapter, a checkpoint of ours or a plain LoRA folder of this model, as its history.

    It is to be read, not trained on. UserError if the folder cannot be read, or holds an adapter that could not be
    measured as it was trained.
    """
    if whole := next((path.name for path in sorted(folder.glob("*")) if WHOLE_MODEL.fullmatch(path.name)), None):
        raise UserError(
            f"the adapter in {str(folder)!r} lies beside {whole}, the weights of a whole model that may contain it "
            "already; give a folder that holds the adapter alone"
        )
    base = short_logits(lm)
    try:
        adapter = saved_kind(folder).open(lm, folder)
        student = Student(lm, adapter.cfg, adapter)
        try:
            _require_finite(student, folder)
            student.require_as_saved(folder, base)
        except BaseException:
            student.detach()
            raise
    except UNREADABLE as error:
        raise UserError(
            f"the adapter in {str(folder)!r} cannot be read ({error}); give a checkpoint, or a PEFT LoRA folder of "
            "this model"
        ) from None
    return student


def merge_saved(lm: LM, folder: Path) -> None:
    """Adds a saved adapter to the weights of its model for good. UserError: see `attach_saved` and `merged_state`."""
    student = attach_saved(lm, folder)
    try:
        if lm.quantized:
            raise UserError(
                f"the adapter in {str(folder)!r} cannot be added to quantized weights; leave out --quantize or, if its "
                "base model is itself quantized, name the model as it was before in base_model_name_or_path of its "
                "adapter_config.json"
            )
        with student.using("full"):
            merged = {key: value.clone() for key, value in student.adapter.merged_state().items()}
    finally:
        student.detach()
    lm.model.load_state_dict(merged)
    of = f" ({lm.weights_note})" if lm.weights_note else ""
    lm.weights_note = f"weights of {Path(lm.base).name}{of} with the adapter {folder.name} added"


def _require_finite(student: Student, folder: Path) -> None:
    damaged = [key for key, value in student.history().items() if not value.isfinite().all()]
    if damaged:
        raise UserError(
            f"the adapter in {str(folder)!r} is damaged: {damaged[0]} holds numbers that are not finite; give another "
            "copy of it"
        )


def saved_kind(folder: Path) -> type[Adapter]:
    """The kind of adapter that a folder holds. OSError without a settings file, ValueError if it is not JSON."""
    if not (folder / OWN_CONFIG_FILE).exists():
        (folder / PEFT_CONFIG_FILE).stat()
        return Lora
    kind = json.loads((folder / OWN_CONFIG_FILE).read_text(encoding="utf-8"))["kind"]
    if kind not in ADAPTERS:
        raise UserError(f"the adapter in {str(folder)!r} is of kind {kind!r}: {nearest(kind, ADAPTERS)}")
    return ADAPTERS[kind]
