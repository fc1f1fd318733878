"""Each family of the table in README.md, on a tiny random model with the toy tokenizer."""

import re
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import scramble
from peft import PeftModel
from places import ROOT
from torch import nn
from transformers import AutoModelForCausalLM

from steer_heal.errors import UserError
from steer_heal.model.decode import Decoding, Row, decode
from steer_heal.model.lm import LM, weights_digest
from steer_heal.model.lora import targets
from steer_heal.model.student import ADAPTERS, Student, attach_saved
from steer_heal.settings import AdapterCfg
from steer_heal.stages.heal import heal

UPPER = AdapterCfg(rank=4, alpha=8.0, layers=(0.34, 1.0))
"""Not all blocks, so that an adapter which spreads to others is seen."""

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


def scrambled(lm: LM, seed: int = 1) -> Student:
    student = Student(lm, UPPER)
    student.new_round(seed)
    scramble(student, seed)
    return student


def test_every_linear_layer_of_the_adapted_blocks_is_adapted_or_named(name, toy):
    lm = family(name, toy)
    prefix = next(path for path, module in lm.model.named_modules() if module is lm.blocks)
    in_band = {
        path
        for path, parameter in lm.model.named_parameters()
        if path.startswith((f"{prefix}.1.", f"{prefix}.2.")) and parameter.ndim > 1 and not path.endswith("bias")
    }
    found = targets(lm, UPPER.layers)
    adapted = {*(f"{path}.weight" for path in found.linears), *found.parameters}
    assert adapted and all(path.endswith(found.left_out) for path in in_band - adapted) and adapted <= in_band
    assert not found.left_out or "experts" in str(found.parameters), "only routers are left out"
    before = {path: value.clone() for path, value in lm.model.state_dict().items()}
    with scrambled(lm).using("full"):
        changed = {
            path.replace("base_layer.", "")
            for path, value in lm.model.state_dict().items()
            if ".lora_" not in path and not torch.equal(value, before[path.replace("base_layer.", "")])
        }
    assert changed == adapted
    assert targets(lm, UPPER.layers) == found, "the same with adapters attached"


def test_a_family_heals_bakes_and_saves(name, toy, tmp_path, monkeypatch):
    lm, untouched = family(name, toy), family(name, toy)
    before = read(lm)
    assert torch.allclose(before, read(untouched, untouched.model), atol=1e-5), "its logits are its own"
    student = Student(lm, UPPER)
    for seed in (1, 2):
        student.new_round(seed)
        assert torch.allclose(logits(student), logits(student, "prev"), atol=1e-4)
        scramble(student, seed)
        merged = logits(student)
        assert not torch.allclose(merged, logits(student, "prev"), atol=1e-1)
        for lossy in (False, True):  # the history merged, and every factor apart
            monkeypatch.setattr(Student, "merging_is_lossy", lossy)
            with student.training():
                assert torch.allclose(read(lm), merged, atol=2e-3)
        own = student.bake()
        assert torch.allclose(logits(student), merged, atol=1e-3)
    assert torch.equal(logits(student, "base"), before)
    assert weights_digest(lm.model) == weights_digest(untouched.model)

    healed = logits(student)
    student.save(tmp_path / "adapter", own)
    student.export(tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    assert torch.allclose(read(lm, plain), healed, atol=2e-3)
    assert not any("lora" in path for path, _ in plain.named_parameters())
    assert torch.equal(logits(attach_saved(family(name, toy), tmp_path / "adapter")), healed)
    by_peft = PeftModel.from_pretrained(untouched.model, tmp_path / "adapter")
    assert torch.allclose(read(untouched, by_peft), healed, atol=2e-3)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_every_kind_of_adapter_is_measured_and_folded_as_it_trains(kind, name, toy):
    for dtype in (torch.float32, torch.bfloat16):
        lm = family(name, toy)
        lm.model.to(dtype)
        student, rows = Student(lm, replace(UPPER, kind=kind)), [lm.chat(QUESTION), lm.chat("What is ice?")]
        for seed in (1, 2):
            student.new_round(seed)
            scramble(student, seed)
            student.require_same_forward(rows)
            student.bake()


def test_a_family_writes_what_its_own_generation_writes(name, toy):
    lm = family(name, toy)
    how = Decoding(24, 2, sample=False, suppress=lm.end_ids)
    with scrambled(lm).using("full"):
        prompts = [lm.chat(QUESTION), lm.chat("What is ice?")]
        for prompt, ids in zip(prompts, decode(lm, [Row(p) for p in prompts], None, how), strict=True):
            logp = lm.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            logp[:, sorted(lm.end_ids)] = -torch.inf
            written = logp.gather(1, torch.tensor(ids)[:, None])[:, 0]
            assert torch.allclose(written, logp.max(-1).values, atol=1e-3), "greedy, read without a cache"


@pytest.mark.parametrize("name", ["Llama", "Qwen3-MoE", "GPT-OSS"])
def test_the_updates_of_a_round_are_what_merging_adds(name, toy):
    student = scrambled(family(name, toy))
    before = {path: value.clone() for path, value in student.lm.model.state_dict().items() if ".lora_" not in path}
    updates = [scale * b @ a for a, b, scale in student.round_updates()]
    with student.using("full") as lm:
        state = lm.model.state_dict()
        added = {path: state[path] - value for path, value in before.items()}
    size = lambda tensors: sorted(tensor.norm().item() for tensor in tensors)
    each = [m for path, delta in added.items() if delta.any() for m in (delta if delta.ndim == 3 else [delta])]
    assert size(each) == pytest.approx(size(updates), rel=1e-4)


@pytest.mark.parametrize("name", ["Llama", "Qwen3-MoE", "GPT-OSS"])
def test_the_spectral_penalty_shrinks_the_update_of_layers_and_of_stacked_experts(name, toy, kept, heal_cfg):
    sizes = []
    for weight in (0.0, 10.0):
        student = Student(family(name, toy), UPPER)
        heal(student, kept, replace(heal_cfg, spectral=weight), round_=0, seed=0)
        sizes.append(max(torch.linalg.matrix_norm(scale * b @ a, 2).item() for a, b, scale in student.round_updates()))
    assert 0 < sizes[1] < sizes[0]


def test_targets_that_peft_would_rename_are_an_error(toy, monkeypatch):
    monkeypatch.setitem(FAMILIES, "mixed", ("Qwen3Moe", FAMILIES["Qwen3-MoE"][1] | {"mlp_only_layers": [1]}))
    with pytest.raises(UserError, match="'mixed'.*experts"):
        Student(family("mixed", toy), UPPER).new_round(0)


def test_the_table_in_the_readme_lists_the_families_that_are_tested():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^\| family \|.*\n\|[-|]+\n((?:\|.*\n)+)", text, flags=re.MULTILINE)
    named = {name for row in table.splitlines() for name in row.split("|")[1].strip().split(", ")}
    assert named == set(FAMILIES)
