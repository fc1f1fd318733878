"""Data files are parsed once; every bad field of every file is named with its line and the nearest known name."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from steer_heal.errors import UserError
from steer_heal.inputs import load_inputs, traits
from steer_heal.inputs.files import ROOT, parse_texts, read_file
from steer_heal.inputs.instruments import parse_instrument, parse_vignettes
from steer_heal.inputs.traits import load_trait, prompts_file
from steer_heal.presets import FAST_DEV_PRESET

TRAIT = ROOT / "data/traits/authority.toml"
INSTRUMENT = ROOT / "data/toylm/instrument.toml"


def assert_told(load, file: str, expected: list[str]):
    """`load` ends in one line for each of `expected`, and each names the file."""
    with pytest.raises(UserError) as error:
        load()
    told = error.value.problems
    assert len(told) == len(expected), told
    assert all(file in line and part in line for line, part in zip(told, expected, strict=True)), told


def changed(path: Path, *changes: tuple[str, str]) -> str:
    text = path.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    return text


# --- traits ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "stem, old, new, expected",
    [
        ("authority", "sign = -1", "sign = 0", ["'sign' is 0: it must be -1 or 1"]),
        ("authority", "sign = -1", "sign = [", ["is not TOML"]),
        ("authority", "sign = -1", "sgin = -1", ["'sign' is missing", "'sgin' is not a field here; did you mean 'sig"]),
        ("authority", "sign = -1", "xyzzy = 3\nsign = -1", ["'xyzzy' is not a field here; it must be one of desc"]),
        ("authority", "positive = ", "# positive = ", ["'persona.positive' is missing"]),
        ("authority", "positive = ", 'positive = ""\n# ', ["'persona.positive' is ''"]),
        ("authority", "steered = ", "stered = ", ["'system.steered' is missing", "did you mean 'steered'?"]),
        ("authority", 'plain = ""', "plain = 1", ["'system.plain' is 1: it must be a valid string"]),
        ("authority", '"i am someone who"', "7", ["'narration.0' is 7"]),
        ("authority", '"i am someone who"', '"I am someone who"', ["write it in lower case"]),
        ("authority", '"i am someone who"', '" "', ["narration holds ' '"]),
        ("authority", '"authority_nats"', '"care_nats"', ["off_targets holds the target 'care_nats'"]),
        ("authority", "[persona]", "[personas]", ["did you mean 'persona'?"]),
        ("love", "default_phrasing", "default_phrase", ["did you mean 'default_phrasing'?"]),
        ("love", '"extreme"', '"outer"', ["default_phrasing is 'outer': it must be one of trait, state"]),
        ("love", "[system]", '[persona]\npositive = "a"\nnegative = "b"\n[system]', ["give either [persona], or"]),
        ("love", "[phrasing.trait]", "[phrasing]\ntrait = 1\n[phrasing.also]", ["'phrasing.trait' is 1"]),
        ("love", "pretend]\npositive", "pretend]\nnegativ", ["pretend.positive' is missing", "you mean 'negative'?"]),
    ],
)
def test_a_broken_trait_file_names_the_field_and_the_nearest(tmp_path, monkeypatch, stem, old, new, expected):
    (tmp_path / "mine.toml").write_text(changed(ROOT / f"data/traits/{stem}.toml", (old, new)))
    monkeypatch.setattr(traits, "TRAITS", tmp_path)
    assert_told(lambda: load_trait("mine"), "mine.toml", expected)


def test_all_that_is_wrong_with_a_trait_file_is_said_at_once(tmp_path, monkeypatch):
    wrong = [("sign = -1", "sign = 2"), ("positive = ", "positiv = "), ("plain = ", "plan = ")]
    (tmp_path / "mine.toml").write_text(changed(TRAIT, *wrong))
    monkeypatch.setattr(traits, "TRAITS", tmp_path)
    expected = ["sign", "system.plain' is missing", "'plain'?", "persona.positive' is missing", "'positive'?"]
    assert_told(lambda: load_trait("mine"), "mine.toml", expected)


def test_two_personas_that_are_one_are_refused(tmp_path, monkeypatch):
    same = [("positive = ", 'positive = "You are kind."\n# '), ("negative = ", 'negative = " You are kind. "\n# ')]
    (tmp_path / "mine.toml").write_text(changed(TRAIT, *same))
    monkeypatch.setattr(traits, "TRAITS", tmp_path)
    assert_told(lambda: load_trait("mine"), "mine.toml", ["two different texts"])


def test_a_folder_in_place_of_a_trait_is_one_clear_error(tmp_path, monkeypatch):
    (tmp_path / "mine.toml").mkdir()
    monkeypatch.setattr(traits, "TRAITS", tmp_path)
    assert_told(lambda: load_trait("mine"), "mine.toml", ["cannot be read"])


@pytest.mark.parametrize(
    "name, expected",
    [
        ("authoritie", "did you mean 'authority'?"),
        ("love/outer", "there is no phrasing 'outer'; it must be one of trait, state"),
        ("love/iner", "did you mean 'inner'?"),
        ("love/", "there is no phrasing ''; it must be one of trait"),
        ("authority/inner", "that file has one persona pair"),
        ("authority/", "that file has one persona pair"),
        ("../authority", "trait is '..'"),
    ],
)
def test_an_unknown_trait_or_phrasing_names_the_known_ones(name, expected):
    assert_told(lambda: load_trait(name), "trait is", [expected])


# --- prompts -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "content, expected",
    [
        (b'{"text": "a"}\n{"text": "\xff"}\n', ["line 2 is not UTF-8 (byte 0xff)"]),
        ('{"text": "a"}'.encode("utf-16"), ["line 1 is not UTF-8"]),
        (b"[" * 100_000, ["line 1 is '[[["]),
        (b'{"text": "a"}\n{"text": 1' + b"0" * 5000 + b"}", ["line 2 is"]),
        (b"\n \n", ["holds no rows"]),
        (b'{"text": ""}\n{"text": "a"}\n{"txt": "a"}', ["line 1: 'text' is ''", "line 3: 'text' is missing"]),
        (b"null\n", ["line 1 is None"]),
        (b'{"text": "a \\ud800 b"}', ["line 1 is"]),
    ],
)
def test_a_file_of_prompts_names_its_bad_lines(content, expected, tmp_path):
    (tmp_path / "p.jsonl").write_bytes(content)
    assert_told(lambda: parse_texts(read_file(tmp_path / "p.jsonl")), "p.jsonl", expected)


def test_byte_order_marks_crlf_and_blank_lines_do_not_matter(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(b"\xef\xbb\xbf" + b'{"text": "a"}\r\n\r\n{"text": "b"}\r\n')
    assert parse_texts(read_file(tmp_path / "p.jsonl")) == ("a", "b")


def test_a_folder_of_prompts_serves_each_trait_its_own(tmp_path, monkeypatch):
    for stem in ("love", "care"):
        (tmp_path / f"{stem}.jsonl").write_text(json.dumps({"text": stem}) + "\n")
    for name, prompts in {"love": "love", "love/inner": "love", "care": "care"}.items():
        assert load_trait(name, read_file(prompts_file(tmp_path, name))).prompts == (prompts,)
    assert_told(lambda: prompts_file(tmp_path, "authority"), "authority.jsonl", ["its pools are care, love"])
    assert_told(lambda: prompts_file(tmp_path / "lve.jsonl", "love"), "lve.jsonl", ["no such file"])
    (tmp_path / "empty").mkdir()
    assert_told(lambda: prompts_file(tmp_path / "empty", "love"), "love.jsonl", ["its pools are none"])
    monkeypatch.setattr(traits, "ROOT", tmp_path.parent)
    monkeypatch.chdir("/")
    assert prompts_file(Path(tmp_path.name), "love") == tmp_path / "love.jsonl", "found in the checkout from anywhere"


# --- vignettes and instruments -----------------------------------------------------------------------------------
def vignette(**given) -> str:
    return json.dumps({"id": "a", "foundation_coarse": "care", "text": "x"} | given) + "\n"


@pytest.mark.parametrize(
    "content, expected",
    [
        (vignette(foundation_coarse="Cares") + '{"id": "a"\n\n[]\n', ["line 1: 'foundation_co", "line 2 is", "line 4"]),
        (vignette() + vignette(id="b", also="loyal"), ["line 2: 'also': foundation 'loyal' is unknown; did you mean"]),
        (vignette() * 2, ["line 2: id 'a' was used before"]),
        (vignette(id=1, foundation_coarse=3, text=""), ["'id' is 1", "'foundation_coarse' is 3", "'text' is ''"]),
    ],
)
def test_a_file_of_vignettes_names_its_bad_lines(content, expected, tmp_path):
    (tmp_path / "v.jsonl").write_text(content)
    assert_told(lambda: parse_vignettes(read_file(tmp_path / "v.jsonl")), "v.jsonl", expected)


def test_names_of_foundations_are_read_in_any_case_and_further_fields_are_left_alone(tmp_path):
    (tmp_path / "v.jsonl").write_text(vignette(foundation_coarse="SocialNorms", also="Loyalty", source="here"))
    (read,) = parse_vignettes(read_file(tmp_path / "v.jsonl"))
    assert (read.foundation, read.also) == ("social", "loyalty")


@pytest.mark.parametrize(
    "old, new, expected",
    [
        ("nudge", "nugde", ["'nudge' is missing", "'nugde' is not a field here; did you mean 'nudge'?"]),
        ("{index}", "", ["'option' lacks {index}"]),
        ("{schema}", "", ["'prompt' lacks {schema}"]),
        ('"social"]', '"socal"]', ["order must name the seven answers"]),
        ('order = ["care", ', 'order = ["care", "care", ', ["order must name the seven answers"]),
        ('care = "harm"', "", ["[gloss] must name the seven answers"]),
        ('prefill = \'{"violation": "\'', 'prefill = ""', ["'prefill' is ''"]),
    ],
)
def test_a_broken_instrument_names_the_field(old, new, expected, tmp_path):
    (tmp_path / "i.toml").write_text(changed(INSTRUMENT, (old, new)))
    assert_told(lambda: parse_instrument(read_file(tmp_path / "i.toml")), "i.toml", expected)


def test_an_option_lists_every_answer_in_the_order_of_its_frame():
    instrument = parse_instrument(read_file(INSTRUMENT))
    first, second = (instrument.question("A scene.", order).split("\n") for order in instrument.frames)
    assert first[0] == "A scene." and first[1:] == [
        f"{i} {instrument.gloss[n]}" for i, n in enumerate(instrument.order)
    ]
    assert [line[2:] for line in second[1:]] == [line[2:] for line in first[:0:-1]]


# --- all of them -------------------------------------------------------------------------------------------------
def test_evaluation_prompts_are_never_trained_on(tmp_path):
    inputs = load_inputs(FAST_DEV_PRESET)
    assert inputs.prompts and inputs.eval_prompts and not {*inputs.prompts} & {*inputs.eval_prompts}
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"text": f"prompt {i % 40}"}) + "\n" for i in range(41)))
    cfg = replace(FAST_DEV_PRESET, gen=replace(FAST_DEV_PRESET.gen, prompts=tmp_path / "p.jsonl"))
    assert_told(lambda: load_inputs(cfg), "authority", ["'prompt 0' 2 times"])
    few = replace(cfg, gen=replace(cfg.gen, prompts=None, n_prompts=1000))
    assert_told(lambda: load_inputs(few), "authority", ["1000 + 4 = 1004"])


def test_contexts_are_spaced_evenly_over_their_file(tmp_path):
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": str(i)}) + "\n" for i in range(10)))
    cfg = replace(FAST_DEV_PRESET, steer=replace(FAST_DEV_PRESET.steer, contexts=tmp_path / "c.jsonl", n_contexts=5))
    assert load_inputs(cfg).contexts == ("0", "2", "4", "6", "8")
    more = replace(cfg, steer=replace(cfg.steer, n_contexts=11))
    assert_told(lambda: load_inputs(more), "c.jsonl", ["steer.n_contexts is 11"])


def test_relative_paths_are_found_in_the_checkout_from_anywhere(monkeypatch):
    here = load_inputs(FAST_DEV_PRESET)
    monkeypatch.chdir("/")
    assert load_inputs(FAST_DEV_PRESET) == here
