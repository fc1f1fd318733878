"""Adds a vector to the residual stream, row by row, and decodes batches that mix prompts and doses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from einops import einsum
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache
from transformers.generation import LogitsProcessorList, MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from steer_heal.lm import LM

Application = Literal["add", "cosine_gate", "ablate"]
Tape = Callable[[Callable[[], list[tuple[int, ...]]]], list[tuple[int, ...]]]
"""Takes the decoding of one batch and returns its token ids, decoded now or recorded before."""


@dataclass(frozen=True)
class Vector:
    """A direction Float[d] per steered block, and what a dose of it does to the residual stream after that block."""

    directions: Mapping[int, Tensor]
    application: Application = "add"

    def save(self, path: Path) -> None:
        tensors = {str(layer): direction.clone().contiguous() for layer, direction in self.directions.items()}
        save_file(tensors, path, metadata={"application": self.application})


def load_vector(path: Path) -> Vector:
    with safe_open(path, "pt") as file:  # cloned: a tensor in the mapped file need not be aligned as one that torch allocated
        return Vector({layer: file.get_tensor(str(layer)).clone() for layer in sorted(map(int, file.keys()))}, file.metadata()["application"])


def add(hidden: Float[Tensor, "b s d"], direction: Float[Tensor, " d"], dose: Float[Tensor, "#b 1 1"]) -> Float[Tensor, "b s d"]:
    """h + dose v (activation addition; Turner et al. 2023)."""
    return hidden + dose * direction


def cosine_gate(hidden: Float[Tensor, "b s d"], direction: Float[Tensor, " d"], dose: Float[Tensor, "#b 1 1"]) -> Float[Tensor, "b s d"]:
    """h + dose |cos(h, v)| v: a position is pushed as far as it already speaks of the direction (a soft form of
    conditional activation steering; Lee et al. 2024)."""
    gate = torch.nn.functional.cosine_similarity(hidden, direction, dim=-1).abs()
    return hidden + dose * gate[..., None] * direction


def ablate(hidden: Float[Tensor, "b s d"], direction: Float[Tensor, " d"], dose: Float[Tensor, "#b 1 1"]) -> Float[Tensor, "b s d"]:
    """h - (h . u) u + dose v with u = v / ||v||: the component along v is replaced (directional ablation; Arditi et al. 2024)."""
    unit = direction / direction.norm()
    component = einsum(hidden, unit, "b s d, d -> b s")
    return hidden - component[..., None] * unit + dose * direction


APPLICATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"add": add, "cosine_gate": cosine_gate, "ablate": ablate}


@contextmanager
def steer(lm: LM, vector: Vector | None, doses: Sequence[float]) -> Iterator["Steering"]:
    """While inside, row b of every batch is steered with `doses[b]` after each layer of the vector, at every position.

    A dose of 0 leaves its row alone, whatever the application.
    """
    steering = Steering(torch.tensor(doses, device=lm.device, dtype=torch.float32))
    handles = []
    if vector is not None and any(doses):
        apply = APPLICATIONS[vector.application]
        for layer, direction in vector.directions.items():
            handles.append(lm.blocks[layer].register_forward_hook(steering.hook(direction.to(lm.device), apply)))
    try:
        yield steering
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Steering:
    """The doses of the rows now in the batch; `select` follows rows that leave it."""

    doses: Float[Tensor, " b"]

    def hook(self, direction: Float[Tensor, " d"], apply: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable:
        def push(_module: torch.nn.Module, _inputs: tuple, output: Tensor | tuple) -> Tensor | tuple:
            hidden = output[0] if isinstance(output, tuple) else output
            dose = self.doses[:, None, None]
            hidden = torch.where(dose == 0, hidden, apply(hidden.float(), direction, dose).to(hidden.dtype))
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return push

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        self.doses = self.doses[rows]


@dataclass(frozen=True)
class Row:
    """One sequence to decode. Its text depends on these fields alone, not on the batch it runs in."""

    prompt_ids: tuple[int, ...]
    dose: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen. `sample=False` is greedy."""

    max_new_tokens: int
    batch_size: int
    sample: bool = True
    suppress: frozenset[int] = field(default_factory=frozenset)
    """Tokens that are never written; with the end tokens among them every row runs to the limit."""


def _warpers(lm: LM) -> LogitsProcessorList:
    """The generation config's temperature, top-k, top-p and min-p. Never a repetition penalty: it would hide
    over-steering from the filter and the dose controller."""
    config, warpers = lm.model.generation_config, LogitsProcessorList()
    if config.temperature is not None and config.temperature not in (0.0, 1.0):
        warpers.append(TemperatureLogitsWarper(config.temperature))
    if config.top_k:
        warpers.append(TopKLogitsWarper(config.top_k))
    if config.top_p is not None and config.top_p < 1.0:
        warpers.append(TopPLogitsWarper(config.top_p))
    if getattr(config, "min_p", None):
        warpers.append(MinPLogitsWarper(config.min_p))
    return warpers


def decode(
    lm: LM, rows: Sequence[Row], vector: Vector | None, how: Decoding, on_rows: Callable[[int], None] = lambda n: None,
    tape: Tape = lambda batch: batch(),
) -> list[tuple[int, ...]]:
    """Token ids written after each row's prompt, up to and including an end token.

    Rows of like prompt length share a batch, each with its own dose and random stream; a row that has ended
    leaves the batch. `on_rows` is told how many rows each finished batch held. `tape` is handed each batch's decoding,
    and may return what it recorded of it instead.
    """
    out: list[tuple[int, ...]] = [()] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt_ids))
    for start in range(0, len(order), how.batch_size):
        group = order[start : start + how.batch_size]
        for i, ids in zip(group, tape(lambda: _decode_batch(lm, [rows[i] for i in group], vector, how)), strict=True):
            out[i] = ids
        on_rows(len(group))
    return out


@torch.no_grad()
def _decode_batch(lm: LM, rows: Sequence[Row], vector: Vector | None, how: Decoding) -> list[tuple[int, ...]]:
    device, longest = lm.device, max(len(row.prompt_ids) for row in rows)
    ids = torch.full((len(rows), longest), lm.pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for b, row in enumerate(rows):
        ids[b, longest - len(row.prompt_ids) :] = torch.tensor(row.prompt_ids)
        mask[b, longest - len(row.prompt_ids) :] = 1
    ids, mask = ids.to(device), mask.to(device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    uniforms = torch.empty(0, device=device)
    if how.sample:
        generators = [torch.Generator().manual_seed(row.seed) for row in rows]
        uniforms = torch.stack([torch.rand(how.max_new_tokens, generator=g, dtype=torch.float64) for g in generators]).to(device)
    warpers = _warpers(lm)
    ends = torch.tensor(sorted(lm.end_ids - how.suppress), device=device, dtype=torch.long)
    suppressed = torch.tensor(sorted(how.suppress), device=device, dtype=torch.long)
    active = torch.arange(len(rows), device=device)
    written: list[list[int]] = [[] for _ in rows]
    cache = DynamicCache(config=lm.model.config.get_text_config())
    with steer(lm, vector, [row.dose for row in rows]) as steering:
        for step in range(how.max_new_tokens):
            hidden = lm.text_model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            ).last_hidden_state[:, -1]
            logits = lm.logits(hidden)
            logits[:, suppressed] = -torch.inf
            token = _pick(warpers(ids, logits), uniforms[active, step]) if how.sample else logits.argmax(-1)
            for b, t in zip(active.tolist(), token.tolist(), strict=True):
                written[b].append(t)
            going = ~torch.isin(token, ends)
            if not going.all():
                keep = going.nonzero()[:, 0]
                if not len(keep):
                    break
                cache.batch_select_indices(keep)
                steering.select(keep)
                active, mask, positions, token = active[keep], mask[keep], positions[keep], token[keep]
            ids = token[:, None]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            positions = positions[:, -1:] + 1
    return [tuple(row) for row in written]


def _pick(logits: Float[Tensor, "b v"], uniform: Float[Tensor, " b"]) -> Int[Tensor, " b"]:
    """Inverse-CDF sampling: the row's own uniform number picks its token, whatever its neighbours are."""
    cdf = logits.double().softmax(-1).cumsum(-1)
    return torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
