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

from steer_heal.sampling import ROOM_FOR_TIES, candidates, inverse_cdf, sampler


def over_the_vocabulary(config: GenerationConfig, logits, uniform):
    """What transformers' own warpers leave, sampled over the whole vocabulary."""
    warpers = LogitsProcessorList(
        [TemperatureLogitsWarper(config.temperature), TopKLogitsWarper(config.top_k), TopPLogitsWarper(config.top_p)]
    )
    if config.min_p:
        warpers.append(MinPLogitsWarper(config.min_p))
    return inverse_cdf(warpers(None, logits), uniform)


@pytest.mark.parametrize("seed, min_p, coarse", [(0, None, False), (1, None, True), (2, 0.02, True)])
def test_the_likeliest_alone_give_the_token_that_the_vocabulary_gives(seed, min_p, coarse):
    generator = torch.Generator().manual_seed(seed)
    config = GenerationConfig(do_sample=True, temperature=0.7, top_k=64, top_p=0.95, min_p=min_p)
    logits = 2 * torch.randn(400, 5000, generator=generator)
    logits = logits.bfloat16().float() if coarse else logits  # bfloat16 makes many tokens tie
    uniform = torch.rand(400, generator=generator, dtype=torch.float64)
    picked = sampler(config)(logits, uniform)
    expected = over_the_vocabulary(config, logits, uniform)
    if (
        coarse
    ):  # which of several equally likely tokens falls to top-p is the sort's affair; how many of them does is not
        assert (picked == expected).double().mean() > 0.9
        cut = TopPLogitsWarper(config.top_p)
        left = [cut(None, x) for x in (candidates(logits / 0.7, 64)[0], TopKLogitsWarper(64)(None, logits / 0.7))]
        assert torch.equal(*(x.sort(-1, descending=True).values[:, :128] for x in left))
    else:
        assert torch.equal(picked, expected)
    assert len(picked.unique()) > 200


def test_tokens_that_tie_with_the_last_stay_in():
    logits = torch.full((1, 500), -5.0)
    logits[0, :3], logits[0, 100:140] = 2.0, 1.0
    kept, ids = candidates(logits, 5)
    assert ids[0][kept[0].isfinite()].tolist() == [0, 1, 2, *range(100, 140)]
    logits[0, 100 : 100 + 2 * ROOM_FOR_TIES] = 1.0  # more than there is room for: the whole vocabulary is looked at
    kept, ids = candidates(logits, 5)
    assert ids[0][kept[0].isfinite()].tolist() == [0, 1, 2, *range(100, 100 + 2 * ROOM_FOR_TIES)]


def test_draws_follow_the_distribution():
    logits = torch.tensor([0.5, 0.3, 0.2, 1e-9]).log().repeat(20_000, 1)
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for top_k, expected in ((None, [0.5, 0.3, 0.2]), (2, [0.625, 0.375, 0.0])):
        counts = (
            sampler(GenerationConfig(do_sample=True, top_k=top_k))(logits, uniform).bincount(minlength=4)[:3] / 20_000
        )
        assert counts.tolist() == pytest.approx(expected, abs=0.01)
