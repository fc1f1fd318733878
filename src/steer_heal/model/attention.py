"""Grouped-query attention on a CPU that does not expand keys and values.

`sdpa_attention_forward` of transformers expands them if there are several tokens and a mask. Without a mask it leaves
the groups to torch, which is slow for single tokens in bfloat16.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_grouped"


def pack_groups(model: PreTrainedModel) -> None:
    """Replaces transformers' scaled dot product attention by `attend`, in a model that uses it."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)


def attend(
    module: nn.Module,
    query: Float[Tensor, "b h s k"],
    key: Float[Tensor, "b g t k"],
    value: Float[Tensor, "b g t k"],
    attention_mask: Bool[Tensor, "b 1 s t"] | Float[Tensor, "b 1 s t"] | None,
    **how: Any,
) -> tuple[Float[Tensor, "b s h k"], None]:
    """Attention that arranges the queries which share keys and values as successive positions of one head.

    Unsupported calls go to transformers: those with an implied causal mask, or with a bias for each head.
    """
    b, h, s, k = query.shape
    group = h // key.shape[1]
    implied = attention_mask is None and s > 1
    by_head = attention_mask is not None and attention_mask.shape[1] > 1
    if group == 1 or implied or by_head or any(how.get(name) is not None for name in ("softcap", "position_bias")):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **how)
    mask = None if attention_mask is None else attention_mask.repeat(1, 1, group, 1)
    out = nn.functional.scaled_dot_product_attention(
        query.reshape(b, h // group, group * s, k),
        key,
        value,
        attn_mask=mask,
        dropout_p=how.get("dropout", 0.0),
        scale=how.get("scaling"),
    )
    return out.reshape(b, h, s, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
