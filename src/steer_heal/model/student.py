"""Adapter history: which rounds act on the model, folding, and the checkpoints that PEFT loads."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer, ParamWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from steer_heal.errors import UserError
from steer_heal.inputs.files import ADAPTER_FILE
from steer_heal.model.lm import LM
from steer_heal.model.targets import targets
from steer_heal.settings import AdapterCfg

HISTORY, ROUND = "history", "round"
ROUND_FILE = "round.safetensors"
AdapterState = Literal["base", "prev", "full"]
"""Which rounds act: none (bit-identical to the untouched model), 0..k-1, or 0..k."""
Factors = dict[str, Tensor]
"""PEFT's own keys, `<module>.lora_A.weight` [r, d_in] and `<module>.lora_B.weight` [d_out, r], in float32. In a
stack of e experts the rows of A are ordered [e r], the columns of B [r e]."""


@contextmanager
def _peft_notices_off() -> Iterator[None]:
    """Leaves out what peft says of its own adapters, and a deprecation between it and transformers: no user can act on
    them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="peft")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield


class Student:
    """A base model with the rounds healed into it so far. The base weights are never written to.

    Outside of `using` the adapters are off. Reading and writing text runs on a merged working copy of the adapted
    weights (`using`), so that a token costs the same however many rounds are baked; so does training in float32,
    while in lower precision it keeps every factor apart (`training`).
    """

    def __init__(self, lm: LM, cfg: AdapterCfg) -> None:
        self.lm, self.cfg = lm, cfg
        self.n_rounds = 0
        self._peft: Any = None  # a PeftModel once the first adapter is attached
        self._pristine: dict[str, Tensor] = {}

    @property
    def rounds_in(self) -> dict[AdapterState, list[str]]:
        """Adapters that act in each state."""
        history = [HISTORY] if self.n_rounds else []
        live = [ROUND] if self._peft is not None and ROUND in self._peft.peft_config else []
        return {"base": [], "prev": history, "full": history + live}

    @property
    def is_open(self) -> bool:
        """Whether there is a factor of this round that is not baked."""
        return ROUND in self.rounds_in["full"]

    def _config(self, n_rounds: int) -> LoraConfig:
        adapted = targets(self.lm, self.cfg.layers)
        config = LoraConfig(
            r=self.cfg.rank * n_rounds,
            lora_alpha=self.cfg.alpha * n_rounds,  # pyright: ignore[reportArgumentType]  a float serves
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
            base_model_name_or_path=self.lm.base,
            target_parameters=sorted(adapted.experts) or None,
        )
        config.target_modules = list(adapted.linears)  # PEFT's own set has no order: its file would differ by process
        return config

    @_peft_notices_off()
    def _attach(self, name: str, config: LoraConfig, factors: Factors | None = None) -> None:
        if self._peft is None:
            try:
                self._peft = get_peft_model(self.lm.model, config, adapter_name=name)
            except ValueError as error:
                raise UserError(f"model {self.lm.name!r} has no linear layers that LoRA can adapt ({error})") from None
        else:
            self._peft.add_adapter(name, config)
            self._peft.set_adapter(name)
        if factors is not None:
            expected = {key: value.shape for key, value in self.factors(name).items()}
            given = {key: value.shape for key, value in factors.items()}
            if expected != given:
                key = next(k for k in sorted(expected | given) if expected.get(k) != given.get(k))
                has, wants = (list(side[key]) if key in side else "no such weight" for side in (given, expected))
                raise UserError(
                    f"the adapter does not fit {self.lm.name!r}: {key} is {has} in the file, {wants} in the model; "
                    "give an adapter of this model"
                )
            set_peft_model_state_dict(self._peft, factors, adapter_name=name)
        self._adapters_off()

    def _require_targets(self) -> None:
        """UserError unless PEFT adapted what `targets` names: for some mixtures of experts it renames what it is given,
        as if the adapter were of an older transformers."""
        wanted, found = targets(self.lm, self.cfg.layers), dict(self._layers())
        paths = {f"{name}.{m.parameter_name}" if isinstance(m, ParamWrapper) else name for name, m in found.items()}
        adapted = {path.removeprefix("base_model.model.").replace(".base_layer", "") for path in paths}
        if differing := sorted(adapted ^ {*wanted.linears, *wanted.experts}):
            raise UserError(
                f"PEFT adapts other weights of {self.lm.name!r} than it was asked to, {differing[0]} among "
                f"{len(differing)}; use a model of a family that README lists",
                resumable=False,
            )

    def _adapters_off(self) -> None:
        self._peft.base_model.disable_adapter_layers()
        self._peft.requires_grad_(False)

    def _layers(self) -> Iterator[tuple[str, Any]]:
        """Every adapted linear layer and stack of experts, by name."""
        if self._peft is not None:
            yield from ((name, m) for name, m in self._peft.named_modules() if isinstance(m, LoraLayer))

    @property
    def merging_is_lossy(self) -> bool:
        """Whether adding factors to the weights costs more than a rounding in float32."""
        return self.lm.quantized or any(_weight(module).dtype != torch.float32 for _, module in self._layers())

    # --- what acts on the model ---------------------------------------------------------------------------
    @contextmanager
    def using(self, which: AdapterState, exact: bool = False) -> Iterator[LM]:
        """The model as base (bit-identical to the untouched weights), prev (rounds 0..k-1) or full (0..k).

        `exact` lets the factors act apart where merging would round them: slower, and in bfloat16 small factors are
        kept; those of experts, which PEFT adds to their weights at each use, are rounded all the same. On a quantized
        model they always act apart: codes cannot take them.
        """
        names = self.rounds_in[which]
        if self.lm.quantized or names and exact and self.merging_is_lossy:
            with self._acting(names) if names else nullcontext():
                yield self.lm
            return
        before = {path: _weight(module).data for path, module in self._layers()}
        try:
            for path, module in self._layers():
                weight, pristine = _weight(module), self._pristine.setdefault(path, before[path])
                weight.data = pristine
                if names:
                    with torch.no_grad():
                        delta = sum(module.get_delta_weight(name).float() for name in names)
                        weight.data = (pristine.float() + delta).to(pristine.dtype)
            yield self.lm
        finally:
            for path, module in self._layers():
                _weight(module).data = before[path]

    def new_round(self, seed: int) -> None:
        """A fresh factor for this round: A random from `seed`, B zero, so the student starts where it was."""
        devices = [self.lm.device] if self.lm.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            self._attach(ROUND, self._config(1))
        self._require_targets()

    @contextmanager
    def training(self) -> Iterator[list[torch.nn.Parameter]]:
        """History and this round's factor both act, forward and backward; yields what is trained.

        The history is merged where that is not lossy, so that a step costs the same after every round.
        """
        apart = self.rounds_in["full"] if self.merging_is_lossy else [ROUND]
        with self.using("prev", exact=True), self._acting(apart):
            parameters = [p for name, p in self._peft.named_parameters() if f".{ROUND}." in name]
            for parameter in parameters:
                assert parameter.dtype == torch.float32, "adapters train in float32: in bfloat16 small steps are lost"
                parameter.requires_grad_(True)
            yield parameters

    def round_updates(self) -> list[tuple[Tensor, Tensor, float]]:
        """(A, B, scale) of every matrix, each expert's own, that this round adapts: it adds scale * B A to it."""
        out = []
        for _, m in self._layers():
            a, b, n = m.lora_A[ROUND].weight, m.lora_B[ROUND].weight, _n_stacked(m)
            each_a, each_b = a.unflatten(0, (n, -1)), b.unflatten(1, (-1, n))
            pairs = [(a, b)] if n == 1 else [(each_a[e], each_b[..., e]) for e in range(n)]
            out += [(*pair, m.scaling[ROUND]) for pair in pairs]
        return out

    @contextmanager
    def _acting(self, names: list[str]) -> Iterator[None]:
        self._peft.base_model.enable_adapter_layers()
        self._peft.base_model.set_adapter(names)
        self._peft.requires_grad_(False)
        try:
            yield
        finally:
            self._adapters_off()

    # --- folding and files -----------------------------------------------------------------------------------
    def factors(self, name: str) -> Factors:
        """A copy of an adapter's weights on the CPU."""
        state = get_peft_model_state_dict(self._peft, adapter_name=name, save_embedding_layers=False)
        return {key: value.detach().float().cpu().clone() for key, value in state.items()}

    def bake(self) -> Factors:
        """Folds this round into the history by concatenating factors (exact); returns the round's own factors."""
        own = self.factors(ROUND)
        folded = concatenate(self.factors(HISTORY), own, self.cfg.rank) if self.n_rounds else own
        self._replace_history(folded, self.n_rounds + 1)
        return own

    @_peft_notices_off()
    def discard_round(self) -> None:
        """Drops this round's factor as if it had never been trained."""
        if self.is_open:
            self._peft.delete_adapter(ROUND)

    @_peft_notices_off()
    def _replace_history(self, factors: Factors, n_rounds: int) -> None:
        self.discard_round()
        if self.n_rounds:
            self._peft.delete_adapter(HISTORY)
        self._attach(HISTORY, self._config(n_rounds), factors)
        self.n_rounds = n_rounds

    def restore(self, folder: Path, n_rounds: int) -> None:
        """Takes a checkpoint of this project, of `n_rounds` rounds, as the history."""
        self._replace_history(load_file(folder / ADAPTER_FILE), n_rounds)

    def history(self) -> Factors:
        """A copy of every round that is baked; empty: none is."""
        return self.factors(HISTORY) if self.n_rounds else {}

    def take(self, history: Factors, n_rounds: int) -> None:
        """Puts back what `history` gave after `n_rounds` rounds."""
        if n_rounds:
            self._replace_history(history, n_rounds)
        else:
            self.reset()

    @_peft_notices_off()
    def detach(self) -> None:
        """Drops every round and takes PEFT's layers out of the model again."""
        if self._peft is not None:
            self._peft.unload()
        self.n_rounds, self._peft, self._pristine = 0, None, {}

    def restore_round(self, folder: Path) -> None:
        """Takes the factor of a checkpoint's own round as the open one, on the history of the rounds before it: `prev`
        is then the student that it was steered from, `full` the healed one, up to a rounding."""
        self._attach(ROUND, self._config(1), load_file(folder / ROUND_FILE))

    @_peft_notices_off()
    def reset(self) -> None:
        """Drops every round: the untouched model again."""
        self.discard_round()
        if self.n_rounds:
            self._peft.delete_adapter(HISTORY)
        self.n_rounds = 0

    def adopt(self, config: LoraConfig, factors: Factors) -> None:
        """Takes a saved adapter as the whole history, counted as one round of its rank."""
        self._attach(HISTORY, config, factors)
        self.n_rounds = 1

    def save(self, folder: Path, own: Factors) -> None:
        """Writes the cumulative student as PEFT adapter files, and `round.safetensors`, this round's own factor."""
        config = self._config(self.n_rounds)
        config.inference_mode = True
        config.save_pretrained(str(folder))
        save_file(self.factors(HISTORY), folder / ADAPTER_FILE, metadata={"format": "pt"})
        save_file(own, folder / ROUND_FILE, metadata={"format": "pt"})

    def export(self, folder: Path) -> None:
        """The merged student as a plain transformers model with its tokenizer."""
        if self.lm.quantized:
            raise UserError(
                "a quantized model cannot be merged; load its checkpoint on the unquantized model, or drop --quantize"
            )
        state = {}
        with self.using("full"):
            for key, value in (
                self._peft.base_model.model.state_dict().items() if self._peft else self.lm.model.state_dict().items()
            ):
                if ".lora_" not in key:
                    state[key.replace("base_layer.", "")] = value
            self.lm.model.save_pretrained(folder, state_dict=state)
        self.lm.tokenizer.save_pretrained(folder)


def _weight(module: Any) -> nn.Parameter:
    """The base weight that an adapted layer's factors add to."""
    return module.get_param() if isinstance(module, ParamWrapper) else module.get_base_layer().weight


def _n_stacked(module: Any) -> int:
    """Matrices that an adapted layer holds: its experts, or 1."""
    return module.num_experts if isinstance(module, ParamWrapper) else 1


def concatenate(history: Factors, own: Factors, rank: int) -> Factors:
    """[B1 B2] [A1; A2] = B1 A1 + B2 A2, for each expert of a stack: both factors in one of summed rank, unrounded.

    `rank` is that of `own`.
    """
    out = {}
    for key, old in history.items():
        new = own[key]
        if "lora_A" in key:  # [(e r) d_in]; its columns hold B's (r e), so that one stays together as it is
            each = [factor.unflatten(0, (len(new) // rank, -1)) for factor in (old, new)]
            out[key] = torch.cat(each, dim=1).flatten(0, 1)
        else:
            out[key] = torch.cat([old, new], dim=1)
    return out


def attach_saved(lm: LM, folder: Path) -> Student:
    """A student holding a saved LoRA folder, a checkpoint of ours or any other of this model, as its history."""
    try:
        config: Any = LoraConfig.from_pretrained(str(folder))
        factors = load_file(folder / ADAPTER_FILE)
        student = Student(lm, AdapterCfg(rank=config.r, alpha=float(config.lora_alpha)))
    except (OSError, ValueError, TypeError, LookupError, AttributeError, SafetensorError) as error:
        raise UserError(
            f"the adapter in {str(folder)!r} cannot be read ({error}); give a PEFT LoRA folder of this model"
        ) from None
    student.adopt(config, factors)
    return student
