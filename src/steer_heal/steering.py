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

from steer_heal.caches import Fixed, Growing
from steer_heal.lm import LM
from steer_heal.memory import decode_bytes, fitting, rows_that_fit
from steer_heal.sampling import sampler

Application = Literal["add", "cosine_gate", "ablate"]
Tape = Callable[[Callable[[], list[tuple[int, ...]]]], list[tuple[int, ...]]]
"""Takes the decoding of the next rows and returns their token ids: decoded now or recorded before, and then maybe of fewer or more rows."""


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
    """Rows at once; 0: as many as free memory holds."""
    sample: bool = True
    suppress: frozenset[int] = field(default_factory=frozenset)
    """Tokens that are never written; with the end tokens among them every row runs to the limit."""


def decode(
    lm: LM, rows: Sequence[Row], vector: Vector | None, how: Decoding, on_rows: Callable[[int], None] = lambda n: None,
    tape: Tape = lambda batch: batch(),
) -> list[tuple[int, ...]]:
    """Token ids written after each row's prompt, up to and including an end token.

    Rows of like prompt length share a batch, each with its own dose and random stream; a row that has ended
    leaves the batch. A batch that memory does not hold is halved. `on_rows` is told how many rows each finished batch held. `tape`
    is handed each batch's decoding, and may return what it recorded of the rows that come next instead.
    """
    out: list[tuple[int, ...]] = [()] * len(rows)
    todo = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt_ids))
    longest = max((len(row.prompt_ids) for row in rows), default=0)
    bytes_per_row = decode_bytes(lm.model.config.get_text_config(), longest, how.max_new_tokens, lm.head.weight.element_size())
    size = how.batch_size or rows_that_fit(len(rows), bytes_per_row, lm.device)

    def next_batch() -> list[tuple[int, ...]]:
        group = todo[: max(1, int(min(size, lm.decode_budget / (longest + how.max_new_tokens))))]
        n, batch = fitting(len(group), lambda n: _decode_batch(lm, [rows[i] for i in group[:n]], vector, how))
        if n < len(group):
            lm.decode_budget = n * (longest + how.max_new_tokens)
        return batch

    while todo:
        batch = tape(next_batch)
        for i, ids in zip(todo, batch):
            out[i] = ids
        todo = todo[len(batch) :]
        lm.rows_at_once = max(lm.rows_at_once, len(batch))
        on_rows(len(batch))
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
    uniforms = torch.empty(0, device=device)
    if how.sample:
        generators = [torch.Generator().manual_seed(row.seed) for row in rows]
        uniforms = torch.stack([torch.rand(how.max_new_tokens, generator=g, dtype=torch.float64) for g in generators]).to(device)
    pick = sampler(lm.model.generation_config)
    ends = torch.tensor(sorted(lm.end_ids - how.suppress), device=device, dtype=torch.long)
    suppressed = torch.tensor(sorted(how.suppress), device=device, dtype=torch.long)
    active = torch.arange(len(rows), device=device)
    written: list[list[int]] = [[] for _ in rows]
    with steer(lm, vector, [row.dose for row in rows]) as steering:
        cache = Fixed(lm, mask, how.max_new_tokens, steering.select) if lm.fixed_addresses else Growing(lm, mask, steering.select)
        for step in range(how.max_new_tokens):
            logits = lm.logits(cache.feed(ids))
            logits[:, suppressed] = -torch.inf
            token = pick(logits, uniforms[active, step]) if how.sample else logits.argmax(-1)
            for b, t in zip(active.tolist(), token.tolist(), strict=True):
                written[b].append(t)
            going = ~torch.isin(token, ends)
            if not going.all():
                keep = going.nonzero()[:, 0]
                if not len(keep):
                    break
                cache.select(keep)
                active, token = active[keep], token[keep]
            ids = token[:, None]
    return [tuple(row) for row in written]
