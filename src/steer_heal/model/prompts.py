"""What a model can read: texts without marks of its chat template, within its context, and with finite results.

`lm` is an LM, whose module imports this one."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from steer_heal.errors import UserError

WRITTEN = string.ascii_letters + string.digits + ".,:;?!'\"-()"
"""Characters that every chat model must be able to read."""
ANY_FLAG = "--gen.max-new-tokens, --eval.max-new-tokens or --eval.think-tokens"


@lru_cache(maxsize=4)
def marks(tokenizer: Any, n_tokens: int) -> re.Pattern[str] | None:
    """Finds the tokenizer's special tokens, spelt out in a text. None: there are none. `n_tokens` is its length, which
    changes when tokens are added."""
    special = {*tokenizer.all_special_tokens}
    special |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    ordered = sorted((token for token in special if token.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


def require_no_marks(tokenizer: Any, texts: Mapping[str, Iterable[str]]) -> None:
    """UserError with a line for each text that spells a special token: it would be encoded as that token. `texts`: by
    the words that name their place."""
    if not (pattern := marks(tokenizer, len(tokenizer))):
        return
    lines = [
        f"{place} contains {found.group()!r}, a special token of the model, which would end or open a turn there "
        f"({text[max(0, found.start() - 30) : found.end() + 30]!r}); remove it or spell it differently"
        for place, each in texts.items()
        for text in each
        if (found := pattern.search(text))
    ]
    if lines:
        raise UserError(*lines)


def without_marks(tokenizer: Any, text: str) -> str:
    """The text with a space behind the first character of each special token that it spells, so that it is read as
    text."""
    pattern = marks(tokenizer, len(tokenizer))
    return text if pattern is None else pattern.sub(lambda found: f"{found[0][:1]} {found[0][1:]}", text)


def require_characters(lm: Any, texts: Iterable[str] = (WRITTEN,)) -> None:
    """UserError if the tokenizer drops a character of the texts, so that the model would read another text."""
    characters = {character for text in texts for character in text if character.isprintable()}
    lost = sorted(character for character in characters if not character.isspace() and not lm.encode(character))
    if " " not in lm.decode(lm.encode("one two")):
        lost.append("spaces")
    if lost:
        raise UserError(
            f"the tokenizer of {lm.name!r} drops {' '.join(lost[:20])}, so that the model would not read them; its "
            "vocabulary is damaged or lacks them: restore it, or use another model"
        )


def context_length(lm: Any) -> float:
    """Maximum number of tokens of a text. Infinite if the model has none.

    Behind `index_topk` tokens a sparse attention chooses among them, and with LongRoPE a row that is longer than the
    original context changes the positions of all rows of its batch. There a row is not read as it is alone.
    """
    config = lm.model.config.get_text_config()
    limit = min(getattr(config, name, None) or math.inf for name in ("max_position_embeddings", "index_topk"))
    rope = getattr(config, "rope_parameters", None) or {}
    for each in (rope, *(own for own in rope.values() if isinstance(own, dict))):  # of all blocks, or by kind of block
        if each.get("rope_type") == "longrope":
            limit = min(limit, each["original_max_position_embeddings"])
    return math.inf if limit <= 0 or getattr(config, "alibi", False) else limit


def require_room(lm: Any, n_prompt: int, n_new: int, flag: str = ANY_FLAG) -> None:
    """UserError if a prompt and the text after it are longer than the model's context. `flag` limits what is written.
    Empty: the text is given."""
    limit = context_length(lm)
    if n_prompt + n_new <= limit:
        return
    after = f" and the text after it up to {n_new}, {n_prompt + n_new} in all" if n_new else ""
    fix = f"the prompt, or lower {flag}" if flag else "the prompt or the reply" if n_new else "the prompt"
    raise UserError(
        f"a prompt has {n_prompt} tokens{after}: the context of model {lm.name!r} has {limit}; shorten {fix}"
    )


def require_finite(lm: Any, values: Tensor, what: str = "logits") -> None:
    """UserError if a number that the model computed without steering is not finite."""
    if bool(values.isfinite().all()):
        return
    if lm.head.weight.dtype == torch.float16:
        fix = "float16 ends at 65504, and texts go beyond it; use --dtype bfloat16 or float32 in a new run"
    else:
        fix = "its weights or an adapter are damaged; restore them"
    raise UserError(f"the {what} of model {lm.name!r} are not finite: {fix}", resumable=False)


def require_finite_prompts(lm: Any, prompts: Sequence[Sequence[int]], nlls: Sequence[Tensor]) -> None:
    """UserError if -log p is not finite from the start of a text, and the prompt alone is the cause. A text that is the
    cause itself fails the filter instead."""
    bad = {tuple(prompt) for prompt, nll in zip(prompts, nlls, strict=True) if len(nll) and not nll[0].isfinite()}
    for prompt in bad:
        require_finite(lm, lm.logits(lm.hidden([prompt])[0, -1:]))
