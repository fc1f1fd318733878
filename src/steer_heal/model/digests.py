"""SHA-256 of what shapes the numbers of a model besides its weights: chat template, tokenizer and configurations."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from steer_heal.model.lm import LM

OF_THE_MACHINE = ("dtype", "torch_dtype", "transformers_version", "quantization_config", "architectures")
"""Fields of a configuration that differ by how and where a model was loaded."""


def digests(lm: LM) -> dict[str, str]:
    """SHA-256 by the name of the part. The device, the dtype and attached adapters make no difference."""
    model = lm.model
    parts = {
        "chat_template": lm.tokenizer.chat_template,
        "tokenizer": _tokenizer(lm.tokenizer),
        "config": _of_the_model(model.config.to_diff_dict()),
        "generation_config": _of_the_model((lm.own_generation or model.generation_config).to_diff_dict()),
    }
    return {name: _sha256(part) for name, part in parts.items()}


def _tokenizer(tokenizer: Any) -> dict[str, Any]:
    """Everything that turns text into ids and back. Truncation and padding are set by whoever used it last."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # written in Python: the vocabulary is all that can be asked for
        return {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab(), "special": special}
    content = json.loads(backend.to_str())
    return {**content, "truncation": None, "padding": None, "special": special}


def _of_the_model(value: Any) -> Any:
    """A configuration without private fields and without those of the machine, at any depth."""
    if isinstance(value, dict):
        own = {str(key): item for key, item in value.items() if key not in OF_THE_MACHINE}
        return {key: _of_the_model(item) for key, item in own.items() if not key.startswith("_")}
    if isinstance(value, list | tuple):
        return [_of_the_model(item) for item in value]
    return value


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode("utf-8", "replace")).hexdigest()
