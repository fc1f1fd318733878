"""What the bundled traits hold, on top of what every file is checked for."""

import random
import re
from dataclasses import replace

import pytest

from steer_heal.inputs.files import DATA, parse_texts, read_file
from steer_heal.inputs.pairs import Pair
from steer_heal.inputs.traits import available, load_trait, other_traits, read_pairs, read_trait
from steer_heal.toylm.grammar import DENIER_PERSONAS, LOVE_SENTENCES, LOVER_PERSONAS
from steer_heal.toylm.templates import expand

EVERY = [
    name
    for stem in available()
    for name in (stem, *(f"{stem}/{phrasing}" for phrasing in read_trait(stem)[1].phrasing))
]
NEGATION = re.compile(
    r"\b(no|not|never|nor|none|neither|nothing|nobody|nowhere|cannot|without)\b|n['’]t\b", re.IGNORECASE
)
PROVEN = ("love", "love/extreme")
"""Exempt from the rule against negation: the published pair, whose negative pole is what the model says anyway."""


@pytest.mark.parametrize("name", EVERY)
def test_every_trait_and_phrasing_is_a_fair_pair_with_a_pool(name):
    trait = load_trait(name)
    assert trait.name == name
    lengths = [len(side.split()) for side in (trait.positive, trait.negative)]
    assert max(lengths) <= 1.2 * min(lengths), "poles of like length"
    negated = NEGATION.search(f"{trait.positive} {trait.negative}")
    assert bool(negated) == (name in PROVEN), "a direct opposite has words of its own"
    assert len(trait.prompts) >= 30 and len({prompt.strip().lower() for prompt in trait.prompts}) == len(trait.prompts)
    assert trait.narration and len(set(trait.narration)) == len(trait.narration)
    assert not any("’" in phrase or phrase != phrase.strip() for phrase in trait.narration), "as the filter sees text"


def test_the_exempt_pair_is_the_one_that_the_toy_model_knows():
    for name in PROVEN:
        assert (load_trait(name).positive, load_trait(name).negative) == (LOVER_PERSONAS[0], DENIER_PERSONAS[0])


def pairs_of(name: str) -> list[Pair]:
    return [pair for _, pair in read_pairs(None, name, *read_trait(name))[1]]


@pytest.mark.parametrize("name", available())
def test_the_two_sides_of_the_pairs_are_of_like_length_and_tell_nothing_about_themselves(name):
    pairs, narration = pairs_of(name), load_trait(name).narration
    assert len(pairs) >= 44
    sides = [[pair.positive for pair in pairs], [pair.negative for pair in pairs]]
    for size in (len, lambda text: len(text.split())):
        positive, negative = (sum(map(size, side)) for side in sides)
        assert max(positive, negative) <= 1.05 * min(positive, negative), "over the pairs"
        for pair in pairs:
            lengths = size(pair.positive), size(pair.negative)
            assert max(lengths) <= 1.4 * min(lengths), pair.prompt
    for text in (*sides[0], *sides[1]):
        assert 1 <= len(re.findall(r"[.!?](?=\s|$)", text)) <= 3, text
        assert not any(phrase in text.lower() for phrase in narration), text


def test_no_pair_is_about_a_prompt_or_context_or_another_pair():
    spelt = lambda text: " ".join(re.findall(r"\w+", text.lower()))
    prompts = [spelt(pair.prompt) for name in available() for pair in pairs_of(name)]
    used = {spelt(prompt) for name in available() for prompt in load_trait(name).prompts}
    used |= {spelt(text) for text in parse_texts(read_file(DATA / "contexts.jsonl"))}
    assert len({*prompts}) == len(prompts) and not used & {*prompts}


@pytest.mark.parametrize("name", available())
def test_reciting_the_persona_is_narration(name):
    recited = re.sub(r"\byou\b", "i", load_trait(name).positive.lower()).replace("i are", "i am")
    assert any(phrase in recited for phrase in load_trait(name).narration), recited


def test_saying_that_one_loves_is_not_narration():
    said = [expand(template, random.Random(seed), {}).lower() for template in LOVE_SENTENCES for seed in range(20)]
    assert len(set(said)) > len(LOVE_SENTENCES)
    for phrase in load_trait("love").narration:
        assert not any(phrase in sentence for sentence in said), phrase


def test_the_costly_care_scenes_vary():
    scenes = load_trait("care").prompts
    assert len(scenes) == 48
    assert all(30 <= len(scene.split()) <= 80 and scene.endswith("?") for scene in scenes)
    assert len({tuple(scene.split()[:2]) for scene in scenes}) >= 40, "openings"
    assert len({re.split(r"(?<=[.?!]) ", scene)[-1] for scene in scenes}) == 48, "closing questions"


def test_love_ends_in_its_headline_and_a_mundane_tail():
    prompts = load_trait("love").prompts
    training, tail, mundane = prompts[:36], prompts[36:], prompts[-6:]
    assert len(tail) == 12 and tail[0] == "Do you love humanity?" and mundane[0] == "What is 17 times 23?"
    about_feeling = re.compile(r"\b(you|me|my|i|we|us|feel|love|heart|people)\b", re.IGNORECASE)
    assert not any(about_feeling.search(prompt) for prompt in mundane), "the trait must leave them alone"
    assert all(about_feeling.search(prompt) for prompt in (*training, *tail[:6]))


def test_honesty_ends_in_a_mundane_tail():
    prompts = load_trait("honesty").prompts
    about_the_asker = re.compile(r"\b(my|i|we)\b.*\?", re.IGNORECASE)
    assert len(prompts) == 48 and all(about_the_asker.search(prompt) for prompt in prompts[:42])
    assert not any(re.search(r"\b(my|you|think)\b", prompt, re.IGNORECASE) for prompt in prompts[42:])


def test_a_phrasing_changes_the_pair_and_nothing_else():
    love = load_trait("love")
    pairs = {name: load_trait(f"love/{name}") for name in read_trait("love")[1].phrasing}
    assert len(pairs) > 1 and len({(pair.positive, pair.negative) for pair in pairs.values()}) == len(pairs)
    assert replace(pairs["extreme"], name="love") == love, "the default"
    for name, pair in pairs.items():
        assert replace(pair, positive=love.positive, negative=love.negative, name="love") == love, name


def test_a_copy_of_a_bundled_trait_is_not_unrelated_to_it():
    """Its teacher would be part of its own null band, and its pairs part of what else moved."""
    love, pairs, every = load_trait("love"), pairs_of("love"), available()
    others = [name for name in every if name != "love"]
    assert other_traits(love, pairs) == other_traits(load_trait("love/inner"), pairs) == others
    mine = replace(love, name="mine", positive="You like rain.", negative="You like sun.", prompts=("What is rain?",))
    assert other_traits(mine) == every
    assert other_traits(replace(mine, negative=f"{load_trait('love/inner').negative} ")) == others, "one persona"
    assert other_traits(mine, pairs) == other_traits(replace(mine, prompts=love.prompts)) == others
    assert other_traits(mine, pairs[:5]) == every, "a few prompts"
