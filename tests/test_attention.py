"""Grouped queries are attended to as transformers does it, forward and backward."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from steer_heal.model import attention
from steer_heal.model.attention import attend
from steer_heal.model.lm import LM

KEPT = {  # of the last `s` of 9 positions, row 1 begins 2 later; a window of 4
    "padded": torch.ones(9, 9, dtype=torch.bool).tril().expand(2, 1, 9, 9).clone(),
    "window": (torch.ones(9, 9).tril() - torch.ones(9, 9).tril(-4)).bool().expand(2, 1, 9, 9).clone(),
}
for kept in KEPT.values():
    kept[1, :, :, :2] = False


@pytest.mark.parametrize("n_groups", [1, 2, 6])
@pytest.mark.parametrize("kind, s", [("padded", 1), ("padded", 5), ("window", 3), ("none", 1), ("none", 9)])
def test_grouped_attention_is_transformers_own(kind: str, s: int, n_groups: int):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator).requires_grad_(True)
    query, key, value = draw(2, 6, s, 8), draw(2, n_groups, 9, 8), draw(2, n_groups, 9, 8)
    module: Any = nn.Module()
    module.num_key_value_groups = 6 // n_groups
    mask = KEPT[kind][:, :, -s:] if kind in KEPT else None
    theirs, ours = (way(module, query, key, value, mask, scaling=0.3)[0] for way in (sdpa_attention_forward, attend))
    assert torch.allclose(theirs, ours, atol=1e-6) and ours.shape == (2, s, 6, 8)
    gradients = [torch.autograd.grad(out.square().sum(), (query, key, value)) for out in (theirs, ours)]
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("model", ["toy", "tiny"])
def test_a_loaded_model_attends_that_way(request, monkeypatch, model):
    lm: LM = request.getfixturevalue(model)
    assert lm.model.config._attn_implementation == attention.NAME
    ids = [[5, 6, 7, 8], [9, 10, 11, 12]]
    here = lm.hidden(ids)
    lm.model.set_attn_implementation("sdpa")
    there = lm.hidden(ids)
    lm.model.set_attn_implementation(attention.NAME)
    assert torch.allclose(here, there, atol=1e-5)
