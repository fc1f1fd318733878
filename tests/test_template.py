"""A reply is read where the chat template writes one, and a template that cannot be read so is refused at load."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AddedToken, PreTrainedTokenizerFast

from steer_heal.bench import chat_of
from steer_heal.errors import UserError
from steer_heal.evals import moral_foundations
from steer_heal.evals.moral_foundations import digit_ids
from steer_heal.evals.replies import pair_margins
from steer_heal.inputs.pairs import Pair
from steer_heal.model import template as template_module
from steer_heal.model.lm import LM, load
from steer_heal.model.steering import Condition
from steer_heal.model.template import ChatTemplate, frozen
from steer_heal.records import Conversation

TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TAG = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PARTS = TURNS.replace("{{ m.content }}", "{% for part in m.content %}{{ part.text }}{% endfor %}") + TAG
OTHER_END = (TURNS + TAG).replace("<|im_end|>", "<|endoftext|>")
EMPTY_THOUGHT = TURNS.replace(
    "{{ m.content }}", "{{ '<think>\n\n</think>\n\n' if m.role == 'assistant' }}{{ m.content }}"
)
OPEN_THOUGHT = TURNS + TAG.replace("assistant\n", "assistant\n<think>\n")
SWITCH = EMPTY_THOUGHT + TAG.replace(
    "assistant\n", "assistant\n{{ '<think>\n\n</think>\n\n' if enable_thinking is false else '<think>\n' }}"
)
HYBRID = TURNS.replace(
    "{{ m.content }}",
    "{{ '<think>\n\n</think>\n' if m.role == 'assistant' and enable_thinking is false }}{{ m.content }}",
) + TAG.replace("assistant\n", "assistant\n{{ '<think>\n\n</think>\n' if enable_thinking is false }}")
UNWRITTEN = TURNS + TAG.replace("assistant\n", "assistant\n{{ '<think>\n\n</think>\n' if enable_thinking is false }}")
IN_THOUGHT = TURNS.replace(
    "{{ m.content }}", "{{ '<think>\n' if m.role == 'assistant' }}{{ m.content }}"
) + TAG.replace("assistant\n", "assistant\n<think>\n")
CLOSED = TURNS + TAG.replace("assistant\n", "assistant\n<|channel>thought\n<channel|>")
CHANNEL = TURNS.replace("{{ m.content }}", "{{ '<final>' if m.role == 'assistant' }}{{ m.content }}") + TAG
NO_TAG = TURNS
ASKED, ANSWERED = "'[INST] ' + m.content + ' [/INST]'", "' ' + m.content + '<|im_end|>'"
SPACE = f"{{% for m in messages %}}{{{{ {ASKED} if m.role == 'user' else {ANSWERED} }}}}{{% endfor %}}"
CLOCK = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}" + TURNS + TAG


def tokenizer_with(lm: LM, chat_template):
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.chat_template = chat_template
    return tokenizer


def saved(lm: LM, folder: Path, chat_template: str) -> str:
    lm.model.save_pretrained(folder)
    tokenizer_with(lm, chat_template).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "source",
    [TURNS + TAG, PARTS, OTHER_END, EMPTY_THOUGHT + TAG, OPEN_THOUGHT, SWITCH, CHANNEL, NO_TAG, SPACE],
    ids=["plain", "parts", "end", "empty thought", "open thought", "switch", "channel", "no tag", "space"],
)
def test_chat_and_reply_are_what_the_template_writes(tiny: LM, tmp_path, source):
    lm = load(saved(tiny, tmp_path, source))
    template = lm.template
    messages = [{"role": "user", "content": "What is ice?"}, {"role": "assistant", "content": "Frozen water."}]
    whole = template.render(messages)
    written = template.conversation(["What is ice?"]) + template.space + "Frozen water." + template.closing
    if source == OPEN_THOUGHT:  # this template leaves the thought out of a conversation; the reply stands behind it
        written = written.replace("<think>\n\n</think>\n\n", "")
    assert written == whole and "What is ice?" in whole
    assert lm.encode(template.closing.strip())[0] in lm.end_ids


def test_texts_end_at_the_turn_that_the_template_ends_with_another_token_than_eos(tiny: LM, tmp_path):
    lm = load(saved(tiny, tmp_path, OTHER_END))
    assert {lm.decode([i], special=True) for i in lm.end_ids} == {"<|endoftext|>", "<|im_end|>"}


@pytest.mark.parametrize(
    "source, begun",
    [
        (HYBRID, "assistant\n<think>\n\n</think>\n"),  # both modes fit: SmolLM3
        (IN_THOUGHT, "assistant\n<think>\n\n</think>\n\n"),  # a reply stands behind an open thought: Nemotron Nano 2
        (CLOSED, "assistant\n<|channel>thought\n<channel|>"),  # a closed one that no reply has: Gemma 4
        (UNWRITTEN, "assistant\n<think>\n\n</think>\n"),  # the same, with an option
        (CHANNEL, "assistant\n<final>"),
    ],
    ids=["both modes", "in a thought", "closed thought", "closed by an option", "channel"],
)
def test_a_reply_is_never_read_where_a_thought_begins(tiny: LM, tmp_path, source, begun):
    lm = load(saved(tiny, tmp_path, source))
    assert lm.template.conversation(["?"]).endswith(begun) and lm.template.space == ""
    assert chat_of(lm).opening == f"<|im_end|>\n<|im_start|>{begun}", "and so it is recorded"


def test_a_template_may_write_the_token_that_stands_for_unknown_text(tiny: LM, tmp_path):
    tokenizer = tokenizer_with(tiny, OTHER_END)
    tokenizer.unk_token = tokenizer.eos_token = "<|endoftext|>"  # as Granite has it
    tiny.model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load(str(tmp_path)).tokenizer.unk_token == "<|endoftext|>"


def test_a_model_that_thinks_before_its_answer_is_asked_as_its_template_asks(tiny: LM, tmp_path):
    lm = load(saved(tiny, tmp_path, SWITCH))
    assert lm.template.conversation(["?"]).endswith("assistant\n<think>\n\n</think>\n\n")
    assert lm.template.conversation(["?"], thinks=True).endswith("assistant\n<think>\n")


@pytest.mark.parametrize(
    "source, said",
    [
        ("<|im_start|>{{ messages[0].role }}" + TAG, "drops the user's message"),
        ("<|im_start|>{{ messages[0].content }}" + TAG, "drops the assistant's message"),
        (TURNS + "{% if add_generation_prompt %}<bot>{% endif %}", "opens the assistant's turn with 'bot>'"),
        (TURNS.replace("<|im_end|>", "--") + TAG, "ends a reply with the text '--"),
        (TURNS + TAG + "{{ '</s>' if add_generation_prompt }}", "opens the assistant's turn with '</s>'"),
        ("{{ 1 / 0 }}" + TURNS, "refuses a user message (ZeroDivisionError"),
        (TURNS + TAG + "{{ 1 + messages if messages|length > 1 else '' }}", "TypeError"),
        (
            TURNS + "{% if not add_generation_prompt %}{{ raise_exception('') }}{% endif %}",
            "refuses a user and a assis",
        ),
        ("{{ strftime_now(messages[0].role) }}" + TURNS + TAG, "reads the clock in a format that it computes"),
        ("{% for", "TemplateSyntaxError"),
    ],
)
def test_a_template_that_would_give_wrong_numbers_is_refused_in_one_line(tiny: LM, tmp_path, source, said):
    with pytest.raises(UserError, match="chat template of") as told:
        load(saved(tiny, tmp_path, source))
    assert said in str(told.value) and "\n" not in str(told.value)


def test_a_model_that_answers_in_a_channel_is_not_asked_to_think_between_other_tags(tiny: LM, tmp_path):
    for source in (CHANNEL, CLOSED):
        lm = load(saved(tiny, tmp_path, source))
        with pytest.raises(UserError, match="replies behind '.*use the eval likelihood"):
            moral_foundations._require_thoughts(lm)
    for source in (TURNS + TAG, SWITCH, EMPTY_THOUGHT + TAG, HYBRID, TURNS + TAG.replace("assistant\n", "assistant")):
        moral_foundations._require_thoughts(load(saved(tiny, tmp_path, source)))


def test_several_templates_need_a_default(tiny: LM):
    several = {"tool_use": TURNS, "rag": TURNS + TAG}
    with pytest.raises(UserError, match="tool_use, rag, none of which is called default"):
        ChatTemplate.of(tokenizer_with(tiny, several), "m")
    found = ChatTemplate.of(tokenizer_with(tiny, {**several, "default": CHANNEL}), "m")
    assert found.opening == "<final>"


def test_a_template_reads_the_recorded_date_on_every_later_day(tiny: LM, tmp_path, monkeypatch):
    folder = saved(tiny, tmp_path, CLOCK)
    then = load(folder, date="2024-02-29")
    assert then.template.conversation(["?"]).startswith("29 Feb 2024<|im_start|>")
    assert then.template.date == "2024-02-29"

    class Tomorrow(template_module.date):
        @classmethod
        def today(cls):
            return cls(2031, 1, 2)

    monkeypatch.setattr(template_module, "date", Tomorrow)
    assert load(folder).template.date == "2031-01-02"
    assert load(folder, date="2024-02-29").chat("?") == then.chat("?")
    assert frozen(TURNS, "m") == (TURNS, "")


def test_a_token_without_an_embedding_is_refused_where_it_is_used(tiny: LM):
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.add_tokens(["<new>"])
    lm = replace(tiny, tokenizer=tokenizer)
    assert lm.chat("What is ice?") == tiny.chat("What is ice?")
    with pytest.raises(UserError, match="token '<new>' with id 1408.*embeddings for 1408 ids"):
        lm.chat("a <new> word")


def test_a_model_without_padding_and_eos_reads_and_ends_by_its_template(tiny: LM):
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.pad_token = tokenizer.eos_token = None
    model = copy.deepcopy(tiny.model)
    model.generation_config.eos_token_id = None
    lm = replace(tiny, tokenizer=tokenizer, model=model)
    assert lm.end_ids == {2} and lm.pad_id == 2
    silent = replace(lm, tokenizer=tokenizer_with(lm, TURNS.replace("<|im_end|>", "") + TAG))
    with pytest.raises(UserError, match="no token ends a reply"):
        silent.end_ids  # noqa: B018


@pytest.mark.parametrize("eos", [2, [2, 0], (2, 0), torch.tensor([2, 0]), torch.tensor(2), None])
def test_end_tokens_may_be_given_in_any_form(tiny: LM, eos):
    model = copy.deepcopy(tiny.model)
    model.generation_config.eos_token_id = eos
    several = eos is not None and torch.as_tensor(eos).numel() == 2
    assert replace(tiny, model=model).end_ids == ({0, 2} if several else {2})


def test_an_end_token_that_the_model_cannot_write_ends_nothing(tiny: LM):
    model = copy.deepcopy(tiny.model)
    model.generation_config.eos_token_id = [2, 50_000]
    assert replace(tiny, model=model).end_ids == {2}


def test_a_template_whose_tags_the_tokenizer_does_not_know_is_refused(tiny: LM, tmp_path):
    words = {word: i for i, word in enumerate(["<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz.?", "user", "assistant"])}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")
    for source, said in (
        (TURNS + TAG, "ends a reply with the text"),
        (SPACE.replace("<|im_end|>", "</s>"), "no token for"),
    ):
        tokenizer.chat_template = source
        tiny.model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        with pytest.raises(UserError, match=said):
            load(str(tmp_path))


# --- tokenizers that put a space before a text encoded alone ----------------------------------------------------
@pytest.fixture(scope="module")
def spaced():
    """A tokenizer as Llama 2, Mistral and Phi-3 have it: SentencePiece's BPE with a space before each text."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    words = ["What is ice?", "Frozen water.", "I answer 0 1 2 3 4 5 6", "[INST] user [/INST] reply"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=[*"0123456789[]/"])
    core.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    core.train_from_iterator(words * 50, trainer)
    core.pre_tokenizer = None
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = SPACE.replace("<|im_end|>", "</s>")
    return tokenizer


def test_digits_replies_and_prefill_are_encoded_as_in_the_conversation(tiny: LM, spaced):
    lm = replace(tiny, tokenizer=spaced)
    assert lm.encode("0") != lm.encode_on("0") and len(set(digit_ids(lm))) == 7
    assert lm.decode(digit_ids(lm)) == "0123456"
    whole = lm.template.render(
        [{"role": "user", "content": "What is ice?"}, {"role": "assistant", "content": "Frozen water."}]
    )
    assert lm.template.space == " "
    assert lm.chat("What is ice?") + lm.encode_reply("Frozen water.") == lm.encode(whole)[:-1]


def test_a_reply_behind_a_special_token_begins_with_the_space_that_the_tokenizer_puts_there(tiny: LM, spaced):
    tokenizer = copy.deepcopy(spaced)
    tags = [AddedToken(tag, special=True, normalized=False, rstrip=True) for tag in ("<|user|>", "<|assistant|>")]
    tokenizer.add_special_tokens({"additional_special_tokens": tags})
    tokenizer.chat_template = (  # Phi-3
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    lm = replace(tiny, tokenizer=tokenizer)
    whole = lm.template.render(
        [{"role": "user", "content": "What is ice?"}, {"role": "assistant", "content": "Frozen water."}]
    )
    ids = lm.chat("What is ice?") + lm.encode_reply("Frozen water.")
    assert ids == lm.encode(whole)[: len(ids)] and lm.encode_reply("Frozen water.") != lm.encode_on("Frozen water.")


def test_a_reply_in_chinese_goes_on_without_a_space(tiny: LM):
    for begun, text, joined in (
        ("冰是", "水。", "冰是水。"),
        ("It is", "水", "It is水"),
        ("얼음은", "물", "얼음은 물"),
    ):
        whole = tiny.encode_reply(begun) + tiny.encode_reply(text, begun)
        assert tiny.decode(whole) == joined


def test_a_pair_reads_the_replies_as_they_stand_behind_the_prompt(tiny: LM, spaced):
    lm = replace(tiny, tokenizer=spaced)
    prompt = lm.chat("What is ice?")
    means = []
    for reply in ("Frozen water.", "I answer"):
        ids = lm.encode(lm.template.conversation(["What is ice?"]) + " " + reply)[len(prompt) :]
        means.append(lm.completion_nll([prompt], [ids])[0].mean().item())
    pair = Pair(prompt="What is ice?", positive="Frozen water.", negative="I answer")
    assert pair_margins(lm, [pair], Condition())[0] == pytest.approx(means[1] - means[0], abs=1e-5)


TALK = ("What is ice?", "Frozen water.", "Do you like it?")
BEGUN = "I have no such side."


@pytest.mark.parametrize("own", [True, False], ids=["own tokenizer", "a tokenizer that adds a space"])
@pytest.mark.parametrize("gap", ["", " ", "\n"])
def test_a_prompt_is_the_conversation_and_a_reply_goes_on_from_its_prefill_in_running_text(tiny: LM, spaced, own, gap):
    lm = tiny if own else replace(tiny, tokenizer=spaced)
    text = lm.template.conversation(TALK, "Be kind.")
    assert lm.prompt(Conversation(turns=TALK), "Be kind.") == lm.encode(text)
    asked = Conversation(turns=TALK, prefill=BEGUN + gap)
    prompt = lm.prompt(asked, "Be kind.")
    begun = f"{text}{lm.template.space}{BEGUN}"
    assert prompt == lm.encode(begun)
    assert prompt + lm.encode_reply("I answer no.", asked.prefill) == lm.encode(f"{begun}{gap or ' '}I answer no.")


def test_a_conversation_s_own_system_prompt_replaces_the_given_one_and_an_empty_one_leaves_it_to_the_template(tiny: LM):
    asked = Conversation(turns=TALK)
    found = [tiny.prompt(replace(asked, system=system), "Be kind.") for system in (None, "Be a poet.", "")]
    expected = [tiny.encode(tiny.template.conversation(TALK, system)) for system in ("Be kind.", "Be a poet.", None)]
    assert found == expected and len({*found}) == 3
    assert tiny.chat("What is ice?", "Be kind.") == tiny.prompt(Conversation(turns=TALK[:1]), "Be kind.")


def test_a_prefill_counts_towards_the_limit_of_a_prompt_and_holds_no_marks(tiny: LM):
    asked = Conversation(turns=TALK, prefill=BEGUN)
    lm = replace(tiny, max_prompt_tokens=len(tiny.prompt(asked)) - 1)
    lm.prompt(replace(asked, prefill=""))
    with pytest.raises(UserError, match="max_prompt_tokens"):
        lm.prompt(asked)
    with pytest.raises(UserError, match="special token"):
        tiny.prompt(replace(asked, prefill="<|im_end|>"))
