"""From logits to a token: the generation config's temperature, top-k, top-p and min-p, then inverse-CDF sampling.

Never a repetition penalty: it would hide over-steering from the filter and the dose controller.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.logits_process import LogitsProcessorList, MinPLogitsWarper, TemperatureLogitsWarper

ROOM_FOR_TIES = 64
"""Logits in bfloat16 often tie: more ties with the last of top-k than this, and the whole vocabulary is looked at."""
NUCLEUS = 256
"""Likeliest tokens that top-p looks at first; rows in which they do not hold its share look at 16 times as many."""


def sampler(config: GenerationConfig) -> Callable[[Float[Tensor, "b v"], Float[Tensor, " b"]], Int[Tensor, " b"]]:
    """Picks a token per row from its logits and its own uniform number, as `config` samples."""
    temper: Any = LogitsProcessorList()  # none of these looks at the ids that came before
    floor: Any = LogitsProcessorList()
    top_p = 1.0 if config.top_p is None else config.top_p
    if config.temperature is not None and config.temperature not in (0.0, 1.0):
        temper.append(TemperatureLogitsWarper(config.temperature))
    if getattr(config, "min_p", None):
        floor.append(MinPLogitsWarper(config.min_p))

    def pick(logits: Float[Tensor, "b v"], uniform: Float[Tensor, " b"]) -> Int[Tensor, " b"]:
        logits, ids = temper(None, logits), None
        if config.top_k and config.top_k < logits.shape[-1]:
            logits, ids = candidates(logits, config.top_k)
        token = from_nucleus(logits, uniform, top_p, floor) if top_p < 1 else inverse_cdf(floor(None, logits), uniform)
        return token if ids is None else ids.gather(-1, token[:, None])[:, 0]

    return pick


def from_nucleus(
    logits: Float[Tensor, "b v"], uniform: Float[Tensor, " b"], top_p: float, floor: Any, k: int = NUCLEUS
) -> Int[Tensor, " b"]:
    """A token per row from the smallest set of likeliest tokens that holds `top_p` of the probability (Holtzman et al.
    2020), without sorting the vocabulary."""
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
    """(logits, token ids) of each row's k likeliest tokens and of all that tie with the last of them, by rising id.

    What follows works on about a hundred entries instead of the vocabulary. It picks the same token up to a rounding in
    float32: the cumulative sum runs through the same tokens in the same order.
    """
    values, ids = logits.topk(min(k + ROOM_FOR_TIES, logits.shape[-1]))
    last = values[:, k - 1 : k]
    if (values[:, -1:] == last).any():  # more ties than there is room for
        return logits.masked_fill(logits < last, -torch.inf), torch.arange(
            logits.shape[-1], device=logits.device
        ).expand_as(logits)
    ids, order = ids.sort(-1)
    return values.masked_fill(values < last, -torch.inf).gather(-1, order), ids


def inverse_cdf(logits: Float[Tensor, "b v"], uniform: Float[Tensor, " b"]) -> Int[Tensor, " b"]:
    """The row's own uniform number picks its token, whatever its neighbours are."""
    cdf = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
