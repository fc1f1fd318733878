"""Data files are parsed once; every bad field of every file is named with its line and the nearest known name."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from steer_heal.errors import UserError
from steer_heal.inputs import load_inputs, traits
from steer_heal.inputs.alike import alike
from steer_heal.inputs.files import DATA, parse_texts, read_file
from steer_heal.inputs.instruments import parse_instrument, parse_vignettes
from steer_heal.inputs.pairs import held_out, parse_pairs
from steer_heal.inputs.traits import load_trait, prompts_file
from steer_heal.presets import FAST_DEV_PRESET, PRESETS

TRAIT = DATA / "traits/authority.toml"
TOML_PAIR = 'prompt = "a"\npositive = "b"\nnegative = "c"\n'
INSTRUMENT = DATA / "toylm/instrument.toml"


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
        ("authority", "sign = -1", "sign = 0", ["'sign' is 0: choose from -1, 1"]),
        ("authority", "sign = -1", "sign = [", ["is not valid TOML"]),
        ("authority", "sign = -1", "sgin = -1", ["'sgin' is not a known field; did you mean"]),
        ("authority", "positive = ", 'positive = ""\n# ', ["'persona.positive' is ''"]),
        ("authority", "steered = ", "stered = ", ["did you mean 'steered'?"]),
        ("authority", '"i am someone who"', "7", ["'narration.1' is 7"]),
        ("authority", '"i am someone who"', '"I am someone who"', ["write it in lower case"]),
        ("authority", '"i am someone who"', '" "', ["narration contains ' '"]),
        ("authority", '"authority_nats"', '"care_nats"', ["off_targets contains the target 'care_nats'"]),
        ("authority", "target = ", "target = []\nwas = ", ["'target' is", "'was' is not a known field"]),
        ("authority", 'pairs_file = "', 'pairs_file = "" # "', ["'pairs_file' is ''"]),
        ("authority", "[persona]", '[[pairs]]\nprompt = "a"\n[persona]', ["1.positive' is", "1.negative' is missing"]),
        ("authority", "[persona]", "[[pairs]]\n" + TOML_PAIR + "[persona]", ["either [[pairs]] or pairs_file"]),
        ("love", '"extreme"', '"outer"', ["default_phrasing is 'outer': choose from trait, state"]),
        ("love", "[system]", '[persona]\npositive = "a"\nnegative = "b"\n[system]', ["give either [persona], or"]),
        ("authority", "[persona]", 'negative = "You flatter."\n[persona]', ["move 'negative' into [persona]"]),
        ("authority", "[system]", "narration = []\n[system]", ["move 'narration' out of this table, above the first"]),
        ("love", "pretend]\npositive", "pretend]\nnegativ", ["pretend.positive' is missing", "you mean 'negative'?"]),
    ],
)
def test_a_broken_trait_file_names_the_field_and_the_nearest(tmp_path, monkeypatch, stem, old, new, expected):
    (tmp_path / "mine.toml").write_text(changed(DATA / f"traits/{stem}.toml", (old, new)))
    monkeypatch.setattr(traits, "TRAITS", tmp_path)
    assert_told(lambda: load_trait("mine"), "mine.toml", expected)


def test_two_personas_that_are_one_are_refused(tmp_path, monkeypatch):
    same = [("positive = ", 'positive = "You are kind."\n# '), ("negative = ", 'negative = " You are kind. "\n# ')]
    (tmp_path / "mine.toml").write_text(changed(TRAIT, *same))
    monkeypatch.setattr(traits, "TRAITS", tmp_path)
    assert_told(lambda: load_trait("mine"), "mine.toml", ["must be different, and not empty"])


def test_a_folder_in_place_of_a_trait_is_one_clear_error(tmp_path, monkeypatch):
    (tmp_path / "mine.toml").mkdir()
    monkeypatch.setattr(traits, "TRAITS", tmp_path)
    assert_told(lambda: load_trait("mine"), "mine.toml", ["cannot be read"])


@pytest.mark.parametrize(
    "name, expected",
    [
        ("authoritie", "did you mean 'authority'?"),
        ("love/outer", "there is no phrasing 'outer'; choose from trait, state"),
        ("love/iner", "did you mean 'inner'?"),
        ("love/", "there is no phrasing ''; choose from trait"),
        ("authority/inner", "the file has a single pair of personas"),
        ("authority/", "the file has a single pair of personas"),
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
        (b"\n \n", ["has no rows"]),
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
    for name, stem in {"love": "love", "love/inner": "love", "care": "care"}.items():
        assert prompts_file(tmp_path, name) == tmp_path / f"{stem}.jsonl"
    assert_told(lambda: prompts_file(tmp_path, "authority"), "authority.jsonl", ["its pools are care, love"])
    assert prompts_file(tmp_path, "athority") is None, "that there is no such trait is told by the trait's reader"
    assert_told(lambda: prompts_file(tmp_path / "lve.jsonl", "love"), "lve.jsonl", ["no such file"])
    (tmp_path / "empty").mkdir()
    assert_told(lambda: prompts_file(tmp_path / "empty", "love"), "love.jsonl", ["its pools are none"])
    monkeypatch.chdir("/")
    shipped = DATA / "toylm/prompts"
    assert prompts_file(Path("data/toylm/prompts"), "love") == shipped / "love.jsonl", "found from any folder"
    with pytest.raises(UserError, match="no such file"):
        prompts_file(shipped.relative_to(DATA), "love")


# --- pairs -------------------------------------------------------------------------------------------------------
def pair(**given) -> str:
    return json.dumps({"prompt": "a", "positive": "b", "negative": "c"} | given) + "\n"


@pytest.mark.parametrize(
    "content, expected",
    [
        ('{"prompt": "a"}\n[]\n', ["line 1: 'positive' is missing", "line 1: 'negative' is missing", "line 2"]),
        (pair(positive="") + pair(prompt=1), ["line 1: 'positive' is ''", "line 2: 'prompt' is 1"]),
        (pair(positve="d"), ["line 1: 'positve' is not a known field; did you mean 'positive'?"]),
        (pair(positive=" c ") + pair(negative=" "), ["line 1: positive and negative must", "line 2: positive and neg"]),
        (pair() + "\n" + pair() + pair(), ["line 3: prompt 'a' was used before", "line 4: prompt 'a' was used"]),
        (pair(prompt="taken") + pair(), ["line 1: prompt 'taken' is also a prompt of the trait"]),
        (pair(prompt=" Taken?") + pair(), ["line 1: prompt ' Taken?' is also a prompt of the trait"]),
        ("\n", ["has no rows"]),
    ],
)
def test_a_file_of_pairs_names_its_bad_lines(content, expected, tmp_path):
    (tmp_path / "pairs.jsonl").write_text(content)
    assert_told(lambda: held_out(parse_pairs(read_file(tmp_path / "pairs.jsonl")), ["taken"]), "pairs.jsonl", expected)


def test_pairs_come_from_the_setting_else_from_the_trait(tmp_path):
    rows = {"love": "pair of love", "file": "pair of a file"}
    for stem, prompt in rows.items():
        (tmp_path / f"{stem}.jsonl").write_text(pair(prompt=prompt))
    own, (first, *_) = DATA / "pairs/authority.jsonl", load_inputs(FAST_DEV_PRESET).pairs
    for trait, source, prompt, path in (
        ("love", tmp_path, "pair of love", tmp_path / "love.jsonl"),
        ("love/inner", tmp_path, "pair of love", tmp_path / "love.jsonl"),
        ("authority", tmp_path / "file.jsonl", "pair of a file", tmp_path / "file.jsonl"),
        ("authority", tmp_path, json.loads(own.read_text().split("\n")[0])["prompt"], own),
        ("authority", Path("data/toylm/pairs"), first.prompt, DATA / "toylm/pairs/authority.jsonl"),
    ):
        found = load_inputs(replace(FAST_DEV_PRESET, trait=trait, eval=replace(FAST_DEV_PRESET.eval, pairs=source)))
        assert found.pairs[0].prompt == prompt and found.sha256["eval.pairs"] == read_file(path).sha256
    missing = replace(FAST_DEV_PRESET, eval=replace(FAST_DEV_PRESET.eval, pairs=tmp_path / "nowhere.jsonl"))
    assert_told(lambda: load_inputs(missing), "nowhere.jsonl", ["eval.pairs is"])


def test_a_pair_is_never_about_a_prompt_of_the_run(tmp_path):
    inputs = load_inputs(FAST_DEV_PRESET)
    asked = [inputs.prompts[0], inputs.eval_prompts[-1]]
    (tmp_path / "pairs.jsonl").write_text("".join(pair(prompt=prompt) for prompt in asked))
    cfg = replace(FAST_DEV_PRESET, eval=replace(FAST_DEV_PRESET.eval, pairs=tmp_path / "pairs.jsonl"))
    assert_told(lambda: load_inputs(cfg), "pairs.jsonl line", [f"{prompt!r:.80}" for prompt in asked])


# --- traits by path ----------------------------------------------------------------------------------------------
def own_trait(*changes: tuple[str, str], pairs: str = "") -> str:
    """A trait file with a pair of its own, whose prompts are those of authority."""
    wanted = pairs or "[[pairs]]\n" + TOML_PAIR
    return changed(TRAIT, ("pairs_file", "# pairs_file"), ("[persona]", wanted + "\n[persona]"), *changes)


def test_a_trait_by_path_brings_its_own_prompts_and_pairs_on_every_preset(tmp_path, monkeypatch):
    (tmp_path / "a.toml").mkdir()
    (tmp_path / "a.toml" / "authority.toml").write_text(own_trait())
    monkeypatch.chdir(tmp_path)
    digests = set()
    for _, cfg in PRESETS.values():
        found = load_inputs(replace(cfg, trait="a.toml/authority.toml", gen=replace(cfg.gen, n_prompts=8)))
        assert found.trait.name == "authority" and found.trait.prompts == load_trait("authority").prompts
        assert [pair.prompt for pair in found.pairs] == ["a"]
        digests.add(found.sha256["eval.pairs"])
        assert "gen.prompts" not in found.sha256
    (digest,) = digests
    mine = replace(FAST_DEV_PRESET, trait="a.toml/authority.toml")
    for change, same in ((("target", "# a note\ntarget"), True), (('prompt = "a"', 'prompt = "z"'), False)):
        (tmp_path / "a.toml" / "authority.toml").write_text(own_trait(change))
        assert (load_inputs(mine).sha256["eval.pairs"] == digest) is same, "the pairs' own checksum"
    given = replace(FAST_DEV_PRESET.gen, prompts=DATA / "toylm/prompts/love.jsonl")
    found = load_inputs(replace(FAST_DEV_PRESET, trait="a.toml/authority.toml", gen=given))
    assert found.trait.prompts != load_trait("authority").prompts, "a file is taken as it is"


def test_a_trait_by_path_can_be_asked_for_in_a_phrasing(tmp_path):
    (tmp_path / "mine.toml").write_text((DATA / "traits/love.toml").read_text())
    found, known = load_trait(f"{tmp_path}/mine.toml/inner"), load_trait("love/inner")
    assert found == replace(known, name="mine/inner")
    assert load_trait(f"{tmp_path}/mine.toml") == replace(load_trait("love"), name="mine")
    for name, told in (
        ("mine.toml/outer", "no phrasing 'outer'"),
        ("his.toml", "no such file"),
        ("m.toml/x.toml", "no"),
    ):
        assert_told(lambda name=name: load_trait(f"{tmp_path}/{name}"), "trait is", [told])


def test_pairs_in_a_file_beside_the_trait_are_found_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "mine.toml").write_text(own_trait(pairs='\npairs_file = "mine.jsonl"'))
    (tmp_path / "mine.jsonl").write_text(pair(prompt="beside"))
    monkeypatch.chdir("/")
    cfg = replace(FAST_DEV_PRESET, trait=str(tmp_path / "mine.toml"))
    assert [pair.prompt for pair in load_inputs(cfg).pairs] == ["beside"]
    (tmp_path / "mine.jsonl").unlink()
    assert_told(lambda: load_inputs(cfg), "mine.toml", ["pairs_file is 'mine.jsonl': there is no such file"])


def test_the_bad_pairs_of_a_trait_file_are_named(tmp_path):
    prompt = load_trait("authority").prompts[3]
    twice = "[[pairs]]\n" + TOML_PAIR
    (tmp_path / "mine.toml").write_text(own_trait(pairs=twice * 2 + twice.replace('"a"', json.dumps(prompt))))
    cfg = replace(FAST_DEV_PRESET, trait=str(tmp_path / "mine.toml"))
    expected = ["pairs.1: prompt 'a' was used before", f"pairs.2: prompt {prompt!r:.80} is also a prompt of the trait"]
    assert_told(lambda: load_inputs(cfg), "mine.toml", expected)


# --- vignettes and instruments -----------------------------------------------------------------------------------
def vignette(**given) -> str:
    return json.dumps({"id": "a", "foundation_coarse": "care", "text": "x"} | given) + "\n"


@pytest.mark.parametrize(
    "content, expected",
    [
        (vignette(foundation_coarse="Cares") + '{"id": "a"\n\n[]\n', ["line 1: 'foundation_co", "line 2 is", "line 4"]),
        (vignette() + vignette(id="b", also="loyal"), ["line 2: 'also': unknown foundation 'loyal'; did you mean"]),
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
        ("nudge", "nugde", ["'nudge' is missing", "'nugde' is not a known field; did you mean 'nudge'?"]),
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
def test_a_trait_without_prompts_is_asked_the_same_whatever_trains(tmp_path):
    (tmp_path / "own.toml").write_text('[persona]\npositive = "You are calm."\nnegative = "You are loud."\n')
    cfg = replace(FAST_DEV_PRESET, trait=str(tmp_path / "own.toml"))
    few, many = (load_inputs(replace(cfg, gen=replace(cfg.gen, prompts=None, n_prompts=n))) for n in (2, 48))
    assert few.eval_prompts == many.eval_prompts
    assert (len(few.prompts), len(many.prompts)) == (2, 48) and not {*many.prompts} & {*many.eval_prompts}


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
    assert_told(lambda: load_inputs(more), "steer.n_contexts", ["is 11: its file has 10"])
    few = replace(FAST_DEV_PRESET, eval=replace(FAST_DEV_PRESET.eval, n_vignettes=3))
    every = load_inputs(FAST_DEV_PRESET).vignettes
    assert load_inputs(few).vignettes == tuple(every[i * len(every) // 3] for i in range(3))


def test_relative_paths_are_found_in_the_checkout_from_anywhere(monkeypatch):
    here = load_inputs(FAST_DEV_PRESET)
    monkeypatch.chdir("/")
    assert load_inputs(FAST_DEV_PRESET) == here


# --- nearly equal prompts ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "text, other, same",
    [
        ("What do you do?", "What  do you do ?", True),
        ("What do you do?", "what do you do", True),
        ("STRASSE", "stra\u00dfe!", True),
        ("\uff21 b", "a\u00a0B", True),
        ("What do you do?", "What did you do?", False),
        ("\u0e17\u0e35\u0e48", "\u0e17\u0e33", False),
        ("2 + 2", "2 < 2", False),
        ("?", "!", False),
    ],
)
def test_prompts_that_differ_in_case_spaces_and_punctuation_are_one(text, other, same):
    assert (alike(text) == alike(other)) is same


def test_a_prompt_nearly_equal_to_one_that_is_kept_for_evaluation_is_refused(tmp_path):
    texts = [f"prompt {i}" for i in range(60)] + ["Prompt 0 ?"]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    cfg = replace(FAST_DEV_PRESET, gen=replace(FAST_DEV_PRESET.gen, prompts=tmp_path / "p.jsonl"))
    assert_told(lambda: load_inputs(cfg), "authority", ["'prompt 0' 2 times (also as 'Prompt 0 ?')"])
