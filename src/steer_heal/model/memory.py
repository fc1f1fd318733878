"""Batch sizes: how many rows fit into memory, and smaller batches after one that did not fit."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedConfig

from steer_heal.errors import UserError

NO_MEMORY = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""Parts of the RuntimeError messages in which the CPU's allocator and CUDA's libraries report a lack of memory."""
ROWS_ON_CPU = 32
ROWS_AT_MOST = 256
SHARE_OF_FREE_MEMORY = 0.8
"""The rest is reserved for fragmentation: copies made when rows leave, or when a sliding window moves, leave gaps."""
CGROUP = Path("/sys/fs/cgroup")
"""The folder in which a container sees its own memory limit (cgroup v2)."""
LOGIT_BYTES = 44
"""Bytes per row and vocabulary entry: the head's output, its float32 copies, and float64 copies during sampling."""


@dataclass
class BatchLimits:
    """Largest batches to try. A batch that runs out of memory lowers them until the program ends."""

    read_tokens: int = 16_384
    """Padded tokens of a teacher-forced batch."""
    decode_tokens: float = math.inf
    """Tokens of a decoded batch: its prompts and the maximum number of new tokens."""


def fewer_rows(n_rows: int, error: RuntimeError) -> int:
    """Half of `n_rows`, with a warning, after a batch ran out of memory. Any other error is raised again. UserError if
    a single row does not fit."""
    if not ran_out(error):
        raise error
    if n_rows == 1:
        raise UserError(
            "out of memory with a single row: shorten the texts (--gen.max-new-tokens, --eval.max-new-tokens, "
            f"--max-prompt-tokens) or use --dtype bfloat16 ({str(error).splitlines()[0]})",
            resumable=False,
        ) from None
    warnings.warn(f"out of memory with {n_rows} rows in a batch: using {n_rows // 2} from now on", stacklevel=3)
    return n_rows // 2


def free_unused() -> None:
    """Returns cached memory to the device. Call it outside the `except` block, in which the error keeps the batch
    alive."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated.

    On a GPU this includes memory that torch has reserved and does not use. On a CPU it is what the system can provide
    without swapping, within the limit of a container.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free = psutil.virtual_memory().available
    with suppress(OSError, ValueError, KeyError):  # not in a container, or in one without a limit ("max")
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        kept = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        free = min(free, max(0, limit - used + int(kept["inactive_file"])))  # cached files can be dropped
    return free


def ran_out(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in NO_MEMORY)


def batches(lengths: Sequence[int], n_tokens: int) -> Iterator[list[int]]:
    """Groups of row indices with similar lengths, each with at most `n_tokens` padded tokens."""
    group: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if group and lengths[i] * (len(group) + 1) > n_tokens:
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def rows_that_fit(n_rows: int, bytes_per_row: int, device: torch.device) -> int:
    """Rows per batch, for `n_rows` rows in as few and as equal batches as free memory allows. On a CPU the maximum is
    fixed."""
    most = ROWS_ON_CPU
    if device.type == "cuda":
        most = max(1, min(ROWS_AT_MOST, int(SHARE_OF_FREE_MEMORY * free_bytes(device) / bytes_per_row)))
    n_batches = -(-n_rows // most)
    return -(-n_rows // max(1, n_batches))


def decode_bytes(config: PreTrainedConfig, n_prompt: int, n_new: int, element_size: int) -> int:
    """Memory for decoding one row, in bytes.

    It is the sum of the keys and values at their longest, and the larger of two: the activations of the prompt in the
    widest block, or the logits during sampling. `config` is the text model's. A block with a sliding window keeps at
    most as many tokens as its window has. Any other counts as one with keys and values, and a size that `config` does
    not name as a usual one, so that the estimate is rather too large.
    """
    width = config.hidden_size
    n_heads = _size(config, "num_attention_heads", 1)
    each = [_size(config, name, 0) for name in ("head_dim", "qk_head_dim", "v_head_dim")]
    head_dim = max(each) or width // n_heads
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    n = n_prompt + n_new
    window = _size(config, "sliding_window", n)
    kept = [min(n, window) if kind == "sliding_attention" else n for kind in kinds]
    token = 2 * _size(config, "num_key_value_heads", n_heads) * head_dim * element_size
    cache = token * (sum(kept) + max(kept))  # old and new keys and values of a block coexist during a copy
    widths = 3 * _size(config, "intermediate_size", 4 * width) + 8 * n_heads * head_dim
    block = n_prompt * (widths * element_size + 4 * width * 4)
    return cache + max(block, LOGIT_BYTES * config.vocab_size)


def _size(config: PreTrainedConfig, name: str, default: int) -> int:
    """A size from a config: the largest, if the blocks differ. `default` if it names none."""
    try:
        values = [getattr(config, name, None)]
    except RuntimeError:  # it refuses a single answer
        per_block: Any = config
        values = [getattr(per_block.per_layer_config[i], name, None) for i in range(config.num_hidden_layers)]
    sizes = [size for value in values for size in (value if isinstance(value, list | tuple) else [value]) if size]
    return max(sizes, default=default)
