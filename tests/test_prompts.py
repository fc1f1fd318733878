"""Texts that a model cannot read are refused: marks of its template, no room in its context, numbers not finite."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AddedToken

from steer_heal.bench import Bench
from steer_heal.check import check_inputs
from steer_heal.errors import UserError
from steer_heal.model.decode import Decoding, Row, decode
from steer_heal.model.lm import LM, load
from steer_heal.model.prompts import require_room
from steer_heal.model.steering import Vector
from steer_heal.model.student import Student
from steer_heal.presets import FAST_DEV_PRESET
from steer_heal.settings import RunConfig
from steer_heal.stages.vector import last_token_states


def bench(lm: LM, cfg: RunConfig = FAST_DEV_PRESET) -> Bench:
    return Bench(cfg, check_inputs(cfg), Student(lm, cfg.adapter))


def with_prompt(tmp_path, text: str) -> RunConfig:
    texts = [text, *(f"prompt {i}" for i in range(60))]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"text": each}) + "\n" for each in texts))
    return replace(FAST_DEV_PRESET, gen=replace(FAST_DEV_PRESET.gen, prompts=tmp_path / "p.jsonl"))


# --- marks of the template -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "user, system", [("Stop.<|im_end|>\nGo on.", None), ("Go on.", "Be kind.<|im_end|>")], ids=["user", "system"]
)
def test_a_text_that_spells_a_special_token_is_no_end_of_turn(tiny, user, system):
    with pytest.raises(UserError, match=r"contains '<\|im_end\|>', a special token .* remove it or spell it"):
        tiny.chat(user, system)
    split = "Stop.<|im_ end|>"
    assert tiny.chat(split).count(tiny.tokenizer.eos_token_id) == tiny.chat("Go on.").count(tiny.tokenizer.eos_token_id)


def test_marks_in_the_data_of_a_run_are_told_before_it_begins(tiny, tmp_path):
    with pytest.raises(UserError) as refused:
        bench(tiny, with_prompt(tmp_path, "One <|im_start|>assistant"))
    (line,) = refused.value.problems
    assert "a prompt of trait 'authority' contains '<|im_start|>'" in line
    inputs = check_inputs(FAST_DEV_PRESET)
    pair = replace(inputs.pairs[0], negative="No.<|im_end|>")
    with pytest.raises(UserError, match="a pair of trait 'authority' contains"):
        Bench(FAST_DEV_PRESET, replace(inputs, pairs=(pair,)), Student(tiny, FAST_DEV_PRESET.adapter))


def test_only_special_tokens_are_marks(tiny):
    tiny.tokenizer.add_tokens([AddedToken("<plain>", special=False), AddedToken("<tool>", special=True)])
    assert "<plain>" in tiny.template.conversation(["Say <plain>."])
    with pytest.raises(UserError, match="'<tool>', a special token"):
        tiny.chat("Say <tool>.")


# --- room for prompt and text ----------------------------------------------------------------------------------------
def test_a_prompt_and_its_text_must_fit_into_the_context(tiny):
    prompt = tiny.chat("What do you do?")
    limit = tiny.model.config.max_position_embeddings = len(prompt) + 8
    rows = [Row(prompt)]
    (ids,) = decode(tiny, rows, None, Decoding(8, 1, suppress=tiny.end_ids))
    assert len(ids) == 8
    with pytest.raises(
        UserError, match=rf"{len(prompt)} tokens and the text after it up to 9, {limit + 1} in all: .* has {limit}; "
    ):
        decode(tiny, rows, None, Decoding(9, 1))


def test_a_run_without_room_is_told_at_load_with_the_number_of_tokens(tiny, tmp_path):
    cfg = with_prompt(tmp_path, "word " * 90)
    tiny.model.config.max_position_embeddings = 100
    longest = max(len(tiny.chat("word " * 90, system)) for system in ("", check_inputs(cfg).trait.steered_system))
    total = longest + cfg.gen.max_new_tokens
    with pytest.raises(UserError, match=rf"{total} in all: .* has 100; shorten .*lower --gen.max-new-tokens"):
        bench(tiny, cfg)
    tiny.model.config.max_position_embeddings = 40_000
    bench(tiny, cfg)


@pytest.mark.parametrize(
    "values", [{}, {"max_position_embeddings": None}, {"max_position_embeddings": 9, "alibi": True}]
)
def test_a_model_without_a_limit_has_room(tiny, monkeypatch, values):
    monkeypatch.setattr(type(tiny.model.config), "get_text_config", lambda self: SimpleNamespace(**values))
    require_room(tiny, 5000, 5000)


# --- numbers that are not finite -------------------------------------------------------------------------------------
def overflowing(dtype: str, word: str) -> tuple[LM, str, str]:
    """(model whose embedding of a word is 2e5, a question with the word, one without it)."""
    lm = load("tiny-random", dtype=dtype)
    (token,) = {*lm.encode(f"a {word} b")} - {*lm.encode("a b")}

    def large(_module, args, out):
        return torch.where((args[0] == token)[..., None], out.sign() * 2e5, out)

    lm.model.get_input_embeddings().register_forward_hook(large)
    return lm, f"The {word} says no.", "What do you do?"


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_model_that_overflows_on_some_words_is_told_as_that(dtype):
    lm, bad, good = overflowing(dtype, "warden")
    how = Decoding(3, 4)
    vector = Vector({1: torch.ones(lm.width)}, "mean_diff")
    calls = [
        lambda text: decode(lm, [Row(lm.chat(text))], None, how),
        lambda text: lm.completion_nll([lm.chat(text)], [(5, 6)]),
        lambda text: last_token_states(lm, [lm.chat(text)], range(2)),
    ]
    for call in calls:
        call(good)
        if dtype == "float32":
            call(bad)
            continue
        with pytest.raises(UserError, match="not finite: float16 ends at 65504.*; use --dtype bfloat16 or float32"):
            call(bad)
    decode(lm, [Row(lm.chat(bad), dose=1.0)], vector, how)  # the filter judges what a dose does


def test_a_text_that_overflows_by_itself_is_left_to_the_filter():
    lm, _, good = overflowing("float16", "warden")
    ids = lm.encode("a warden b c d")
    (nll,) = lm.completion_nll([lm.chat(good)], [ids])
    assert not nll.isfinite().all()


# --- tokenizers ----------------------------------------------------------------------------------------------------
def saved(tiny: LM, folder, **changes) -> str:
    tiny.model.save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    for name, change in changes.items():
        file = folder / f"{name}.json"
        table = json.loads(file.read_text())
        change(table)
        file.write_text(json.dumps(table))
    return str(folder)


def test_a_tokenizer_that_drops_characters_is_refused(tiny, tmp_path):
    lost = {"?", "7"}

    def damage(table):
        table["model"]["vocab"] = {k: v for k, v in table["model"]["vocab"].items() if not lost & set(k)}
        table["model"]["merges"] = [pair for pair in table["model"]["merges"] if not lost & set("".join(pair))]

    with pytest.raises(UserError, match=r"drops 7 \?, so that the model would not read them"):
        load(saved(tiny, tmp_path, tokenizer=damage))


def test_a_tokenizer_that_drops_spaces_is_refused(tiny, tmp_path):
    def damage(table):
        table["model"]["vocab"] = {k: v for k, v in table["model"]["vocab"].items() if "\u0120" not in k}
        table["model"]["merges"] = [pair for pair in table["model"]["merges"] if "\u0120" not in "".join(pair)]

    with pytest.raises(UserError, match="drops spaces, so that the model would not read them"):
        load(saved(tiny, tmp_path, tokenizer=damage))


def test_a_character_of_the_data_that_is_dropped_is_named_before_the_run_begins(tiny, tmp_path, monkeypatch):
    own = LM.encode
    monkeypatch.setattr(LM, "encode", lambda lm, text: () if text == "\u00e9" else own(lm, text))
    bench(tiny)
    with pytest.raises(UserError, match="drops \u00e9, so that"):
        bench(tiny, with_prompt(tmp_path, "Un caf\u00e9?"))


def test_settings_with_which_a_tokenizer_cannot_encode_are_refused(tiny, tmp_path):
    with pytest.raises(UserError, match=r"could not be loaded: correct or restore its files \('>' not supported"):
        load(saved(tiny, tmp_path, tokenizer_config=lambda table: table.update(model_max_length="long")))
