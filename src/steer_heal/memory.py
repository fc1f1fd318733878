"""Batches that fit the memory there is: how many rows to ask for, and what to do where they did not fit."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
from transformers import PreTrainedConfig

from steer_heal.records import UserError

Result = TypeVar("Result")
NO_MEMORY = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""How the CPU's allocator and CUDA's libraries say it, in a plain RuntimeError."""
ROWS_ON_CPU, ROWS_AT_MOST = 32, 256
SHARE_OF_FREE_MEMORY = 0.8
"""The rest is left to fragments: a cache that grows by a token a step leaves blocks behind that nothing fits into."""
LOGIT_BYTES = 44
"""Per row and vocabulary entry: the head's output, float32 copies while it is cut down, double ones while it is sampled."""


def fitting(n_rows: int, work: Callable[[int], Result]) -> tuple[int, Result]:
    """(n, work(n)) with the first n of n_rows, n_rows / 2, n_rows / 4, ... that memory holds; a warning names it where it is not n_rows.

    `work` is done again from its start, so whatever it wrote before it ran out must be of no consequence.
    """
    n = n_rows
    while True:
        try:
            result = work(n)
            break
        except RuntimeError as error:
            if not ran_out(error):
                raise
            if n == 1:
                raise UserError(
                    f"out of memory with a single row: shorten the texts (--gen.max-new-tokens, --eval.max-new-tokens, --max-prompt-tokens) or "
                    f"take --dtype bfloat16 ({str(error).splitlines()[0]})"
                ) from None
        torch.cuda.empty_cache()  # only now: the error held on to what the batch had allocated
        n //= 2
    if n < n_rows:
        warnings.warn(f"out of memory with {n_rows} rows in a batch; {n} fit, and no larger batch of such rows is tried from here on", stacklevel=2)
    return n, result


def ran_out(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in NO_MEMORY)


def rows_that_fit(n_rows: int, bytes_per_row: int, device: torch.device) -> int:
    """Rows of a batch such that `n_rows` go through in as few and as even batches as free memory allows; on the CPU a fixed number."""
    most = ROWS_ON_CPU
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + unused
        most = max(1, min(ROWS_AT_MOST, int(SHARE_OF_FREE_MEMORY * free / bytes_per_row)))
    n_batches = -(-n_rows // most)
    return -(-n_rows // max(1, n_batches))


def decode_bytes(config: PreTrainedConfig, n_prompt: int, n_new: int, element_size: int) -> int:
    """Memory that decoding one row takes: its keys and values at their longest and, whichever is larger, what its
    prompt takes on the way through the widest block or its logits while a token is drawn.

    `config` is the text model's; a block with a sliding window keeps no more than that many tokens.
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    kept = [min(n_prompt + n_new, config.sliding_window) if kind == "sliding_attention" else n_prompt + n_new for kind in kinds]
    token = 2 * config.num_key_value_heads * head_dim * element_size
    cache = token * (sum(kept) + max(kept))  # one block's old and new keys and values stand side by side while it grows
    widths = 3 * config.intermediate_size + 8 * config.num_attention_heads * head_dim
    block = n_prompt * (widths * element_size + 4 * config.hidden_size * 4)
    return cache + max(block, LOGIT_BYTES * config.vocab_size)
