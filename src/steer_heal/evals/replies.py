"""The likelihood of given replies: how likely each is where a conversation leaves off, and which of two is likelier."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from steer_heal.inputs.pairs import Pair
from steer_heal.model.decode import GrowingCache
from steer_heal.model.lm import LM
from steer_heal.model.prompts import require_finite, require_room
from steer_heal.model.steering import Condition, steer, weighted
from steer_heal.records import Conversation, alone


def reply_logp(
    lm: LM, conversations: Sequence[Conversation], replies: Sequence[Sequence[Sequence[int]]], condition: Condition
) -> Float[Tensor, "i w"]:
    """log p of the w replies (the sum over its tokens) to each of i conversations under `condition`, in nats.
    `replies`: token ids, as `LM.encode_reply` gives them.

    The model runs over each conversation once. The replies continue from its cache, each as a row.
    """
    n = max(map(len, replies), default=0)
    out = torch.full((len(conversations), n), torch.nan, dtype=torch.float64)

    def take(group: list[int], states: Tensor, ids: Tensor, real: Tensor) -> None:
        logp = torch.zeros(ids.shape, dtype=torch.float64)
        logp[real.cpu()] = -lm.nll(states[real], ids[real].tolist()).double().cpu()
        out[group] = logp.sum(-1).view(len(group), n)

    _each_batch(lm, conversations, replies, condition, take)
    return out


def reply_states(
    lm: LM, conversations: Sequence[Conversation], replies: Sequence[Sequence[Sequence[int]]], condition: Condition
) -> list[list[Float[Tensor, "_ d"]]]:
    """The final hidden states before each token of the replies of `reply_logp`, on the CPU."""
    n = max(map(len, replies), default=0)
    out: list[list[Tensor]] = [[] for _ in conversations]

    def take(group: list[int], states: Tensor, ids: Tensor, real: Tensor) -> None:
        rows = [state[mask].to("cpu", copy=True) for state, mask in zip(states, real, strict=True)]
        for k, i in enumerate(group):
            out[i] = rows[k * n : (k + 1) * n]

    _each_batch(lm, conversations, replies, condition, take)
    return out


@torch.no_grad()
def _each_batch(
    lm: LM,
    conversations: Sequence[Conversation],
    replies: Sequence[Sequence[Sequence[int]]],
    condition: Condition,
    take: Callable[[list[int], Tensor, Tensor, Tensor], None],
) -> None:
    """Calls `take` for each batch with the indices of its conversations, the final states before each token of their
    replies [b s d], the token ids [b s], and what of them is not padding [b s]. The batch can come again in halves."""
    terms = condition.terms
    prompts = [[lm.prompt(each, term.system) for each in conversations] for term in terms]
    n = max(map(len, replies), default=0)
    longest = [max(map(len, own)) for own in replies]

    def read(asked: list[tuple[int, ...]], every: Tensor, real: Tensor, dose: float) -> Float[Tensor, "b s d"]:
        """The final states before each token of the replies `every`, of which n go on from each prompt."""
        rows = torch.arange(len(asked), device=lm.device).repeat_interleave(n)
        cache = GrowingCache(lm, max(map(len, asked)) + every.shape[1] - 1)
        n_shared = cache.n_shared(asked)
        with steer(lm, condition.vector, [dose] * len(asked)) as steering:
            if n_shared:
                steering.select(rows[:1])
                cache.feed(*lm.pad([asked[0][:n_shared]]))
                cache.select(torch.zeros_like(rows[::n]))
                steering.select(torch.zeros_like(rows[::n]))
            last = cache.feed(*lm.pad([prompt[n_shared:] for prompt in asked], "left"))[:, -1]
            cache.select(rows)
            steering.select(rows)
            before = last[rows, None]
            if every.shape[1] > 1:
                before = torch.cat([before, cache.feed(every[:, :-1], real[:, :-1])], dim=1)
        return before

    def work(group: list[int]) -> None:
        every, real = lm.pad([reply for i in group for reply in replies[i]])
        readings = zip(prompts, terms, strict=True)
        states = [read([asked[i] for i in group], every, real, term.dose) for asked, term in readings]
        take(group, weighted(condition.weights, states), every, real.bool())

    lengths = [max(map(len, asked)) for asked in zip(*prompts, strict=True)]
    for length, room in zip(lengths, longest, strict=True):
        require_room(lm, length, room, "")
    lm.in_batches([n * (length + room) for length, room in zip(lengths, longest, strict=True)], work)


def margins(
    lm: LM, conversations: Sequence[Conversation], replies: Sequence[tuple[str, str]], condition: Condition
) -> list[float]:
    """For each conversation, the mean over tokens of log p(first reply) minus that of log p(second reply), in nats per
    token.

    The replies are the assistant's under `condition`, without the token that ends the turn. NaN: no value. UserError if
    a model without steering gives one.
    """
    asked = zip(conversations, replies, strict=True)
    ids = [[lm.encode_reply(text, each.prefill) for text in both] for each, both in asked]
    logp = reply_logp(lm, conversations, ids, condition)
    if not condition.dose:
        require_finite(lm, logp)
    first, second = (logp / torch.tensor([[*map(len, both)] for both in ids])).unbind(1)
    return (first - second).tolist()


def pair_margins(
    lm: LM, pairs: Sequence[Pair], condition: Condition, asked: Callable[[str], Conversation] = alone
) -> list[float]:
    """For each contrast pair, the margin of the positive reply over the negative one. `asked` makes a conversation of
    the prompt."""
    conversations = [asked(pair.prompt) for pair in pairs]
    return margins(lm, conversations, [(pair.positive, pair.negative) for pair in pairs], condition)


def won(margins: Sequence[float]) -> list[float]:
    """1 for each margin above 0, otherwise 0. NaN: no value."""
    return [math.nan if math.isnan(margin) else float(margin > 0) for margin in margins]
