import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from steer_heal.model.sampling import ROOM_FOR_TIES, candidates, inverse_cdf, sampler


def over_the_vocabulary(config: GenerationConfig, logits, uniform):
    """What transformers' own warpers leave, sampled over the whole vocabulary."""
    warpers = [TemperatureLogitsWarper(config.temperature), TopKLogitsWarper(config.top_k)]
    warpers += [TopPLogitsWarper(config.top_p)] + ([MinPLogitsWarper(config.min_p)] if config.min_p else [])
    return inverse_cdf(LogitsProcessorList(warpers)(None, logits), uniform)


@pytest.mark.parametrize("seed, min_p, coarse", [(0, None, False), (1, None, True), (2, 0.02, True)])
def test_the_likeliest_alone_give_the_token_that_the_vocabulary_gives(seed, min_p, coarse):
    generator = torch.Generator().manual_seed(seed)
    config = GenerationConfig(do_sample=True, temperature=0.7, top_k=64, top_p=0.95, min_p=min_p)
    logits = 2 * torch.randn(400, 5000, generator=generator)
    logits = logits.bfloat16().float() if coarse else logits  # bfloat16 makes many tokens tie
    uniform = torch.rand(400, generator=generator, dtype=torch.float64)
    picked, expected = sampler(config)(logits, uniform), over_the_vocabulary(config, logits, uniform)
    assert len(picked.unique()) > 200
    if not coarse:
        assert torch.equal(picked, expected)
        return
    # which of several equally likely tokens falls to top-p is the sort's affair; how many of them does is not
    assert (picked == expected).double().mean() > 0.9
    cut = TopPLogitsWarper(config.top_p)
    left = [cut(None, x) for x in (candidates(logits / 0.7, 64)[0], TopKLogitsWarper(64)(None, logits / 0.7))]
    assert torch.equal(*(x.sort(-1, descending=True).values[:, :128] for x in left))


@pytest.mark.parametrize("n_ties", [40, 2 * ROOM_FOR_TIES], ids=["room", "the whole vocabulary is looked at"])
def test_tokens_that_tie_with_the_last_stay_in(n_ties):
    logits = torch.full((1, 500), -5.0)
    logits[0, :3], logits[0, 100 : 100 + n_ties] = 2.0, 1.0
    kept, ids = candidates(logits, 5)
    assert ids[0][kept[0].isfinite()].tolist() == [0, 1, 2, *range(100, 100 + n_ties)]


@pytest.mark.parametrize("top_k, expected", [(None, [0.5, 0.3, 0.2]), (2, [0.625, 0.375, 0.0])])
def test_draws_follow_the_distribution(top_k, expected):
    logits = torch.tensor([0.5, 0.3, 0.2, 1e-9]).log().repeat(20_000, 1)
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = sampler(GenerationConfig(do_sample=True, top_k=top_k))(logits, uniform)
    assert (drawn.bincount(minlength=4)[:3] / 20_000).tolist() == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0], ids=["flat", "wide", "peaked"])
def test_a_nucleus_is_the_one_that_sorting_the_vocabulary_gives(spread):
    generator = torch.Generator().manual_seed(3)
    config = GenerationConfig(do_sample=True, temperature=0.7, top_p=0.9)
    noise = torch.randn(2, 200, 5000, generator=generator, dtype=torch.float64)  # in float32 cumulative sums round
    logits = spread * noise[0] + 1e-3 * noise[1]
    uniform = torch.rand(200, generator=generator, dtype=torch.float64)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.7), TopPLogitsWarper(0.9)])
    expected = inverse_cdf(warpers(None, logits), uniform)
    assert torch.equal(sampler(config)(logits, uniform), expected)
