"""Each family of the table in README.md, on a tiny random model with the toy tokenizer."""


import pytest
import torch
import transformers
from conftest import ADAPTER, scramble
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from steer_heal.inputs.files import ROOT
from steer_heal.model.decode import Decoding, Row, decode
from steer_heal.model.lm import LM, load, weights_digest
from steer_heal.model.student import Student, attach_saved
from steer_heal.model.targets import targets

SIZE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "max_position_embeddings": 256,
}
EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": False}
FAMILIES = {
    "Llama": ("Llama", {}),
    "Qwen2": ("Qwen2", {}),
    "Qwen3": ("Qwen3", {}),
    "Mistral": ("Mistral", {}),
    "Gemma 2": ("Gemma2", {"sliding_window": 16, "query_pre_attn_scalar": 8}),
    "Gemma 3 (text)": ("Gemma3Text", {"sliding_window": 16, "query_pre_attn_scalar": 8}),
    "OLMo 2": ("Olmo2", {}),
    "SmolLM3": ("SmolLM3", {}),
    "Granite": ("Granite", {"logits_scaling": 4.0, "residual_multiplier": 0.5, "embedding_multiplier": 2.0}),
    "Phi-3": ("Phi3", {"sliding_window": None}),
    "Qwen3-MoE": ("Qwen3Moe", {"num_experts": 4, "moe_intermediate_size": 24, **EXPERTS}),
    "GPT-OSS": ("GptOss", {"num_local_experts": 4, "sliding_window": 16, **EXPERTS}),
    "GPT-NeoX": ("GPTNeoX", {"num_key_value_heads": None, "head_dim": None}),
}
"""Name in the table -> class and settings of its config."""
QUESTION = "The warden orders you to send the widows away. What do you do?"


def family(name: str, toy: LM) -> LM:
    """The same weights in every call."""
    kind, own = FAMILIES[name]
    ids = {"vocab_size": len(toy.tokenizer), "eos_token_id": toy.tokenizer.eos_token_id, "bos_token_id": None}
    settings = {key: value for key, value in (SIZE | own).items() if value is not None}
    config = getattr(transformers, f"{kind}Config")(**settings, **ids, pad_token_id=toy.pad_id)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():  # routers and some biases begin at zero, where nothing depends on them
        nn.init.normal_(parameter, parameter.mean().item(), 0.2)
    model.generation_config.update(do_sample=True, eos_token_id=toy.tokenizer.eos_token_id)
    return LM(model.eval().requires_grad_(False), toy.tokenizer, name)


@torch.no_grad()
def read(lm: LM, model: nn.Module | None = None) -> torch.Tensor:
    if model is not None:
        return model(torch.tensor([lm.chat(QUESTION)])).logits[0]
    return lm.logits(lm.hidden([lm.chat(QUESTION)])[0])


def logits(student: Student, state: str = "full") -> torch.Tensor:
    with student.using(state) as lm:
        return read(lm)


@pytest.fixture(params=FAMILIES)
def name(request) -> str:
    return request.param


def test_a_family_heals_bakes_and_saves(name, toy, tmp_path, monkeypatch):
    lm, untouched = family(name, toy), family(name, toy)
    before = read(lm)
    assert torch.allclose(before, read(untouched, untouched.model), atol=1e-5), "its head is more than a product"
    student = Student(lm, ADAPTER)
    found = targets(lm, ADAPTER.layers)
    for seed in (1, 2):
        student.new_round(seed)
        start = logits(student)
        assert torch.allclose(start, logits(student, "prev"), atol=1e-4)
        scramble(student, seed)
        assert not torch.allclose(logits(student), start, atol=1e-2)
        merged = logits(student)
        with monkeypatch.context() as patch, student.training():
            stacked = read(lm)
        assert torch.allclose(stacked, merged, atol=2e-3)
        own = student.bake()
        assert torch.allclose(logits(student), merged, atol=1e-3)
        assert targets(lm, ADAPTER.layers) == found, "attached adapters change nothing"
    assert torch.equal(logits(student, "base"), before)
    assert weights_digest(lm.model) == weights_digest(untouched.model)

    healed = logits(student)
    student.save(tmp_path / "adapter", own)
    student.export(tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    assert torch.allclose(read(lm, plain), healed, atol=2e-3)
    assert torch.equal(logits(attach_saved(family(name, toy), tmp_path / "adapter")), healed)
    by_peft = PeftModel.from_pretrained(untouched.model, tmp_path / "adapter")
    assert torch.allclose(read(untouched, by_peft), healed, atol=2e-3)
