"""Decodes batches that mix prompts, doses and random streams."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from steer_heal.model.lm import LM
from steer_heal.model.memory import decode_bytes, fewer_rows, free_unused, rows_that_fit
from steer_heal.model.sampling import sampler
from steer_heal.model.steering import Vector, steer

Batch = list[tuple[int, tuple[int, ...]]]
"""(index of the row, token ids that were written after its prompt) of every row of a finished batch."""


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
    """Tokens that are never written. With the end tokens among them, every row runs to the limit."""


def decode(lm: LM, rows: Sequence[Row], vector: Vector | None, how: Decoding) -> list[tuple[int, ...]]:
    """Token ids written after the prompt of each row, up to and including an end token."""
    out: list[tuple[int, ...]] = [()] * len(rows)
    for batch in decode_batches(lm, rows, vector, how):
        for i, ids in batch:
            out[i] = ids
    return out


def decode_batches(lm: LM, rows: Sequence[Row], vector: Vector | None, how: Decoding) -> Iterator[Batch]:
    """Token ids written after each row's prompt, one finished batch at a time.

    Rows of similar prompt length share a batch, each with its own dose and random stream. A row that has ended leaves
    the batch. A batch that does not fit into memory is halved.
    """
    todo = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt_ids))
    longest = max((len(row.prompt_ids) for row in rows), default=0)
    config, per_row = lm.model.config.get_text_config(), longest + how.max_new_tokens
    bytes_per_row = decode_bytes(config, longest, how.max_new_tokens, lm.head.weight.element_size())
    size = how.batch_size or rows_that_fit(len(rows), bytes_per_row, lm.device)
    while todo:
        group = todo[: max(1, int(min(size, lm.limits.decode_tokens / per_row)))]
        try:
            written = _decode_batch(lm, [rows[i] for i in group], vector, how)
        except RuntimeError as error:
            lm.limits.decode_tokens = fewer_rows(len(group), error) * per_row
            written = None
        if written is None:
            free_unused()
            continue
        yield list(zip(group, written, strict=True))
        todo = todo[len(group) :]


def padded(
    lm: LM, rows: Sequence[Sequence[int]], side: Literal["left", "right"]
) -> tuple[Int[Tensor, "b s"], Int[Tensor, "b s"]]:
    """(token ids, mask) of rows of different lengths. The mask is 0 at the padding."""

    def pad(values: list[list[int]], padding: int) -> Tensor:
        tensors = [torch.tensor(row, dtype=torch.long) for row in values]
        return pad_sequence(tensors, batch_first=True, padding_value=padding, padding_side=side).to(lm.device)

    return pad([list(row) for row in rows], lm.pad_id), pad([[1] * len(row) for row in rows], 0)


class GrowingCache:
    """Keys and values of the tokens fed so far. Rows can be dropped, reordered or repeated at any time."""

    def __init__(self, lm: LM) -> None:
        self.lm = lm
        self.mask = torch.zeros((0, 0), dtype=torch.long)
        self.cache = DynamicCache(config=lm.model.config.get_text_config())

    def feed(self, ids: Int[Tensor, "b s"], mask: Int[Tensor, "b s"] | None = None) -> Float[Tensor, "b s d"]:
        """Final hidden states at `ids`, which follow what each row was fed before.

        `mask` is 0 at padding, which may stand on either side; what a padded position returns means nothing.
        """
        mask = torch.ones_like(ids) if mask is None else mask
        self.mask = torch.cat([self.mask, mask], dim=1) if len(self.mask) else mask
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]  # rotary: each row begins at 0
        return self.lm.text_model(
            input_ids=ids, attention_mask=self.mask, position_ids=positions, past_key_values=self.cache, use_cache=True
        ).last_hidden_state

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        """Keeps the given rows, in that order; a row may come more than once."""
        self.cache.batch_select_indices(rows)
        self.mask = self.mask[rows]


@torch.no_grad()
def _decode_batch(lm: LM, rows: Sequence[Row], vector: Vector | None, how: Decoding) -> list[tuple[int, ...]]:
    device = lm.device
    ids, mask = padded(lm, [row.prompt_ids for row in rows], "left")
    uniforms = torch.empty(0, device=device)
    if how.sample:
        generators = [torch.Generator().manual_seed(row.seed) for row in rows]
        draws = [torch.rand(how.max_new_tokens, generator=g, dtype=torch.float64) for g in generators]
        uniforms = torch.stack(draws).to(device)
    pick = sampler(lm.model.generation_config)
    ends = torch.tensor(sorted(lm.end_ids - how.suppress), device=device, dtype=torch.long)
    suppressed = torch.tensor(sorted(how.suppress), device=device, dtype=torch.long)
    active = torch.arange(len(rows), device=device)
    written: list[list[int]] = [[] for _ in rows]
    cache, new = GrowingCache(lm), mask
    with steer(lm, vector, [row.dose for row in rows]) as steering:
        for step in range(how.max_new_tokens):
            logits = lm.logits(cache.feed(ids, new)[:, -1])
            new = None
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
                steering.select(keep)
                active, token = active[keep], token[keep]
            ids = token[:, None]
    return [tuple(row) for row in written]
