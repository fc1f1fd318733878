"""The cache at fixed addresses, whose step a GPU captures, writes what the growing one writes."""

import dataclasses

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from steer_heal.caches import Fixed, Growing
from steer_heal.lm import LM
from steer_heal.steering import APPLICATIONS, Decoding, Row, Vector, decode

QUESTIONS = ["What is ice?", "Tell me a short story about a fox.", "What barks?", "The captain orders you to send the widows away. What do you do?", "Sing."]


@pytest.fixture(params=["toy", "gemma"])
def lm(request, toy: LM) -> LM:
    """The toy model, and a random Gemma 3 whose sliding window is shorter than its prompts."""
    if request.param == "toy":
        return dataclasses.replace(toy)
    config = Gemma3TextConfig(
        vocab_size=len(toy.tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, sliding_window=12, layer_types=["sliding_attention", "full_attention"] * 2, eos_token_id=2, pad_token_id=0, initializer_range=0.2,
    )
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(config).eval().requires_grad_(False)
    model.generation_config.update(do_sample=True, top_k=64, top_p=0.95, eos_token_id=list(range(2, len(toy.tokenizer), 40)))
    return dataclasses.replace(toy, model=model)


def _vector(lm: LM, application: str) -> Vector:
    return Vector({1: 0.5 * torch.randn(lm.width, generator=torch.Generator().manual_seed(0)), 2: torch.ones(lm.width) / 8}, application)


@pytest.mark.parametrize("application", APPLICATIONS)
@pytest.mark.parametrize("sample", [True, False], ids=["sampled", "greedy"])
def test_the_same_tokens_with_a_dose_per_row(lm: LM, application, sample):
    rows = [Row(lm.chat(text), dose=0.4 * i, seed=i) for i, text in enumerate(QUESTIONS)]
    how = Decoding(48, batch_size=5, sample=sample)
    growing = decode(lm, rows, _vector(lm, application), how)
    fixed = decode(dataclasses.replace(lm, fixed_addresses=True), rows, _vector(lm, application), how)
    assert fixed == growing
    assert len({len(ids) for ids in growing}) > 1 or not sample, "no row left before the others"


def test_the_same_logits_while_rows_leave(lm: LM):
    prompts = [lm.chat(text) for text in QUESTIONS]
    longest = max(map(len, prompts))
    ids = torch.tensor([[lm.pad_id] * (longest - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    followed = []
    caches = Growing(lm, mask, lambda rows: None), Fixed(lm, mask, 30, lambda rows: followed.append(rows.tolist()))
    left = {3: [0, 1, 2, 4], 7: [1, 3], 11: [1]}  # 5 rows, 4, then 2 (halved), then 1 (halved)
    with torch.no_grad():
        for step in range(30):
            growing, fixed = (lm.logits(cache.feed(ids)) for cache in caches)
            assert torch.allclose(growing, fixed, atol=1e-5 * growing.abs().max().item()), step
            ids = growing.argmax(-1, keepdim=True)
            if step in left:
                rows = torch.tensor(left[step])
                ids = ids[rows]
                for cache in caches:
                    cache.select(rows)
    assert followed == [[1, 4], [1]] and len(caches[1].token) == 1
    assert caches[1].cache.layers[0].keys.shape[:3] == (1, lm.model.config.num_key_value_heads, longest + 30)


def test_addresses_stay_where_they_are_until_half_the_rows_left(lm: LM):
    """What a captured graph reads and writes: were one of these made anew in a step, a replay would use the old one."""
    prompts = [lm.chat("What is ice?")] * 4
    cache = Fixed(lm, torch.ones(4, len(prompts[0]), dtype=torch.long), 8, lambda rows: None)
    with torch.no_grad():
        cache.feed(torch.tensor(prompts))
        where = lambda: [x.data_ptr() for x in (cache.real, cache.token, cache.position, cache.slot, cache.hidden)] + [
            x.data_ptr() for layer in cache.cache.layers for x in (layer.keys, layer.values, layer.cumulative_length)
        ]
        before = where()
        cache.feed(torch.full((4, 1), 7))
        cache.select(torch.tensor([0, 1, 3]))
        cache.feed(torch.full((3, 1), 8))
    assert where() == before
