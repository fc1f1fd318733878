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

from steer_heal.errors import UserError
from steer_heal.model.lm import wrap
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


OWN_WARPERS = {"temperature": TemperatureLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}


@pytest.mark.parametrize("field, value", [("temperature", 1e-4), ("temperature", 0.0), ("top_p", 0.0), ("min_p", 1.0)])
def test_the_end_of_a_range_is_greedy_as_transformers_own_warper_leaves_one_token(field, value):
    logits = 2 * torch.randn(50, 300, generator=torch.Generator().manual_seed(0))
    uniform = torch.rand(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    own = 1e-4 if (field, value) == ("temperature", 0.0) else value  # transformers refuses 0, the limit of this
    warped = OWN_WARPERS[field](own)(None, logits)
    expected = inverse_cdf(warped, uniform)
    assert torch.equal(expected, logits.argmax(-1)) and len(expected.unique()) > 20
    assert torch.equal(sampler(GenerationConfig(do_sample=True, **{field: value}))(logits, uniform), expected)


@pytest.mark.parametrize(
    "field, value, limit",
    [
        ("temperature", -1.0, "0 is greedy"),
        ("temperature", float("inf"), "0 is greedy"),
        ("temperature", "hot", "0 is greedy"),
        ("top_p", 1.5, "from 0 to 1"),
        ("top_p", -0.1, "from 0 to 1"),
        ("top_p", float("nan"), "from 0 to 1"),
        ("min_p", 2.0, "from 0 to 1"),
        ("top_k", -3, "0 is off"),
        ("top_k", 2.5, "0 is off"),
        ("eos_token_id", "</s>", "a token id"),
        ("eos_token_id", [1, -2], "a token id"),
    ],
)
def test_a_value_out_of_range_is_refused_at_load(tiny, field, value, limit):
    setattr(tiny.model.generation_config, field, value)
    with pytest.raises(UserError) as refused:
        wrap(tiny.model, tiny.tokenizer, "mine")
    (line,) = refused.value.problems
    assert f"'mine' has {field} {value!r}" in line and limit in line and "generation_config.json" in line


@pytest.mark.parametrize("value", [7, [7, 9], (7, 9), torch.tensor(7), torch.tensor([7, 9]), None])
def test_the_end_tokens_may_be_of_any_type(tiny, value):
    tiny.model.generation_config.eos_token_id = value
    own = {tiny.tokenizer.eos_token_id}
    given = set() if value is None else {*torch.as_tensor(value).flatten().tolist()}
    assert wrap(tiny.model, tiny.tokenizer, "mine").end_ids == own | given


@pytest.mark.parametrize("values", [{"temperature": 2}, {"min_p": 1}, {"temperature": 2, "min_p": 0, "top_p": 1}])
def test_whole_numbers_are_sampled_with_as_the_same_numbers_with_a_point(values):
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    uniform = torch.rand(6, generator=torch.Generator().manual_seed(1))
    both = [values, {name: float(value) for name, value in values.items()}]
    found = [sampler(GenerationConfig(do_sample=True, **each))(logits.clone(), uniform) for each in both]
    assert torch.equal(*found)
