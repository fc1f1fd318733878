"""LoRA (Hu et al. 2021) by PEFT: low-rank factors on every linear layer and stack of experts of the adapted blocks."""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from steer_heal.errors import UserError
from steer_heal.inputs.files import ADAPTER_FILE, PEFT_CONFIG_FILE
from steer_heal.model.adapter import HISTORY, ROUND, Adapter, Factors, Lost
from steer_heal.model.lm import LM
from steer_heal.model.self_check import short_logits
from steer_heal.settings import AdapterCfg, Band

HONOURED = frozenset(
    (
        *("peft_type", "peft_version", "task_type", "base_model_name_or_path", "revision", "auto_mapping"),
        *("inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"),
        *("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("fan_in_fan_out", "loftq_config", "eva_config"),
    )
)
"""Fields of adapter_config.json that change no more than which matrices B A is added to, and its scale. The model is
never in training mode, so dropout does not act."""
HARMLESS_INITS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights that leave the base weights alone; the saved factors replace what they give."""


INDEXER = "indexer"
"""The part of sparse attention that picks the tokens which are attended to. As a router, it gets no gradient."""
BYPASSED = ("out_proj", "dt_proj")
"""Names of linear layers of a state-space block: see `_is_bypassed`."""


@contextmanager
def _peft_notices_off() -> Iterator[None]:
    """Hides warnings that no user can act on: those of PEFT about its own adapters, and a deprecation between PEFT and
    transformers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="peft")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield


class Lora(Adapter):
    """Factors A [r d_in] and B [d_out r] in float32, under PEFT's own keys, `<module>.lora_A.weight`.

    In a stack of e experts the rows of A are ordered [e r], the columns of B [r e]. Merged factors act through a
    working copy of the weights.
    """

    kind = "lora"
    title = "LoRA adapter"
    updates_weights = True

    def __init__(self, lm: LM, cfg: AdapterCfg) -> None:
        super().__init__(lm, cfg)
        self.peft: Any = None
        """The PeftModel, from the first factor on."""
        self._pristine: dict[str, Tensor] = {}
        """The untouched weights while `acting` has others in their place."""
        self._apart: list[str] = []

    @classmethod
    @_peft_notices_off()
    def open(cls, lm: LM, folder: Path) -> Lora:
        """A checkpoint of ours, or any other plain LoRA folder of this model, counted as one round of its rank."""
        _require_plain_lora(json.loads((folder / PEFT_CONFIG_FILE).read_text(encoding="utf-8")), folder)
        config: Any = LoraConfig.from_pretrained(str(folder))
        adapter = cls(lm, AdapterCfg(rank=config.r, alpha=float(config.lora_alpha)))
        saved = load_file(folder / ADAPTER_FILE)
        try:
            adapter.peft = PeftModel.from_pretrained(
                lm.model,
                str(folder),
                HISTORY,
                config=config,
                torch_device=str(lm.device),
                ignore_mismatched_sizes=True,  # `_require_all_read` names them
            )
        except BaseException:
            _unwrap(lm.model)
            raise
        try:
            adapter._require_blocks_alone(folder, saved)
        except BaseException:
            adapter.detach()
            raise
        adapter.logits_as_saved = short_logits(lm)
        adapter._switch([])
        return adapter

    def _require_blocks_alone(self, folder: Path, saved: Factors) -> None:
        """UserError unless what PEFT read of a saved adapter is all of it, and adapts decoder blocks only."""
        self.peft.requires_grad_(False)
        lm = self.lm
        inside = f"base_model.model.{blocks_path(lm)}."
        outside = [name for name, _ in self._layers() if not name.startswith(inside)]
        if outside:
            raise UserError(
                f"the adapter in {str(folder)!r} adapts {outside[0]}, and only the decoder blocks of {lm.name!r} can "
                "be adapted; give an adapter of the blocks alone"
            )
        self._require_all_read(saved)

    @property
    def names(self) -> Collection[str]:
        return () if self.peft is None else self.peft.peft_config

    @property
    def merging_is_lossy(self) -> bool:
        """Whether adding factors to the weights costs more than a rounding in float32."""
        return self.lm.quantized or any(_weight(module).dtype != torch.float32 for _, module in self._layers())

    def unadapted(self) -> tuple[str, ...]:
        return self._targets.left_out

    @cached_property
    def _targets(self) -> Targets:
        return targets(self.lm, self.cfg.layers)

    def describe(self) -> str:
        return f"a {self.title} of rank {self.cfg.rank} and alpha {self.cfg.alpha:g} per round"

    # --- factors -----------------------------------------------------------------------------------------------
    def fresh(self, seed: int) -> None:
        """A random from `seed`, B zero."""
        devices = [self.lm.device] if self.lm.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            try:
                self._attach(ROUND, self._config(1))
            except ValueError as error:
                raise UserError(f"model {self.lm.name!r} has no linear layers that LoRA can adapt ({error})") from None
        self._require_targets()

    @_peft_notices_off()
    def attach(self, name: str, factors: Factors, n_rounds: int) -> None:
        self._attach(name, self._config(n_rounds))
        self.require_fit(factors, self.factors(name))
        set_peft_model_state_dict(self.peft, factors, adapter_name=name)

    def _config(self, n_rounds: int) -> LoraConfig:
        adapted = self._targets
        config = LoraConfig(
            r=self.cfg.rank * n_rounds,
            lora_alpha=self.cfg.alpha * n_rounds,  # pyright: ignore[reportArgumentType]  a float serves
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
            base_model_name_or_path=self.lm.base,
            target_parameters=sorted(adapted.parameters) or None,
        )
        config.target_modules = list(adapted.linears)  # PEFT's own set has no order: its file would differ by process
        return config

    @_peft_notices_off()
    def _attach(self, name: str, config: LoraConfig) -> None:
        if self.peft is None:
            self.peft = get_peft_model(self.lm.model, config, adapter_name=name)
        else:
            self.peft.add_adapter(name, config)
            self.peft.set_adapter(name)
        self.peft.requires_grad_(False)
        self._switch([])

    def _require_all_read(self, saved: Factors) -> None:
        """UserError unless PEFT found a place for every weight of a file, which may have names of older versions."""
        read = self.factors(HISTORY)
        if saved.keys() != read.keys():
            found = set_peft_model_state_dict(self.peft, saved, HISTORY, ignore_mismatched_sizes=True)
            if not found.unexpected_keys and not any(f".{HISTORY}." in key for key in found.missing_keys):
                return
        self.require_fit(saved, read)

    def _require_targets(self) -> None:
        """UserError unless PEFT adapted what `targets` names: in some mixtures of experts it renames what it is given,
        as if the adapter were of an older transformers."""
        wanted = self._targets
        found = dict(self._layers())
        paths = {f"{name}.{m.parameter_name}" if isinstance(m, ParamWrapper) else name for name, m in found.items()}
        adapted = {path.removeprefix("base_model.model.").replace(".base_layer", "") for path in paths}
        if differing := sorted(adapted ^ {*wanted.linears, *wanted.parameters}):
            raise UserError(
                f"PEFT adapts other weights of {self.lm.name!r} than it was asked to, {differing[0]} among "
                f"{len(differing)}; use a model of a family that docs/families.md lists",
                resumable=False,
            )

    @_peft_notices_off()
    def drop(self, name: str) -> None:
        self.peft.delete_adapter(name)
        self.peft.requires_grad_(False)  # PEFT makes one of the others active, and trainable

    @_peft_notices_off()
    def detach(self) -> None:
        """Takes PEFT's layers out of the model again."""
        if self.peft is not None:
            self.peft.unload()
        self.peft = None
        self._apart = []

    def factors(self, name: str) -> Factors:
        state = get_peft_model_state_dict(self.peft, adapter_name=name, save_embedding_layers=False)
        return {key: value.detach().float().cpu().clone() for key, value in state.items()}

    def fold(self, history: Factors, own: Factors) -> Factors:
        """[B1 B2] [A1; A2] = B1 A1 + B2 A2, for each expert of a stack: both factors in one of summed rank."""
        out = {}
        for key, old in history.items():
            new = own[key]
            if "lora_A" in key:  # [(e r) d_in]; its columns hold B's (r e), so that one stays together as it is
                n = len(new) // self.cfg.rank
                each = [factor.unflatten(0, (n, -1)) for factor in (old, new)]
                out[key] = torch.cat(each, dim=1).flatten(0, 1)
            else:
                out[key] = torch.cat([old, new], dim=1)
        return out

    def parameters(self) -> list[nn.Parameter]:
        return [p for name, p in self.peft.named_parameters() if f".{ROUND}." in name]

    def outputs(self, name: str) -> list[nn.Parameter]:
        """B of every layer."""
        return [m.lora_B[name].weight for _, m in self._layers() if name in m.lora_B]

    def updates(self) -> list[tuple[Tensor, Tensor, float]]:
        """Each expert of a stack counts as a matrix of its own."""
        out = []
        for _, m in self._layers():
            a, b = m.lora_A[ROUND].weight, m.lora_B[ROUND].weight
            n = m.num_experts if isinstance(m, ParamWrapper) else 1
            each_a, each_b = a.unflatten(0, (n, -1)), b.unflatten(1, (-1, n))
            pairs = [(a, b)] if n == 1 else [(each_a[e], each_b[..., e]) for e in range(n)]
            out += [(*pair, m.scaling[ROUND]) for pair in pairs]
        return out

    def reduced(self, history: Factors, rank: int) -> tuple[Factors, Lost]:
        """By the SVD of each B A, for each expert of a stack (Eckart and Young 1936)."""
        r = self.peft.peft_config[HISTORY].r
        out: Factors = {}
        energy: dict[str, tuple[float, float]] = {}  # by module: of the whole update, of what is cut
        for key in [key for key in history if "lora_A" in key]:
            key_b = key.replace("lora_A", "lora_B")
            a = history[key].double().unflatten(0, (-1, r))  # [e r d_in]
            b = history[key_b].double().unflatten(1, (r, -1)).movedim(2, 0)  # [e d_out r]
            (b_basis, b_inner), (a_basis, a_inner) = torch.linalg.qr(b), torch.linalg.qr(a.mT)
            left, sigma, right = torch.linalg.svd(b_inner @ a_inner.mT, full_matrices=False)
            whole, cut = (part.square().sum().item() for part in (sigma, sigma[:, rank:]))
            energy[key.removesuffix(".lora_A.weight")] = whole, cut
            padding = (0, max(0, rank - sigma.shape[1]))  # a matrix smaller than the rank
            each = (sigma[:, None, :rank] * self.cfg.alpha / self.cfg.rank).sqrt()
            new_b = nn.functional.pad(b_basis @ left[..., :rank] * each, padding)
            new_a = nn.functional.pad(a_basis @ right.mT[..., :rank] * each, padding).mT
            out[key] = new_a.flatten(0, 1).float().contiguous()
            out[key_b] = new_b.movedim(0, 2).flatten(1).float().contiguous()
        shares = {module: cut / whole if whole else 0.0 for module, (whole, cut) in energy.items()}
        where = max(shares, key=shares.__getitem__)
        whole, cut = (sum(part) for part in zip(*energy.values(), strict=True))
        return out, Lost(cut / whole if whole else 0.0, shares[where], where.removeprefix("base_model.model."))

    # --- what acts on the model ------------------------------------------------------------------------------------
    def _layers(self) -> Iterator[tuple[str, Any]]:
        """Every adapted linear layer and stack of experts, by name."""
        if self.peft is not None:
            yield from ((name, m) for name, m in self.peft.named_modules() if isinstance(m, LoraLayer))

    @contextmanager
    def acting(self, merged: Sequence[str], apart: Sequence[str]) -> Iterator[None]:
        """PEFT adds the factors of experts to their weights at each use, so these are rounded even apart. A quantized
        model takes no factors in `merged`."""
        layers = [] if self.lm.quantized else list(self._layers())
        before = [_weight(module).data for _, module in layers]
        before_apart = self._apart
        outermost = not self._pristine
        try:
            for path, module in layers:
                self._merge(path, module, merged)
            if before_apart != list(apart):
                self._switch(list(apart))
            yield
        finally:
            for (_, module), weight in zip(layers, before, strict=True):
                _weight(module).data = weight
            if outermost:
                self._pristine = {}
            if before_apart != self._apart:
                self._switch(before_apart)

    @torch.no_grad()
    def _merge(self, path: str, module: Any, names: Sequence[str]) -> None:
        """Puts the sum of the untouched weight and these factors in the place of the weight."""
        weight = _weight(module)
        pristine = self._pristine.setdefault(path, weight.data)
        weight.data = pristine
        if names:
            delta = sum(module.get_delta_weight(name).float() for name in names)
            weight.data = (pristine.float() + delta).to(pristine.dtype)

    def _switch(self, names: list[str]) -> None:
        """Lets PEFT apply these factors and no others. What requires a gradient stays as it is."""
        self._apart = names
        if self.peft is None:
            return
        parameters = list(self.peft.parameters())
        trained = [parameter.requires_grad for parameter in parameters]
        if names:
            self.peft.base_model.enable_adapter_layers()
            self.peft.base_model.set_adapter(names)
        else:
            self.peft.base_model.disable_adapter_layers()
        for parameter, requires_grad in zip(parameters, trained, strict=True):
            parameter.requires_grad_(requires_grad)

    # --- files ---------------------------------------------------------------------------------------------------
    def save(self, folder: Path, n_rounds: int) -> None:
        """Writes what PEFT loads."""
        config = self._config(n_rounds)
        config.inference_mode = True
        config.save_pretrained(str(folder))
        save_file(self.factors(HISTORY), folder / ADAPTER_FILE, metadata={"format": "pt"})

    def merged_state(self) -> dict[str, Tensor]:
        state = self.lm.model.state_dict()
        return {key.replace("base_layer.", ""): value for key, value in state.items() if ".lora_" not in key}


def _weight(module: Any) -> nn.Parameter:
    """The base weight that an adapted layer's factors add to."""
    return module.get_param() if isinstance(module, ParamWrapper) else module.get_base_layer().weight


def _unwrap(model: nn.Module) -> None:
    """Takes out the layers of an adapter that PEFT could not attach as a whole."""
    for path, layer in [*model.named_modules()]:
        if isinstance(layer, LoraLayer):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, layer.get_base_layer())


def _require_plain_lora(saved: Mapping[str, Any], folder: Path) -> None:
    """UserError naming the first field of adapter_config.json by which an adapter is more than B A added to matrices.

    A field that the installed PEFT does not know counts as such, unless it is off.
    """
    where = f"the adapter in {str(folder)!r}"
    defaults = LoraConfig().to_dict()
    if saved.get("peft_type") != "LORA":
        raise UserError(f"{where} has peft_type {saved.get('peft_type')!r}; give a LoRA adapter")
    for name, value in saved.items():
        if name == "init_lora_weights":
            plain = value in HARMLESS_INITS
        else:
            plain = name in HONOURED or value in (None, False, [], {}) or value == defaults.get(name)
        if not plain:
            raise UserError(
                f"{where} has {name} {value!r}, so it is more than low-rank factors that are added to the weights, and "
                "cannot be read as it was trained; give a LoRA adapter without it"
            )


# --- which weights are adapted: found from the model, not from a list of names -------------------------------------
@dataclass(frozen=True)
class Targets:
    """Names in the order of the model. Norms and biases are never adapted, and not listed."""

    linears: tuple[str, ...]
    """Linear layers, by module."""
    parameters: tuple[str, ...]
    """Stacks of experts [e d_out d_in] or [e d_in d_out], and linear layers that PEFT would take for experts if they
    were given by module."""
    left_out: tuple[str, ...]
    """All other weights of two or more axes, such as routers, by their name within a block."""


def targets(lm: LM, layers: Band) -> Targets:
    """The weights of the blocks in the band `layers`; the same with adapters attached. UserError where none serves.

    Routers are left out: an update of theirs would change which experts a token visits, not what they compute.
    """
    prefix = blocks_path(lm)
    linears, parameters, left_out = [], [], {}
    for i in lm.band("adapter.layers", layers):
        modules = {
            name.replace(".base_layer", ""): module  # the innermost of the wrappers comes last
            for name, module in lm.blocks[i].named_modules()
            if ".lora_" not in name
        }
        routed = [(name.rpartition(".")[0], n) for name, module in modules.items() if (n := _n_experts(module))]
        for name, module in modules.items():
            for own, parameter in module.named_parameters(recurse=False):
                if parameter.ndim < 2 or own.endswith("bias"):
                    continue
                linear = isinstance(module, nn.Linear | Conv1D) and not _is_router(name, module, routed)
                if linear and INDEXER not in name.split(".") and not _is_bypassed(name, modules):
                    linears.append(f"{prefix}.{i}.{name}")
                elif parameter.ndim == 3 and len(parameter) == _n_experts(module) and parameter.is_floating_point():
                    parameters.append(f"{prefix}.{i}.{name}.{own}")
                else:
                    left_out[f"{name}.{own}"] = None
    if not linears and not parameters:
        raise UserError(f"model {lm.name!r} has no linear layers that LoRA can adapt in blocks {layers} of its depth")
    renamed = {name for name in linears if not lm.quantized and _peft_renames(lm, name)}
    by_module = tuple(name for name in linears if name not in renamed)
    by_parameter = (f"{name}.weight" for name in linears if name in renamed)
    return Targets(by_module, (*parameters, *by_parameter), tuple(left_out))


def blocks_path(lm: LM) -> str:
    """Name of the list of blocks within the model, such as model.layers."""
    return next(name for name, module in lm.model.named_modules() if module is lm.blocks)


def _n_experts(module: nn.Module) -> int:
    """Experts whose weights the module holds as stacks; 0 in any other module."""
    n = getattr(module, "num_experts", 0)
    return n if any(p.ndim == 3 and len(p) == n for p in module.parameters(recurse=False)) else 0


def _is_router(name: str, linear: nn.Linear | Conv1D, routed: list[tuple[str, int]]) -> bool:
    """Whether a linear layer has an output for each of the experts beside it, and is no part of the attention."""
    if "attn" in name or "attention" in name:
        return False
    beside = (n for parent, n in routed if not parent or name.startswith(f"{parent}."))
    return getattr(linear, "out_features", 0) in beside


def _is_bypassed(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a state-space block (Mamba) reads the weight of its linear layer directly, past any adapter, at least
    with some of its kernels. PEFT refuses to adapt these."""
    parent, _, own = name.rpartition(".")
    return own in BYPASSED and all(hasattr(modules.get(parent), weight) for weight in ("A_log", "D"))


def _peft_renames(lm: LM, linear: str) -> bool:
    """Whether PEFT takes the name of a linear layer for that of experts, as if the adapter were of an older
    transformers."""
    config = LoraConfig(target_modules=[linear])
    try:
        convert_peft_config_for_transformers(config, lm.model, None)
    except ValueError:  # it misses the names of the others
        return True
    return set(config.target_modules or ()) != {linear}
