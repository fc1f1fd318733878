"""Decodes batches that mix prompts, doses and random streams."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from os.path import commonprefix
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from steer_heal.model.lm import LM
from steer_heal.model.memory import decode_bytes, fewer_rows, free_unused, rows_that_fit
from steer_heal.model.prompts import require_finite, require_room
from steer_heal.model.sampling import sampler
from steer_heal.model.steering import Condition, Steering, Vector, steer, weighted

PLAUSIBLE = 0.1
"""Under a contrast only tokens are written that have at least this share of the likeliest token's probability without
it (contrastive decoding; Li et al. 2023). The difference of two small probabilities can be any number."""


class Written(NamedTuple):
    """What was decoded of one row."""

    row: int
    ids: tuple[int, ...]
    """The tokens after its prompt, including the end token."""
    hidden: Float[Tensor, "s d"]
    """Final hidden states at the position before the forced tail and at each of its tokens."""


class Part(NamedTuple):
    """A prompt that the row's tokens are read after, and the weight of its logits."""

    weight: float
    prompt_ids: tuple[int, ...]
    dose: float


@dataclass(frozen=True)
class Row:
    """One sequence to decode. What is written depends on these fields only, not on the other rows of its batch, except
    for rounding: in bfloat16 that can change a token."""

    prompt_ids: tuple[int, ...]
    dose: float = 0.0
    seed: int = 0
    others: tuple[Part, ...] = ()
    """What is added to the logits: see `Condition.terms`. All rows of a call have the same weights."""

    @classmethod
    def under(cls, condition: Condition, prompt: Callable[[str], tuple[int, ...]], seed: int = 0) -> Row:
        """A row under a condition. `prompt` gives the token ids under a system prompt."""
        own, *others = condition.terms
        parts = tuple(Part(term.weight, prompt(term.system), term.dose) for term in others)
        return cls(prompt(own.system), own.dose, seed, parts)

    @property
    def parts(self) -> tuple[Part, ...]:
        return (Part(1.0, self.prompt_ids, self.dose), *self.others)


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen."""

    max_new_tokens: int
    batch_size: int
    """Rows decoded at once. 0: as many as fit into free memory."""
    sample: bool = True
    """False: greedy decoding."""
    suppress: frozenset[int] = field(default_factory=frozenset)
    """Tokens that are never written. If they include the end tokens, every row is decoded to the maximum length."""
    on_token: Callable[[int, int], object] = lambda row, token: None
    """Called with (row within its batch, token) for each new token. An exception that it raises ends the decoding."""


def decode(lm: LM, rows: Sequence[Row], vector: Vector | None, how: Decoding) -> list[tuple[int, ...]]:
    """The token ids written after the prompt of each row, including the end token."""
    out: list[tuple[int, ...]] = [()] * len(rows)
    for batch in decode_batches(lm, rows, vector, how):
        for written in batch:
            out[written.row] = written.ids
    return out


def decode_batches(
    lm: LM, rows: Sequence[Row], vector: Vector | None, how: Decoding, tail: tuple[int, ...] = ()
) -> Iterator[list[Written]]:
    """What is written after the prompt of each row, one finished batch at a time, with `tail` forced after it.

    A batch consists of rows with similar prompt lengths. Each row has its own dose and random stream, and leaves the
    batch when it ends. A batch that does not fit into memory is halved. Because a row that ends leaves the cache, `how`
    must suppress the end tokens if there is a tail.
    """
    assert not tail or not how.max_new_tokens or lm.end_ids <= how.suppress, "a row that ends leaves the cache"

    todo = sorted(range(len(rows)), key=lambda i: (len(rows[i].prompt_ids), rows[i].prompt_ids, rows[i].dose))
    n_parts = len(rows[0].parts) if rows else 1
    longest = max((len(part.prompt_ids) for row in rows for part in row.parts), default=0) + len(tail)
    per_row = n_parts * (longest + how.max_new_tokens)
    require_room(lm, longest, how.max_new_tokens)
    config = lm.model.config.get_text_config()
    size = how.batch_size
    if not size:
        bytes_per_row = n_parts * decode_bytes(config, longest, how.max_new_tokens, lm.head.weight.element_size())
        size = rows_that_fit(len(rows), bytes_per_row, lm.device)
    while todo:
        group = todo[: max(1, int(min(size, lm.limits.decode_tokens / per_row)))]
        n_done = len(rows) - len(todo)

        def step_done(share: float, n_done: int = n_done, n: int = len(group)) -> None:
            lm.progress.at(n_done + n * share, len(rows))

        try:
            written_and_states = _decode_batch(lm, [rows[i] for i in group], vector, how, tail, step_done)
        except RuntimeError as error:
            lm.limits.decode_tokens = fewer_rows(len(group), error) * per_row
        else:
            lm.progress.at(n_done + len(group), len(rows))
            yield [Written(*each) for each in zip(group, *written_and_states, strict=True)]
            todo = todo[len(group) :]
            continue
        free_unused()


class GrowingLayer(DynamicLayer):
    """Keys and values of one block. New tokens are appended in place if there is room, otherwise all are copied."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.held: tuple[Tensor, ...] = ()
        """Keys and values, each Float[b h room d]. `self.keys` and `self.values` are views of the tokens so far."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        n = self.get_seq_length()
        end = n + key_states.shape[-2]
        if not self.held or end > self.room:
            self.room = max(end, self.room)
            self.reorder_cache(torch.arange(len(key_states), device=key_states.device))
        for held, new in zip(self.held, (key_states, value_states), strict=True):
            held[:, :, n:end] = new
        self.keys, self.values = (held[:, :, :end] for held in self.held)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Int[Tensor, " kept"]) -> None:
        if self.keys is None or self.values is None:  # the block uses the keys and values of another block
            return
        old = (self.keys, self.values)
        n = self.get_seq_length()
        self.held = tuple(x.new_empty(len(beam_idx), x.shape[1], self.room, x.shape[3]) for x in old)
        self.keys, self.values = views = tuple(held[:, :, :n] for held in self.held)
        for x, new in zip(old, views, strict=True):
            torch.index_select(x, 0, beam_idx, out=new)


class GrowingCache:
    """Keys and values of the tokens fed so far. Rows can be dropped, reordered or repeated at any time.

    `room` is the number of tokens to reserve memory for. Until it is used up, new tokens cause no copy, except in
    blocks with a sliding window.
    """

    def __init__(self, lm: LM, room: int = 0) -> None:
        self.lm = lm
        self.mask = torch.zeros((0, 0), dtype=torch.long)
        taken = inspect.signature(type(lm.text_model).forward).parameters
        self.without_attention = "cache_params" in taken and "past_key_values" not in taken
        self.cache = DynamicCache(config=lm.model.config.get_text_config())
        for i, layer in enumerate(self.cache.layers):
            if type(layer) is DynamicLayer:
                self.cache.layers[i] = GrowingLayer(room)

    def feed(self, ids: Int[Tensor, "b s"], mask: Int[Tensor, "b s"] | None = None) -> Float[Tensor, "b s d"]:
        """Final hidden states at `ids`, which continue each row.

        `mask` is 0 at padding, which may be on either side. Ignore the states at padded positions. Padding after the
        first token uses up positions of a sliding window.
        """
        mask = torch.ones_like(ids) if mask is None else mask
        if self.lm.one_by_one and len(self.mask) and ids.shape[1] > 1:
            columns = zip(ids.split(1, dim=1), mask.split(1, dim=1), strict=True)
            return torch.cat([self.feed(*column) for column in columns], dim=1)
        self.mask = torch.cat([self.mask, mask], dim=1) if len(self.mask) else mask
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]  # each row begins at 0
        if self.without_attention:  # the mask is that of the new tokens
            how = {"cache_params": self.cache, "attention_mask": mask}
        else:
            how = {"past_key_values": self.cache, "attention_mask": self.mask}
        return self.lm.text_model(input_ids=ids, position_ids=positions, use_cache=True, **how).last_hidden_state

    def n_shared(self, prompts: Sequence[tuple[int, ...]]) -> int:
        """Tokens with which all prompts begin, and which can be fed once for all of them: at least one is left to each.

        0 unless every block attends to all tokens, wherever padding is: after the first token, padding would use up a
        sliding window, blocks without attention would read it, and a bias by distance would count it.
        """
        every = self.lm.pads_inside and all(isinstance(layer, GrowingLayer) for layer in self.cache.layers)
        if len(prompts) < 2 or not every:
            return 0
        return min(len(commonprefix(prompts)), min(map(len, prompts)) - 1)

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        """Keeps the given rows, in that order. A row may be given more than once.

        Layers without keys and values, such as those of linear attention, support beam search, and no other selection.
        """
        self.cache.reorder_cache(rows)  # pyright: ignore[reportArgumentType]  any tensor of indices serves
        self.mask = self.mask[rows]


def own_tokens(rows: Sequence[Row]) -> int:
    """The number of tokens at the end of each prompt that are fed separately for each row; at least 1.

    The tokens before them are fed once for all rows with the same tokens and dose. The number is chosen to feed the
    fewest tokens in all.
    """
    ordered = sorted(rows, key=lambda row: (len(row.prompt_ids), row.dose, row.prompt_ids))
    lengths = [len(row.prompt_ids) for row in ordered]
    apart = [lengths[-1]] * (len(rows) - 1)  # with this many own tokens, a row shares its stem with the row before it
    for i, (a, b) in enumerate(pairwise(ordered)):
        if len(a.prompt_ids) == len(b.prompt_ids) and a.dose == b.dose:
            apart[i] = lengths[i] - len(commonprefix([a.prompt_ids, b.prompt_ids]))

    def n_fed(own: int) -> int:
        n_stems = 1 + sum(own < n for n in apart)
        return n_stems * (lengths[-1] - own) + len(rows) * own

    return min((n for n in (1, *apart) if 1 <= n <= lengths[0]), key=n_fed)


def _feed_prompts(cache: GrowingCache, rows: Sequence[Row], steering: Steering) -> Int[Tensor, "b s"]:
    """Feeds each prompt except its last `own_tokens`, and returns those. A stem that rows share is fed once."""
    own = own_tokens(rows)
    device = cache.lm.device
    stems = [Row(row.prompt_ids[:-own], row.dose) for row in rows]
    index = {stem: i for i, stem in enumerate(dict.fromkeys(stems))}
    longest = max(len(stem.prompt_ids) for stem in stems)
    if len(index) < len(rows) and all(stem.prompt_ids for stem in stems):
        steering.select(torch.tensor([stems.index(stem) for stem in index], device=device))
        cache.feed(_feed_prompts(cache, list(index), steering))
        repeat = torch.tensor([index[stem] for stem in stems], device=device)
        cache.select(repeat)
        steering.select(repeat)
    elif longest:
        cache.feed(*cache.lm.pad([stem.prompt_ids for stem in stems], "left"))
    return torch.tensor([row.prompt_ids[-own:] for row in rows], device=device)


@torch.no_grad()
def _decode_batch(
    lm: LM,
    rows: Sequence[Row],
    vector: Vector | None,
    how: Decoding,
    tail: tuple[int, ...],
    step_done: Callable[[float], object],
) -> tuple[list[tuple[int, ...]], Float[Tensor, "b s d"]]:
    """(token ids written, final hidden states before and at `tail`). Without a tail the states are empty.

    `step_done` is called before each step with the share of the steps that are done.
    """
    device = lm.device
    weights = [part.weight for part in rows[0].parts]
    every = [Row(row.parts[k].prompt_ids, row.parts[k].dose) for k in range(len(weights)) for row in rows]
    longest = max(len(row.prompt_ids) for row in every)
    streams = [torch.Generator().manual_seed(row.seed) for row in rows]
    drawn = [torch.rand(how.max_new_tokens, generator=stream, dtype=torch.float64) for stream in streams]
    uniforms = torch.stack(drawn).to(device)
    pick = sampler(lm.model.generation_config)
    ends = torch.tensor(sorted(lm.end_ids - how.suppress), device=device, dtype=torch.long)
    suppressed = torch.tensor(sorted(how.suppress), device=device, dtype=torch.long)
    plain = torch.tensor([vector is None or not any(part.dose for part in row.parts) for row in rows], device=device)
    active = torch.arange(len(rows), device=device)
    written: list[list[int]] = [[] for _ in rows]
    cache = GrowingCache(lm, longest + how.max_new_tokens + len(tail))
    with steer(lm, vector, [row.dose for row in every]) as steering:
        ids = _feed_prompts(cache, every, steering)
        for step in range(how.max_new_tokens):
            step_done(step / how.max_new_tokens)
            states = cache.feed(ids)[:, -1].chunk(len(weights))
            logits = lm.logits(weighted(weights, states))
            require_finite(lm, logits.amax(-1)[plain[active]])  # a dose that is too high fails the filter instead
            logits[:, suppressed] = -torch.inf
            if len(weights) > 1:
                likely = lm.logits(states[0])
                likely[:, suppressed] = -torch.inf
                logits[likely < likely.amax(-1, keepdim=True) + math.log(PLAUSIBLE)] = -torch.inf
            token = pick(logits, uniforms[active, step]) if how.sample else logits.argmax(-1)
            for b, t in zip(active.tolist(), token.tolist(), strict=True):
                written[b].append(t)
                how.on_token(b, t)
            going = ~torch.isin(token, ends)
            if not going.all():
                keep = going.nonzero()[:, 0]
                if not len(keep):
                    break
                in_every = torch.cat([keep + i * len(active) for i in range(len(weights))])
                cache.select(in_every)
                steering.select(in_every)
                active = active[keep]
                token = token[keep]
            ids = token.repeat(len(weights))[:, None]
        if not tail:
            return [tuple(row) for row in written], ids.new_empty(len(rows), 0, 0, dtype=torch.float32)
        forced = torch.tensor(tail, device=device).expand(len(every), -1)
        hidden = cache.feed(torch.cat([ids, forced], dim=1))[:, -len(tail) - 1 :]
    return [tuple(row) for row in written], weighted(weights, hidden.chunk(len(weights)))
