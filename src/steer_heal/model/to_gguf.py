"""Students as GGUF files for llama.cpp: an adapter for its --lora, or a whole model.

The families of FAMILIES are written, with a byte-level BPE tokenizer whose splitting llama.cpp knows by a name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from steer_heal.errors import UserError
from steer_heal.model.lm import LM
from steer_heal.model.template import default_template
from steer_heal.settings import Quantization

FAMILIES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}
"""By `model_type` of the model's config."""
CONVERTER = "give --format hf, and convert its folder with llama.cpp's convert_hf_to_gguf.py"
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _by_regex(pattern: str) -> list[dict[str, Any]]:
    """The steps of tokenizer.json that split text by a pattern into words and these into bytes."""
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return [split, {**BYTES, "use_regex": False}]


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
SPLITS = {
    "gpt-2": [BYTES],
    "smollm": [{"type": "Digits", "individual_digits": True}, BYTES],
    "llama-bpe": _by_regex(WORDS % "{1,3}"),
    "qwen2": _by_regex(WORDS % ""),
}
"""llama.cpp's names of ways to split text, with the steps in tokenizer.json."""


# --- an adapter --------------------------------------------------------------------------------------------------
def write_adapter(lm: LM, factors: Mapping[str, Tensor], alpha: float, file: Path) -> None:
    """Writes the factors A [r d_in] and B [d_out r] of a LoRA adapter in float32. llama.cpp adds alpha / r * B A.

    UserError for a model of another family, and for an adapter of experts.
    """
    names = _Names(lm)
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[names.family])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for key, value in factors.items():
        module, _, factor = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        if factor == "lora_B":
            value = names.in_rows(module, value)
        writer.add_tensor(f"{names.of(module + '.weight')}.{factor.lower()}", value.contiguous().numpy())
    finish(writer)


# --- a model -----------------------------------------------------------------------------------------------------
def write_model(lm: LM, state: Mapping[str, Tensor], file: Path, quantization: Quantization) -> None:
    """Writes a state dict of the model with its tokenizer and chat template. Matrices are in float16 or in 8-bit blocks
    of 32 (q8_0), other weights in float32.

    UserError for a model or a tokenizer that GGUF is not written of.
    """
    names = _Names(lm)
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[names.family], use_temp_file=True)
    stored = gguf.GGMLQuantizationType[quantization.upper()]
    writer.add_file_type(gguf.LlamaFileType["MOSTLY_" + quantization.upper()])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_config(writer, lm)
    _add_tokenizer(writer, lm)
    if (divisors := _rope_divisors(lm)) is not None:
        writer.add_tensor("rope_freqs.weight", divisors.float().cpu().numpy())
    tied = lm.model.config.tie_word_embeddings
    for key, weight in state.items():
        if tied and key == "lm_head.weight":
            continue
        values = names.in_rows(key, weight).float().cpu().contiguous().numpy()
        kind = gguf.GGMLQuantizationType.F32 if values.ndim == 1 else stored
        if kind.name == "Q8_0" and values.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            kind = gguf.GGMLQuantizationType.F16  # its rows are no whole blocks
        packed = gguf.quants.quantize(values, kind)
        if packed.dtype == np.float16 and not np.isfinite(packed).all():
            raise UserError(f"{key} of {lm.name!r} does not fit float16; give --quantization q8_0 or --format hf")
        writer.add_tensor(names.of(key), packed, raw_dtype=kind)
    finish(writer)


def finish(writer: gguf.GGUFWriter) -> None:
    """Writes what was added, and closes the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class _Names:
    """Where GGUF keeps the weights of a model, and in which order of rows."""

    def __init__(self, lm: LM) -> None:
        self.config = config = lm.model.config
        if config.model_type not in FAMILIES:
            raise UserError(
                f"model {lm.name!r} is of the family {config.model_type!r}, and GGUF is written of "
                f"{', '.join(FAMILIES)}; {CONVERTER} (convert_lora_to_gguf.py for a PEFT folder)"
            )
        self.model = lm.name
        self.family = FAMILIES[config.model_type]
        self._map = gguf.get_tensor_name_map(self.family, config.num_hidden_layers)

    def of(self, key: str) -> str:
        """Name in GGUF of a weight, by its key in the state dict."""
        name = self._map.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UserError(f"GGUF has no place for {key} of {self.model!r}; {CONVERTER}")
        return name

    def in_rows(self, key: str, weight: Float[Tensor, "rows ..."]) -> Float[Tensor, "rows ..."]:
        """The weight with its rows in GGUF's order. In the family llama, a head's rotary embedding turns neighbouring
        rows there, and the two halves of a head in transformers."""
        heads = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}
        part = next((name for name in heads if f"self_attn.{name}" in key), None)
        if self.family != gguf.MODEL_ARCH.LLAMA or part is None:
            return weight
        return weight.unflatten(0, (heads[part], 2, -1)).transpose(1, 2).flatten(0, 2)


def _add_config(writer: gguf.GGUFWriter, lm: LM) -> None:
    """The sizes of the model. UserError for a setting that these families have no key for."""
    config = lm.model.config
    rope = config.rope_parameters
    turned = rope.get("partial_rotary_factor", 1) == 1 and rope["rope_type"] in ("default", "llama3")
    fine = {
        "hidden_act": config.hidden_act == "silu",
        "use_sliding_window": not getattr(config, "use_sliding_window", False),
        "rope_parameters": turned,
    }
    if odd := [f"{name} {getattr(config, name)}" for name, holds in fine.items() if not holds]:
        raise UserError(f"model {lm.name!r} has {odd[0]}, which is not written; {CONVERTER}")
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(Path(lm.name).name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(lm.n_ids)


def _rope_divisors(lm: LM) -> Float[Tensor, " half"] | None:
    """By how much each frequency of the rotary embedding is lowered, for half a head. None: by nothing."""
    rope = lm.model.config.rope_parameters
    if rope["rope_type"] == "default":
        return None
    used = lm.text_model.rotary_emb.inv_freq.cpu()
    plain = rope["rope_theta"] ** -(torch.arange(len(used), dtype=torch.float32) / len(used))
    return plain / used


def _add_tokenizer(writer: gguf.GGUFWriter, lm: LM) -> None:
    """Vocabulary, merges, special tokens and chat template. UserError unless llama.cpp can split text in the same
    way."""
    tokenizer = lm.tokenizer
    backend: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_split(backend, lm.name))
    content = {i: token for token, i in tokenizer.get_vocab().items() if i < lm.n_ids}
    kinds = dict.fromkeys(content, gguf.TokenType.NORMAL)
    for i, token in tokenizer.added_tokens_decoder.items():
        kinds[i] = gguf.TokenType.CONTROL if token.special else gguf.TokenType.USER_DEFINED
    ids = range(lm.n_ids)
    writer.add_token_list([content.get(i, f"[unused {i}]") for i in ids])
    writer.add_token_types([kinds.get(i, gguf.TokenType.UNUSED) for i in ids])
    merges = backend["model"]["merges"]
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    end = min(lm.end_ids) if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    writer.add_eos_token_id(end)
    writer.add_eot_token_id(next(iter(lm.encode(lm.template.closing.strip())), end))
    writer.add_pad_token_id(lm.pad_id)
    first = tokenizer.bos_token_id
    if first is not None:
        writer.add_bos_token_id(first)
    writer.add_add_bos_token(first is not None and tokenizer.encode("a")[:1] == [first])
    writer.add_chat_template(default_template(tokenizer, lm.name))


def _split(backend: Mapping[str, Any], model: str) -> str:
    """llama.cpp's name for the way in which tokenizer.json splits text."""
    whole = backend["pre_tokenizer"] or {}
    steps = [{k: v for k, v in step.items() if k != "trim_offsets"} for step in whole.get("pretokenizers", [whole])]
    name = next((name for name, known in SPLITS.items() if known == steps), None)
    bpe = backend["model"]
    plain = bpe["type"] == "BPE" and not bpe["byte_fallback"] and bpe["ignore_merges"] == (name == "llama-bpe")
    if name is None or not plain or (backend["normalizer"] or {"type": "NFC"})["type"] != "NFC":
        raise UserError(f"the tokenizer of {model!r} splits text in a way that is not written; {CONVERTER}")
    return name
