import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

from steer_heal import traits
from steer_heal.records import FOUNDATIONS, UserError
from steer_heal.toylm.grammar import DENIER_PERSONAS, LOVE_SENTENCES, LOVER_PERSONAS
from steer_heal.toylm.templates import expand
from steer_heal.traits import available, load_trait, phrasings

EVERY = [name for stem in available() for name in (stem, *(f"{stem}/{phrasing}" for phrasing in phrasings(stem)))]
NEGATION = re.compile(
    r"\b(no|not|never|nor|none|neither|nothing|nobody|nowhere|cannot|without)\b|n['’]t\b", re.IGNORECASE
)
PROVEN = ("love", "love/extreme")
"""Exempt from the rule against negation: the published pair, whose negative pole is what the model says of itself anyway."""


@pytest.mark.parametrize("name", EVERY)
def test_every_trait_and_phrasing_is_a_fair_pair_with_a_pool(name):
    trait = load_trait(name)
    assert trait.name == name and trait.target in FOUNDATIONS and trait.sign in (-1, 1)
    assert trait.positive != trait.negative
    lengths = [len(side.split()) for side in (trait.positive, trait.negative)]
    assert max(lengths) <= 1.2 * min(lengths), "poles of like length"
    assert len(trait.prompts) >= 30 and len({prompt.strip().lower() for prompt in trait.prompts}) == len(trait.prompts)
    assert trait.narration and len(set(trait.narration)) == len(trait.narration)
    assert all(phrase == phrase.lower().strip() and "’" not in phrase for phrase in trait.narration), (
        "as the filter sees text"
    )


@pytest.mark.parametrize("name", sorted(set(EVERY) - set(PROVEN)))
def test_no_pole_is_a_negation_of_the_other(name):
    trait = load_trait(name)
    assert not NEGATION.search(f"{trait.positive} {trait.negative}"), "a direct opposite has words of its own"


@pytest.mark.parametrize("name", PROVEN)
def test_the_one_exempt_pair_is_the_proven_one_that_the_toy_model_knows(name):
    trait = load_trait(name)
    assert (trait.positive, trait.negative) == (LOVER_PERSONAS[0], DENIER_PERSONAS[0])
    assert NEGATION.search(trait.negative), "without a negation it needs no exemption"


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
    assert all(30 <= len(scene.split()) <= 80 for scene in scenes)
    assert len({tuple(scene.split()[:2]) for scene in scenes}) >= 40, "openings"
    assert len({re.split(r"(?<=[.?!]) ", scene)[-1] for scene in scenes}) == 48, "closing questions"
    assert all(scene.endswith("?") for scene in scenes)


def test_love_ends_in_its_headline_and_a_mundane_tail():
    prompts = load_trait("love").prompts
    training, tail, mundane = prompts[:36], prompts[36:], prompts[-6:]
    assert len(tail) == 12 and tail[0] == "Do you love humanity?" and mundane[0] == "What is 17 times 23?"
    about_feeling = re.compile(r"\b(you|me|my|i|we|us|feel|love|heart|people)\b", re.IGNORECASE)
    assert not any(about_feeling.search(prompt) for prompt in mundane), "the trait must leave them alone"
    assert all(about_feeling.search(prompt) for prompt in (*training, *tail[:6]))


def test_a_phrasing_changes_the_pair_and_nothing_else():
    love = load_trait("love")
    assert (
        phrasings("love") == ["trait", "state", "directive", "disposition", "inner", "extreme", "pretend"]
        and phrasings("authority") == []
    )
    pairs = {name: load_trait(f"love/{name}") for name in phrasings("love")}
    assert len({(pair.positive, pair.negative) for pair in pairs.values()}) == 7
    assert replace(pairs["extreme"], name="love") == love, "the default"
    for name, pair in pairs.items():
        assert replace(pair, positive=love.positive, negative=love.negative, name="love") == love, name
    assert love.steered_system == "You are dreaming." and love.plain_system == ""


@pytest.mark.parametrize(
    "name, message",
    [
        ("authoritie", "must be one of .*authority"),
        ("love/outer", "no phrasing 'outer'; its phrasings are trait, .*, pretend"),
        ("love/", "no phrasing ''; its phrasings are trait"),
        ("authority/inner", "'authority' has no phrasing 'inner'; that file has one persona pair"),
        ("authority/", "that file has one persona pair"),
    ],
)
def test_an_unknown_trait_or_phrasing_names_the_known_ones(name, message):
    with pytest.raises(UserError, match=message):
        load_trait(name)


def test_a_bad_phrasing_and_a_bad_pool_are_said_together(tmp_path):
    (tmp_path / "pool.jsonl").write_text('{"text": 1}\n')
    with pytest.raises(UserError) as raised:
        load_trait("love/outer", tmp_path / "pool.jsonl")
    first, second = raised.value.problems
    assert "no phrasing 'outer'" in first and "pool.jsonl line 1" in second


@pytest.mark.parametrize(
    "stem, old, new, message",
    [
        ("authority", 'target = "authority"', 'target = "power"', "mine.toml: target is 'power'"),
        ("authority", "sign = -1", "sign = 0", "sign is 0"),
        ("authority", "sign = -1", "sign = [", "is not TOML"),
        ("authority", "positive = ", "# positive = ", r"mine.toml \[persona\]: 'positive' is None"),
        ("authority", 'plain = ""', "plain = 1", r"mine.toml \[system\]: 'plain' is 1: it must be a str"),
        ("authority", '"i am someone who"', "7", "'narration' is .*: it must be a list of strings"),
        (
            "authority",
            "positive = ",
            "positiv = ",
            r"mine.toml \[persona\]: 'positiv' is not a field here; did you mean 'positive'",
        ),
        (
            "authority",
            "steered = ",
            "stered = ",
            r"mine.toml \[system\]: 'stered' is not a field here; did you mean 'steered'",
        ),
        (
            "authority",
            "description = ",
            "descripton = ",
            "mine.toml: 'descripton' is not a field here; did you mean 'description'",
        ),
        ("authority", "[persona]", "[personas]", "'personas' is not a field here; did you mean 'persona'"),
        (
            "authority",
            "sign = -1",
            "sign = -1\nxyzzy = 3",
            "'xyzzy' is not a field here; the fields are description, target",
        ),
        ("authority", "sign = -1", "sign = true", "'sign' is True: it must be a int"),
        ("authority", '"i am someone who"', '"I am someone who"', "write it in lower case"),
        ("authority", '"i am someone who"', '""', "narration holds ''"),
        (
            "authority",
            "positive = ",
            'positive = ""\n# ',
            r"\[persona\]: positive and negative must be two different texts",
        ),
        (
            "love",
            "default_phrasing",
            "default_phrase",
            "'default_phrase' is not a field here; did you mean 'default_phrasing'",
        ),
        ("love", '"extreme"', '"outer"', "default_phrasing is 'outer': it must be one of trait, state"),
        (
            "love",
            "[phrasing.pretend]\npositive",
            "[phrasing.pretend]\nnegativ",
            r"\[phrasing.pretend\]: 'negativ' .* did you mean 'negative'",
        ),
        ("love", "[system]", '[persona]\npositive = "a"\nnegative = "b"\n[system]', "'persona' is not a field here"),
        (
            "love",
            "[phrasing.trait]",
            "[phrasing]\ntrait = 1\n[phrasing.also]",
            r"\[phrasing.trait\] is 1: it must be a table with positive and negative",
        ),
    ],
)
def test_a_broken_trait_file_names_the_field_and_the_nearest(tmp_path, monkeypatch, stem, old, new, message):
    text = (traits.TRAITS / f"{stem}.toml").read_text()
    assert old in text
    (tmp_path / "mine.toml").write_text(text.replace(old, new, 1))
    monkeypatch.setattr(traits, "TRAITS", tmp_path)
    with pytest.raises(UserError, match=message):
        load_trait("mine")


def test_all_that_is_wrong_with_a_trait_file_is_said_at_once(tmp_path, monkeypatch):
    text = (traits.TRAITS / "authority.toml").read_text()
    for old, new in (
        ('target = "authority"', 'target = "power"'),
        ("sign = -1", "sign = 2"),
        ("positive = ", "positiv = "),
        ("plain = ", "plan = "),
    ):
        text = text.replace(old, new, 1)
    (tmp_path / "mine.toml").write_text(text)
    monkeypatch.setattr(traits, "TRAITS", tmp_path)
    with pytest.raises(UserError) as error:
        load_trait("mine")
    told = str(error.value).split("\n")
    assert [
        word
        for word in ("plan", "plain", "positiv", "positive", "power", "sign is 2")
        if not any(f"{word}" in line for line in told)
    ] == []
    assert len(told) == 6 and all("mine.toml" in line for line in told)


def test_two_personas_that_are_one_are_refused(tmp_path, monkeypatch):
    text = (traits.TRAITS / "authority.toml").read_text()
    same = re.search(r"^positive = (.*)$", text, re.MULTILINE).group(1)
    (tmp_path / "mine.toml").write_text(
        re.sub(r"^negative = .*$", lambda _: f"negative = {same}", text, count=1, flags=re.MULTILINE)
    )
    monkeypatch.setattr(traits, "TRAITS", tmp_path)
    with pytest.raises(UserError, match=r"\[persona\]: positive and negative must be two different texts"):
        load_trait("mine")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"\xef\xbb\xbf" + b'{"text": "a"}\r\n{"text": "b"}\r\n', None),
        (b'{"text": "a"}\n{"text": "\xff"}\n', r"line 2 is not UTF-8 \(byte 0xff\)"),
        ('{"text": "a"}'.encode("utf-16"), "line 1 is not UTF-8"),
        (b"[" * 100_000, "line 1 is not JSON"),
        (b'{"text": "a"}\n{"text": 1' + b"0" * 5000 + b"}", "line 2 is not JSON"),
        (b"\n \n", "holds no rows"),
        (b'{"text": ""}\n{"txt": "a"}', "line 1: field 'text' is ''.*\n.*line 2: field 'text' is None"),
        (b"null\n", "line 1 is NoneType"),
        (b'{"text": "a \\ud800 b"}', "line 1: field 'text' .* half of a surrogate pair"),
    ],
)
def test_a_file_of_prompts_names_its_bad_lines(content, message, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    if message is None:
        assert load_trait("love", path).prompts == ("a", "b")
        return
    with pytest.raises(UserError, match=message):
        load_trait("love", path)


def test_a_folder_in_place_of_a_trait_is_one_clear_error(tmp_path, monkeypatch):
    (tmp_path / "mine.toml").mkdir()
    monkeypatch.setattr(traits, "TRAITS", tmp_path)
    with pytest.raises(UserError, match="mine.toml cannot be read"):
        load_trait("mine")


@pytest.fixture
def pools(tmp_path):
    """A folder with a pool for love and one for care."""
    for stem in ("love", "care"):
        (tmp_path / f"{stem}.jsonl").write_text("".join(json.dumps({"text": f"{stem} {i}"}) + "\n" for i in range(3)))
    return tmp_path


@pytest.mark.parametrize("name", ["love", "love/inner", "care"])
def test_a_folder_of_prompts_serves_each_trait_its_own(pools, name):
    stem = name.split("/")[0]
    assert (
        load_trait(name, pools).prompts
        == load_trait(name, pools / f"{stem}.jsonl").prompts
        == tuple(f"{stem} {i}" for i in range(3))
    )


def test_a_folder_is_found_in_the_checkout_from_anywhere(pools, monkeypatch):
    monkeypatch.setattr(traits, "ROOT", pools.parent)
    monkeypatch.chdir("/")
    assert load_trait("love", Path(pools.name)).prompts[0] == "love 0"


def test_a_pool_that_is_missing_names_the_file_and_those_there_are(pools, tmp_path_factory):
    with pytest.raises(UserError, match="has no authority.jsonl; its pools are care, love"):
        load_trait("authority", pools)
    with pytest.raises(UserError, match="has no love.jsonl; its pools are none"):
        load_trait("love", tmp_path_factory.mktemp("empty"))
    with pytest.raises(UserError, match="no such file"):
        load_trait("love", pools / "lve.jsonl")
