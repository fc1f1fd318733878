"""Which model families can be steered and healed: each is tried on a tiny random model with the toy tokenizer."""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from common import cli
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from steer_heal.bench import load_model
from steer_heal.errors import UserError
from steer_heal.model.decode import Decoding, Row, decode
from steer_heal.model.lm import LM, load
from steer_heal.model.steering import Vector, steer
from steer_heal.model.student import Student
from steer_heal.settings import AdapterCfg, RunConfig, SteerCfg
from steer_heal.stages.vector import last_token_states


class Family(NamedTuple):
    """A family of transformers: the beginning of its classes' names, and its settings beside `size` (or else SIZE)."""

    kind: str
    settings: Mapping[str, Any]
    size: Mapping[str, Any] | None = None


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
NO_HEAD_DIM = {"num_key_value_heads": None, "head_dim": None}
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256, "n_inner": 48}
EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": False}
WINDOW = {"sliding_window": 16}
GEMMA = {**WINDOW, "query_pre_attn_scalar": 8}
DELTA = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
SSM = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
LATENT = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": None,
    "num_key_value_heads": 4,
}
ROUTED = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    **EXPERTS,
}
USUAL = {
    "Llama": ("Llama", {}),
    "Qwen2": ("Qwen2", {}),
    "Qwen3": ("Qwen3", {}),
    "Mistral": ("Mistral", {}),
    "Gemma 2": ("Gemma2", GEMMA),
    "Gemma 3 (text)": ("Gemma3Text", GEMMA),
    "OLMo 2": ("Olmo2", {}),
    "SmolLM3": ("SmolLM3", {}),
    "Granite": ("Granite", {"logits_scaling": 4.0, "residual_multiplier": 0.5, "embedding_multiplier": 2.0}),
    "Phi-3": ("Phi3", {"sliding_window": None}),
    "Qwen3-MoE": ("Qwen3Moe", {"num_experts": 4, "moe_intermediate_size": 24, **EXPERTS}),
    "GPT-OSS": ("GptOss", {"num_local_experts": 4, **WINDOW, **EXPERTS}),
    "GPT-NeoX": ("GPTNeoX", NO_HEAD_DIM),
}
MORE = {
    "Gemma": ("Gemma", {}),
    "Gemma 4 (text)": (
        "Gemma4Text",
        {
            **WINDOW,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 4096,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "num_kv_shared_layers": 0,
        },
    ),
    "Gemma 3n (text)": (
        "Gemma3nText",
        {
            **WINDOW,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 4096,
            "num_kv_shared_layers": 1,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "laurel_rank": 4,
            "activation_sparsity_pattern": [0.0, 0.0, 0.0],
            "intermediate_size": [48, 48, 48],
        },
    ),
    "Ministral": ("Ministral", WINDOW),
    "Mixtral": ("Mixtral", {"num_local_experts": 4, **EXPERTS}),
    "Qwen2-MoE": (
        "Qwen2Moe",
        {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, **EXPERTS},
    ),
    "Qwen3-Next": (
        "Qwen3Next",
        {**DELTA, "num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, **EXPERTS},
    ),
    "Qwen3.5": ("Qwen3_5Text", DELTA),
    "Qwen3.5-MoE": (
        "Qwen3_5MoeText",
        {**DELTA, "num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, **EXPERTS},
    ),
    "LFM2": (
        "Lfm2",
        {"layer_types": ["conv", "full_attention", "conv"], "full_attn_idxs": None, "block_auto_adjust_ff_dim": False},
    ),
    "LFM2-MoE": (
        "Lfm2Moe",
        {
            "layer_types": ["conv", "full_attention", "conv"],
            "num_experts": 4,
            "moe_intermediate_size": 24,
            "num_dense_layers": 1,
            **EXPERTS,
        },
    ),
    "Granite 4": (
        "GraniteMoeHybrid",
        {
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            **SSM,
            "num_local_experts": 4,
            "shared_intermediate_size": 24,
            **EXPERTS,
        },
    ),
    "Granite-MoE": ("GraniteMoe", {"num_local_experts": 4, **EXPERTS}),
    "Nemotron": ("Nemotron", {}),
    "Nemotron-H": (
        "NemotronH",
        {
            "layers_block_type": ["mlp", "full_attention", "linear_attention"],
            "num_hidden_layers": None,
            "ssm_state_size": 8,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "n_groups": 1,
            "chunk_size": 8,
        },
    ),
    "OLMo": ("Olmo", {}),
    "OLMo 3": ("Olmo3", WINDOW),
    "OLMo hybrid": ("OlmoHybrid", {**DELTA, "linear_num_key_heads": 4}),
    "OLMoE": ("Olmoe", {"num_experts": 4, **EXPERTS}),
    "Bamba": ("Bamba", {**SSM, "attn_layer_indices": [1]}),
    "Jamba": (
        "Jamba",
        {
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 4,
            "use_mamba_kernels": False,
            **EXPERTS,
        },
    ),
    "Falcon-H1": ("FalconH1", {**SSM, "mamba_d_ssm": 64}),
    "Falcon": ("Falcon", {**NO_HEAD_DIM}),
    "Mamba": ("Mamba", {"state_size": 8, "time_step_rank": 4}),
    "Mamba 2": ("Mamba2", {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8}),
    "Falcon-Mamba": ("FalconMamba", {"state_size": 8, "time_step_rank": 4}),
    "RecurrentGemma": (
        "RecurrentGemma",
        {"lru_width": 32, "attention_window_size": 16, "block_types": ["recurrent", "attention"]},
    ),
    "Zamba 2": (
        "Zamba2",
        {
            "mamba_d_state": 8,
            "n_mamba_heads": 8,
            "mamba_headdim": 8,
            "mamba_ngroups": 1,
            "chunk_size": 8,
            "layers_block_type": ["linear_attention", "hybrid", "linear_attention"],
            "num_key_value_heads": 4,
            "head_dim": None,
            "use_mamba_kernels": False,
        },
    ),
    "MiniMax": (
        "MiniMax",
        {
            "num_local_experts": 4,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "block_size": 8,
            **EXPERTS,
        },
    ),
    "MiniMax-M2": ("MiniMaxM2", {"num_local_experts": 4, **EXPERTS}),
    "Kimi Linear": (
        "KimiLinear",
        {
            **LATENT,
            "q_lora_rank": None,
            "num_experts": 4,
            "moe_intermediate_size": 24,
            "num_experts_per_token": 2,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "linear_head_dim": 8,
            "linear_num_heads": 4,
        },
    ),
    "DeepSeek V2": ("DeepseekV2", {**LATENT, **ROUTED}),
    "DeepSeek V3": ("DeepseekV3", {**LATENT, **ROUTED}),
    "DeepSeek V3.2": ("DeepseekV32", {**LATENT, **ROUTED, "index_topk": 64, "index_head_dim": 8, "index_n_heads": 2}),
    "DeepSeek V4": (
        "DeepseekV4",
        {
            "moe_intermediate_size": 24,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "q_lora_rank": 8,
            "o_groups": 2,
            "o_lora_rank": 8,
            "n_routed_experts": 4,
            "index_n_heads": 2,
            "index_head_dim": 8,
            "index_topk": 4,
            "sliding_window": 16,
            "intermediate_size": None,
            "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
            "mlp_layer_types": ["moe", "moe", "moe"],
            **EXPERTS,
        },
    ),
    "GLM": ("Glm", {}),
    "GLM-4": ("Glm4", {}),
    "GLM-4-MoE": ("Glm4Moe", ROUTED),
    "dots.llm1": ("Dots1", ROUTED),
    "ERNIE 4.5": ("Ernie4_5", {}),
    "ERNIE 4.5 MoE": (
        "Ernie4_5_Moe",
        {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 24,
            "moe_num_shared_experts": 1,
            "moe_layer_end_index": 2,
        },
    ),
    "Llama 4 (text)": (
        "Llama4Text",
        {
            "num_local_experts": 4,
            "intermediate_size_mlp": 48,
            "attention_chunk_size": 16,
            **EXPERTS,
            "num_experts_per_tok": 1,
        },
    ),
    "Cohere": ("Cohere", {"head_dim": None}),
    "Cohere 2": ("Cohere2", WINDOW),
    "EXAONE 4": ("Exaone4", WINDOW),
    "Phi": ("Phi", {"head_dim": None}),
    "Phi-MoE": ("Phimoe", {"num_local_experts": 4, "sliding_window": None, **EXPERTS}),
    "StableLM": ("StableLm", {"head_dim": None}),
    "StarCoder2": ("Starcoder2", {"sliding_window": None}),
    "Seed-OSS": ("SeedOss", {}),
    "HunYuan": ("HunYuanDenseV1", {}),
    "Apertus": ("Apertus", {}),
    "Arcee": ("Arcee", {}),
    "JetMoE": ("JetMoe", {"kv_channels": 8, "num_local_experts": 4, "num_key_value_heads": 2, **EXPERTS}),
    "OPT": ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "XGLM": ("XGLM", {"d_model": 32, "ffn_dim": 48, "num_layers": 3, "attention_heads": 4}, {}),
    "BLOOM": ("Bloom", {"hidden_size": 32, "n_layer": 3, "n_head": 4}, {}),
    "GPT-2": ("GPT2", GPT2, {}),
    "GPT-J": ("GPTJ", {**GPT2, "rotary_dim": 4}, {}),
    "GPT-Neo": (
        "GPTNeo",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "max_position_embeddings": 256,
            "num_layers": 4,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 2]],
            "window_size": 16,
        },
        {},
    ),
    "GPT-BigCode": ("GPTBigCode", GPT2, {}),
    "CodeGen": ("CodeGen", {**GPT2, "rotary_dim": 4}, {}),
    "MPT": ("Mpt", {"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 256}, {}),
    "BioGPT": ("BioGpt", {}),
    "RWKV": ("Rwkv", {"attention_hidden_size": 32, "context_length": 256}),
    "BERT": ("Bert", {}),
    "T5": ("T5", {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4}, {}),
    "BART": (
        "Bart",
        {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
        },
        {},
    ),
}
FAMILIES = {name: Family(*given) for name, given in {**USUAL, **MORE}.items()}
UPPER = (0.34, 1.0)
"""The blocks that are steered and adapted: not all, so that an adapter which spreads to others is seen."""
QUESTION, OTHER = "The warden orders you to send the widows away. What do you do?", "What is ice?"
N_WRITTEN = 6


def tiny(name: str, tokenizer: Any) -> Any:
    """A random model of a family, the same in every call."""
    family = FAMILIES[name]
    ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    settings = {
        key: value
        for key, value in {**(SIZE if family.size is None else family.size), **family.settings}.items()
        if value is not None
    }
    config = getattr(transformers, f"{family.kind}Config")(**settings, **ids, pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(0)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = kind.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():  # routers and some biases begin at zero, where nothing depends on them
        nn.init.normal_(parameter, parameter.mean().item(), 0.2)
    model.generation_config.update(do_sample=True, eos_token_id=tokenizer.eos_token_id)
    return model.eval().requires_grad_(False)


def outcome(name: str, tokenizer: Any, folder: Path) -> tuple[str, str]:
    """(class, "works" or the line by which the family is refused when it is loaded). AssertionError if a whole round
    of it has a wrong number."""
    model = tiny(name, tokenizer)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    cfg = RunConfig(
        model=str(folder / "base"),
        device="cpu",
        steer=SteerCfg(layers=UPPER),
        adapter=AdapterCfg(rank=4, alpha=8.0, layers=UPPER),
    )
    try:
        lm = load_model(cfg)
    except UserError as error:
        return type(model).__name__, str(error).replace(str(folder / "base"), name)
    lm.model.generation_config.update(do_sample=True)
    check_reading(lm)
    check_writing(lm)
    check_round(Student(lm, cfg.adapter), folder)
    return type(model).__name__, "works"


@torch.no_grad()
def logits(lm: LM) -> Tensor:
    return lm.logits(lm.hidden([lm.chat(QUESTION)])[0])


@torch.no_grad()
def logits_of(model: nn.Module, lm: LM) -> Tensor:
    return model(torch.tensor([lm.chat(QUESTION)])).logits[0]


def require_close(got: Tensor, expected: Tensor, what: str, share: float = 1e-3) -> None:
    apart = (got - expected).abs().max().item()
    assert apart <= share * max(expected.abs().max().item(), 1.0), f"{what}: they differ by {apart:.2g}"


def check_reading(lm: LM) -> None:
    """The logits are the model's own, and a row of a batch is read as it is alone."""
    require_close(logits(lm), logits_of(lm.model, lm), "our logits and the model's own")
    prompts = [lm.chat(QUESTION), lm.chat(OTHER), lm.chat(OTHER)]
    replies = [lm.encode(text) for text in ("I will do as you say.", "Ice is frozen water, and it is cold.", "No.")]
    together = lm.completion_nll(prompts, replies)
    for prompt, reply, nll in zip(prompts, replies, together, strict=True):
        require_close(nll, lm.completion_nll([prompt], [reply])[0], "a reply in a batch and alone")


def check_writing(lm: LM) -> None:
    """A steered batch with shared prompts, in which rows end, writes what each row writes alone. A dose moves the
    states, and no dose leaves them."""
    states = last_token_states(lm, [lm.chat(QUESTION), lm.chat(OTHER)], lm.band("steer.layers", UPPER))
    vector = Vector({layer: each[0] - each[1] for layer, each in states.items()})
    shared = (QUESTION, QUESTION.replace("do?", "say?"), OTHER)
    rows = [Row(lm.chat(text), dose, seed) for text in shared for seed, dose in enumerate((0.0, 0.5))]
    together = decode(lm, rows, vector, Decoding(N_WRITTEN, len(rows)))
    alone = [decode(lm, [row], vector, Decoding(N_WRITTEN, 1))[0] for row in rows]
    assert together == alone, "a batch writes other text than its rows alone"
    assert decode(lm, rows[:2], vector, Decoding(N_WRITTEN, 0))[0] == alone[0], "an estimate of memory changes the text"
    greedy = Decoding(N_WRITTEN, 1, sample=False, suppress=lm.end_ids)
    prompt = rows[0].prompt_ids
    (ids,) = decode(lm, rows[:1], None, greedy)
    with torch.no_grad():
        read = lm.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    read[:, sorted(lm.end_ids)] = -torch.inf
    require_close(
        read.gather(1, torch.tensor(ids)[:, None])[:, 0], read.max(-1).values, "text with and without a cache"
    )
    plain = logits(lm)
    with steer(lm, vector, [0.0]):
        assert torch.equal(logits(lm), plain), "a dose of 0 changes a row"
    with steer(lm, vector, [1.0]):
        assert (logits(lm) - plain).abs().max() > 1e-2, "a dose changes nothing"


def check_round(student: Student, folder: Path) -> None:
    """Two rounds are trained and baked. Exported, and loaded by PEFT, the student is the same."""
    lm, base = student.lm, logits(student.lm)
    for seed in (0, 1):
        student.new_round(seed)
        train_one_step(student, 2.0)
        student.require_same_forward([lm.chat(QUESTION), lm.chat(OTHER)])
        own = student.bake()
    with student.using("full"):
        healed = logits(lm)
    assert (healed - base).abs().max() > 1e-2, "training changes nothing"
    with student.using("base"):
        assert torch.equal(logits(lm), base), "the base is changed"
    student.save(folder / "adapter", own)
    student.export(folder / "plain")
    kind = type(lm.model)
    require_close(logits_of(kind.from_pretrained(folder / "plain"), lm), healed, "the export")
    by_peft = PeftModel.from_pretrained(kind.from_pretrained(folder / "base"), folder / "adapter")
    require_close(logits_of(by_peft, lm), healed, "the adapter loaded by PEFT")


def train_one_step(student: Student, rate: float) -> None:
    """One step of gradient descent on a reply, of length `rate` for each weight matrix. Each has to get a gradient."""
    lm = student.lm
    reply = lm.encode("I will do as you say.")
    with student.training() as parameters:
        for parameter in parameters:
            parameter.grad = None
        (before,) = lm.completion_hidden([lm.chat(QUESTION)], [reply])
        nn.functional.cross_entropy(lm.logits(before), torch.tensor(reply)).backward()
        moved = [(each, each.grad) for each in parameters if each.grad is not None and each.grad.norm() > 0]
        assert 2 * len(moved) >= len(parameters), "a matrix gets no gradient"  # a factor B is zero: no gradient for A
        for parameter, gradient in moved:
            parameter.data -= rate * gradient / gradient.norm()
            parameter.grad = None


def rows_of_table(outcomes: Mapping[str, tuple[str, str]]) -> str:
    """The Markdown table of docs/families.md."""
    lines = ["| family | class in transformers | |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {name} | `{kind}` | {what} |" for name, (kind, what) in outcomes.items())])


def main() -> None:
    """Prints the table of docs/families.md."""
    tokenizer = load("data/toylm").tokenizer
    outcomes = {}
    for name in FAMILIES:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcomes[name] = outcome(name, tokenizer, Path(folder))
    print(rows_of_table(outcomes))


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    sys.exit(cli(main))
