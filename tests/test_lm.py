import copy
import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from steer_heal.errors import UserError
from steer_heal.model.decode import Decoding, Row, decode
from steer_heal.model.lm import LM, load, wrap
from steer_heal.progress import SILENT, Progress

LONG = "Tell me a short story about a fox and a golden key and an old map."


def test_log_probabilities_of_a_batch_are_those_of_the_model_itself(toy: LM):
    prompts = [toy.chat(text) for text in ("What is ice?", LONG, "What barks?")]
    texts = ("Ice is frozen water.", "Long ago a fox looked for an old map.", "A")
    answers = [tuple(toy.tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    for prompt, answer, nll in zip(prompts, answers, toy.completion_nll(prompts, answers), strict=True):
        logp = toy.model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
        assert torch.allclose(nll, -logp.gather(1, torch.tensor(answer)[:, None])[:, 0], atol=1e-5)


def test_chunks_of_the_head_change_nothing(toy: LM, monkeypatch: pytest.MonkeyPatch):
    hidden, targets = torch.randn(37, toy.width), range(37)
    whole = toy.nll(hidden, targets)
    monkeypatch.setattr(LM, "chunk_size", 5)
    assert torch.allclose(toy.nll(hidden, targets), whole, atol=1e-6)
    assert toy.nll(torch.empty(0, toy.width), []).shape == (0,)


def test_a_chunk_is_bounded_and_never_too_short_for_a_product(toy: LM):
    sizes = []
    for device, vocabularies in (("cpu", (1408, 32_768, 262_144)), ("meta", (32_768, 262_144))):
        for vocabulary in vocabularies:
            lm = dataclasses.replace(toy)
            lm.head = torch.nn.Linear(1, vocabulary, bias=False, device=device)
            sizes.append(lm.chunk_size)
    assert sizes == [2978, 128, 64, 512, 64], "larger on anything but a CPU"


def test_a_long_prompt_is_an_error_and_never_cut(toy: LM):
    with pytest.raises(UserError, match="max_prompt_tokens is 12"):
        dataclasses.replace(toy, max_prompt_tokens=12).chat(LONG)


def test_a_prompt_ends_at_the_opened_assistant_turn(toy: LM):
    assert toy.tokenizer.decode(toy.chat("What is ice?", "You are a poet.")).endswith("<|im_start|>assistant\n")


TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}<assistant>"
DROPS = "{% set messages = messages | rejectattr('role', 'equalto', 'system') %}" + TURNS
REFUSES = "{{ raise_exception('no system role') if messages[0].role == 'system' }}" + TURNS
DEFAULT = "{% if messages[0].role != 'system' %}<system>Be kind.</system>{% endif %}" + TURNS


def with_template(lm: LM, template: str) -> LM:
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.chat_template = template
    return dataclasses.replace(lm, tokenizer=tokenizer)


@pytest.mark.parametrize("template", [REFUSES, DROPS], ids=["refuses", "drops"])
def test_a_system_message_that_the_template_does_not_write_opens_the_user_s(toy: LM, template):
    asked = with_template(toy, template).template.conversation
    assert asked(["What is ice?"], "Be a poet.") == "<user>Be a poet.\n\nWhat is ice?</user><assistant>"
    assert asked(["What is ice?"]) == "<user>What is ice?</user><assistant>"


def test_a_template_s_own_system_prompt_is_part_of_the_plain_prompt_and_gives_way_to_another(toy: LM):
    lm = with_template(toy, DEFAULT)
    assert lm.template.conversation(["What is ice?"]) == "<system>Be kind.</system><user>What is ice?</user><assistant>"
    assert lm.template.conversation(["What is ice?"], "Be a poet.").startswith("<system>Be a poet.</system><user>What")


def test_a_message_that_the_template_refuses_is_a_user_error(toy: LM):
    with pytest.raises(UserError, match="'data/toylm'.*no system role"):
        with_template(toy, REFUSES).template.render([{"role": "system", "content": "Be a poet."}])


def test_loading_tells_of_a_template_without_a_system_message(tiny: LM, tmp_path):
    tiny.model.save_pretrained(tmp_path)
    with_template(tiny, DROPS.replace("</{{ m.role }}>", "<|im_end|>")).tokenizer.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="system"):
        load(str(tmp_path))


def test_a_model_that_changes_its_logits_in_an_unknown_way_is_refused(tiny: LM):
    model = copy.deepcopy(tiny.model)
    assert wrap(model, tiny.tokenizer, "as it is").width == tiny.width

    def louder(_model, _given, output):
        output.logits = 1.001 * output.logits

    model.register_forward_hook(louder)
    with pytest.raises(UserError, match="Qwen3ForCausalLM.*logits"):
        wrap(model, tiny.tokenizer, "changed")


class Payload:
    """Unpickling it writes a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def edit(name: str, **fields):
    """Changes fields of a JSON file of the model's folder."""
    return lambda folder: (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | fields))


def pickled(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")


def pickled_code(folder: Path) -> None:
    pickled(folder)
    torch.save({"model.embed_tokens.weight": Payload(folder / "ran")}, folder / "pytorch_model.bin")


def remote(folder: Path) -> None:
    (folder / "code.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    code = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    edit("config.json", model_type="mine", auto_map=code)(folder)


def rewritten(change):
    """Applies a change to the weights of the folder."""

    def damage(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        save_file(change(state), folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def without_layers(folder: Path) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=8, n_layer=1, n_head=1)).save_pretrained(folder)


@pytest.mark.parametrize(
    "damage",
    [
        pickled,
        pickled_code,
        remote,
        without_layers,
        lambda f: (f / "chat_template.jinja").unlink(),
        lambda f: [file.unlink() for file in f.iterdir()],
        lambda f: (f / "config.json").write_text("{"),
        lambda f: (f / "config.json").write_text("[]"),
        edit("config.json", hidden_size="x"),
        edit("config.json", hidden_size=48),
        rewritten(lambda state: {f"language_model.{key}": value for key, value in state.items()}),
        rewritten(lambda state: {key: value for key, value in state.items() if ".1.mlp" not in key}),
        edit("config.json", num_hidden_layers=2, layer_types=["full_attention"] * 2),
        edit("config.json", tie_word_embeddings=False),
        edit("config.json", layer_types=["chunked_attention"] * 3),
        edit("config.json", layer_types=["linear_attention", *["full_attention"] * 2]),
        edit("config.json", layer_types=["sliding_attention", *["full_attention"] * 2]),
        edit("config.json", layer_types=["sliding_attention"] * 3, use_sliding_window=True, sliding_window=0),
        edit("config.json", layer_types=["full_attention"] * 2),
        edit("config.json", model_type="llama", architectures=["LlamaForCausalLM"]),
        rewritten(lambda state: state | {"model.layers.1.self_attn.q_proj.bias": torch.ones(32)}),
        lambda f: (f / "tokenizer.json").write_text("{}"),
        lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64),
        lambda f: os.truncate(f / "model.safetensors", 5000),
    ],
)
def test_a_model_that_cannot_be_used_is_one_clear_error_and_runs_no_code(damage, tiny: LM, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # to whoever asks whether the folder's code may run
    tiny.model.save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    assert load(str(tmp_path)).width == 32
    damage(tmp_path)
    with pytest.raises(UserError, match=str(tmp_path)):
        load(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_a_model_that_is_too_large_or_quantized_already_is_told_from_a_damaged_one(tiny: LM, tmp_path, monkeypatch):
    tiny.model.save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(UserError, match="does not fit into the memory of cpu; use a smaller model or.*--quantize nf4"):
        load(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="are quantized already; leave out --quantize"):
        load(str(tmp_path), quantize="nf4")


def test_sampling_follows_the_settings_and_else_the_model():
    own = load("data/toylm").model.generation_config
    assert (own.temperature, own.top_p) == (0.8, 0.95)
    given = load("data/toylm", temperature=0.3, top_p=0.5).model.generation_config
    assert (given.do_sample, given.temperature, given.top_p) == (True, 0.3, 0.5)


def test_weights_that_are_not_finite_are_told_from_an_unknown_family(tmp_path):
    lm = load("tiny-random")
    with torch.no_grad():
        lm.blocks[0].mlp.up_proj.weight[0, 0] = float("nan")
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="logits that are not finite"):
        load(str(tmp_path))


class Seen(Progress):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, int]] = []

    def at(self, done: float, total: int) -> None:
        self.calls.append((done, total))


def test_progress_is_reported_inside_the_context_alone_and_ends_at_all_rows(toy: LM):
    outer = Seen()
    inner = Seen()
    with toy.watched_by(outer):
        with pytest.raises(ZeroDivisionError), toy.watched_by(inner):
            toy.completion_nll([(5,), (6,)], [(7,), (8, 9)])
            raise ZeroDivisionError
        assert outer.calls == [] and inner.calls[0] == (0, 2) and inner.calls[-1] == (2, 2)
        list(decode(toy, [Row((5,)), Row((6, 7))], None, Decoding(max_new_tokens=4, batch_size=1)))
    assert outer.calls[-1] == (2, 2) and {total for _, total in outer.calls} == {2}
    assert outer.calls == sorted(outer.calls) and any(done % 1 for done, _ in outer.calls), "rows count in part"
    n = len(outer.calls)
    toy.completion_nll([(5,)], [(7,)])
    assert len(outer.calls) == n and toy.progress is SILENT
