"""From logits to a token: the generation config's temperature, top-k, top-p and min-p, then inverse-CDF sampling.

Never a repetition penalty: it would hide over-steering from the filter and the dose controller.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.logits_process import MinPLogitsWarper

from steer_heal.errors import UserError

ROOM_FOR_TIES = 64
"""Logits in bfloat16 are often equal. If more than this many equal the last of the top k, the whole vocabulary is
used."""
NUCLEUS = 256
"""Number of likeliest tokens in which top-p is tried first. Rows in which they have too little probability use 16 times
as many."""


def sampler(config: GenerationConfig) -> Callable[[Float[Tensor, "b v"], Float[Tensor, " b"]], Int[Tensor, " b"]]:
    """A function that samples one token for each row from its logits and its own uniform number, as `config` says. A
    temperature or top-p of 0 leaves the likeliest token only."""
    if config.temperature == 0 or config.top_p == 0:
        return lambda logits, uniform: logits.argmax(-1)
    temperature = 1.0 if config.temperature is None else float(config.temperature)
    top_p = 1.0 if config.top_p is None else config.top_p
    min_p = getattr(config, "min_p", None)
    floor: Any = MinPLogitsWarper(float(min_p)) if min_p else lambda ids, logits: logits  # it ignores the tokens before

    def pick(logits: Float[Tensor, "b v"], uniform: Float[Tensor, " b"]) -> Int[Tensor, " b"]:
        if temperature != 1:
            logits = logits / temperature
        ids = None
        if config.top_k and config.top_k < logits.shape[-1]:
            logits, ids = candidates(logits, config.top_k)
        token = from_nucleus(logits, uniform, top_p, floor) if top_p < 1 else inverse_cdf(floor(None, logits), uniform)
        return token if ids is None else ids.gather(-1, token[:, None])[:, 0]

    return pick


def require_sampling(config: GenerationConfig, name: str) -> None:
    """UserError with a line for each value of the generation config that cannot be sampled with."""

    def is_number(value: object) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool)

    def is_whole(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0

    share = "a number from 0 to 1", lambda value: is_number(value) and 0 <= value <= 1
    rules: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "temperature": (
            "a finite number of 0 or more; 0 is greedy",
            lambda value: is_number(value) and 0 <= value < math.inf,
        ),
        "top_p": share,
        "min_p": share,
        "top_k": ("a whole number of 0 or more; 0 is off", is_whole),
        "eos_token_id": ("a token id or a list of them", lambda value: all(map(is_whole, _listed(value)))),
    }
    values = {field: getattr(config, field, None) for field in rules}
    wrong = [field for field, value in values.items() if value is not None and not rules[field][1](value)]
    if wrong:
        raise UserError(
            *(
                f"the generation config of {name!r} has {field} {values[field]!r:.80}: it must be {rules[field][0]}; "
                "correct generation_config.json"
                for field in wrong
            )
        )


def token_ids(value: Any) -> list[int]:
    """The token ids in a value of a generation config: an int, a list, a tensor, or None."""
    return [] if value is None else _listed(value)


def _listed(value: Any) -> list[Any]:
    value = value.tolist() if isinstance(value, Tensor) else value
    return list(value) if isinstance(value, list | tuple | set) else [value]


def from_nucleus(
    logits: Float[Tensor, "b v"], uniform: Float[Tensor, " b"], top_p: float, floor: Any, k: int = NUCLEUS
) -> Int[Tensor, " b"]:
    """One token for each row from its nucleus: the smallest set of likeliest tokens whose probability is at least
    `top_p` (Holtzman et al. 2020). The vocabulary is not sorted."""
    logp, ids = (logits - logits.logsumexp(-1, keepdim=True)).topk(min(k, logits.shape[-1]))
    p = logp.exp()
    logp = logp.masked_fill(p.cumsum(-1) - p >= top_p, -torch.inf)
    ids, order = ids.sort(-1)
    token = ids.gather(-1, inverse_cdf(floor(None, logp.gather(-1, order)), uniform)[:, None])[:, 0]
    lacking = p.sum(-1) < top_p
    if k < logits.shape[-1] and lacking.any():
        token[lacking] = from_nucleus(logits[lacking], uniform[lacking], top_p, floor, 16 * k)
    return token


def candidates(logits: Float[Tensor, "b v"], k: int) -> tuple[Float[Tensor, "b c"], Int[Tensor, "b c"]]:
    """(logits, token ids) of each row's k likeliest tokens and of all that equal the last of them, sorted by id.

    Later steps then work on about a hundred entries instead of the whole vocabulary. Up to rounding in float32 they
    sample the same token, because the cumulative sum adds the same tokens in the same order.
    """
    values, ids = logits.topk(min(k + ROOM_FOR_TIES, logits.shape[-1]))
    last = values[:, k - 1 : k]
    if (values[:, -1:] == last).any():  # more ties than there is room for
        every = torch.arange(logits.shape[-1], device=logits.device).expand_as(logits)
        return logits.masked_fill(logits < last, -torch.inf), every
    ids, order = ids.sort(-1)
    return values.masked_fill(values < last, -torch.inf).gather(-1, order), ids


def inverse_cdf(logits: Float[Tensor, "b v"], uniform: Float[Tensor, " b"]) -> Int[Tensor, " b"]:
    """The token of each row at its own uniform number, independent of the other rows."""
    cdf = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
