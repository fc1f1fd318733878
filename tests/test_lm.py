import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from steer_heal.lm import LM, load
from steer_heal.records import UserError


def test_log_probabilities_of_a_batch_are_those_of_its_rows(toy: LM):
    prompts = [toy.chat(text) for text in ("What is ice?", "Tell me a short story about a fox.", "What barks?")]
    answers = [
        tuple(toy.tokenizer.encode(t, add_special_tokens=False))
        for t in ("Ice is frozen water.", "Long ago a fox looked for an old map.", "A")
    ]
    together = toy.completion_nll(prompts, answers)
    for i in range(3):
        alone = toy.completion_nll(prompts[i : i + 1], answers[i : i + 1])[0]
        assert torch.allclose(together[i], alone, atol=1e-5)
        assert len(alone) == len(answers[i])


def test_log_probabilities_agree_with_the_model_itself(toy: LM):
    prompt, answer = (
        toy.chat("What is ice?"),
        tuple(toy.tokenizer.encode("Ice is frozen water.", add_special_tokens=False)),
    )
    logits = toy.model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    expected = -logits[len(prompt) - 1 : -1].gather(1, torch.tensor(answer)[:, None])[:, 0]
    assert torch.allclose(toy.completion_nll([prompt], [answer])[0], expected, atol=1e-5)


def test_chunks_of_the_head_change_nothing(toy: LM, monkeypatch: pytest.MonkeyPatch):
    hidden, targets = torch.randn(37, toy.width), range(37)
    whole = toy.nll(hidden, targets)
    monkeypatch.setattr(LM, "chunk_size", 5)
    assert torch.allclose(toy.nll(hidden, targets), whole, atol=1e-6)


def test_a_chunk_is_bounded_and_never_too_short_for_a_product(toy: LM):
    size = lambda vocabulary, device: dataclasses.replace(toy, model=FakeHead(vocabulary, device)).chunk_size
    assert [size(vocabulary, "cpu") for vocabulary in (1408, 32_768, 262_144)] == [2978, 128, 64]
    assert [size(vocabulary, "meta") for vocabulary in (32_768, 262_144)] == [512, 64], "on anything but a CPU"
    assert toy.nll(torch.empty(0, toy.width), []).shape == (0,)


class FakeHead:
    """A model of which nothing but the size and place of its head is asked."""

    def __init__(self, vocabulary: int, device: str) -> None:
        self.head = torch.nn.Linear(1, vocabulary, bias=False, device=device)

    def get_output_embeddings(self) -> torch.nn.Linear:
        return self.head


def test_a_long_prompt_is_an_error_and_never_cut(toy: LM):
    short = dataclasses.replace(toy, max_prompt_tokens=12)
    with pytest.raises(UserError, match="12.*raise --max-prompt-tokens"):
        short.chat("Tell me a short story about a fox and a golden key and an old map.")


def test_a_prompt_ends_at_the_opened_assistant_turn(toy: LM):
    assert toy.tokenizer.decode(toy.chat("What is ice?", "You are a poet.")).endswith("<|im_start|>assistant\n")


def test_no_chat_template_is_one_clear_error(toy: LM, tmp_path):
    toy.model.save_pretrained(tmp_path)
    toy.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        load(str(tmp_path))


def test_a_template_that_refuses_a_system_message_says_so(toy: LM, monkeypatch):
    monkeypatch.setattr(
        toy.tokenizer, "chat_template", "{{ raise_exception('no system role') if messages[0].role == 'system' }}hello"
    )
    assert toy.chat("What is ice?")
    with pytest.raises(UserError, match="data/toylm' refuses a system and a user message .no system role"):
        toy.chat("What is ice?", "You are a poet.")


def test_a_missing_model_is_one_clear_error(tmp_path):
    with pytest.raises(UserError, match="could not be loaded"):
        load(str(tmp_path / "nothing"))


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
    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Payload(folder / "ran")}, folder / "pytorch_model.bin")


def remote(folder: Path) -> None:
    (folder / "code.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    edit(
        "config.json", model_type="mine", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    )(folder)


def without_layers(folder: Path) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=8, n_layer=1, n_head=1)).save_pretrained(folder)


@pytest.mark.parametrize(
    "damage, message",
    [
        (pickled, "could not be loaded.*safetensors"),
        (remote, "could not be loaded"),
        (without_layers, "has no list of decoder layers"),
        (lambda f: (f / "config.json").write_text("{"), "could not be loaded"),
        (lambda f: (f / "config.json").write_text("[]"), "could not be loaded"),
        (edit("config.json", hidden_size="x"), "could not be loaded"),
        (edit("config.json", hidden_size=48), "could not be loaded"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "could not be loaded"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64), "could not be loaded"),
        (lambda f: os.truncate(f / "model.safetensors", 5000), "could not be loaded"),
    ],
)
def test_a_model_that_cannot_be_used_is_one_clear_error_and_runs_no_code(
    damage, message, tiny: LM, tmp_path, monkeypatch
):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # to whoever asks whether the folder's code may run
    tiny.model.save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    assert load(str(tmp_path)).width == 32
    damage(tmp_path)
    with pytest.raises(UserError, match=f"(?s){message}"):
        load(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_batches_hold_every_row_once_within_the_budget(toy: LM):
    lengths = [5, 300, 7, 8, 299, 40]
    small = dataclasses.replace(toy, token_budget=320)
    groups = list(small.batches(lengths))
    assert sorted(i for group in groups for i in group) == list(range(6))
    assert all(max(lengths[i] for i in group) * len(group) <= 320 for group in groups)
