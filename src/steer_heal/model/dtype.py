"""The number format of weights and activations if the settings do not fix it."""

from __future__ import annotations

import platform
import time

import torch
from torch import Tensor
from transformers import PreTrainedConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NARROW = 256
"""A model with a smaller width than this runs in float32 on every CPU: function calls, not products, take most of the
time of a token (docs/benchmarks.md)."""
CLEARLY_FASTER = 1.5
"""A product must be at least this many times as fast in bfloat16 as in float32 to be worth the rounding."""
ROWS = 256
MOST_OUTPUTS = 2048
TURNS = 5
"""Size and repetitions of the timed product. It takes under 0.2 s at a width of 576, and about 1 s at 8192."""


def pick_dtype(asked: str, device: torch.device, config: PreTrainedConfig) -> tuple[torch.dtype, str]:
    """(dtype, reason) for a model with this text config. `auto` is bfloat16 on a GPU, and on a CPU that is clearly
    faster in it; otherwise float32."""
    if asked != "auto":
        return DTYPES[asked], "as asked"
    if device.type != "cpu":
        return torch.bfloat16, "on a GPU"
    if config.hidden_size < NARROW:
        return torch.float32, f"a model {config.hidden_size} wide gains nothing from bfloat16"
    if torch.cpu._is_amx_tile_supported():
        return torch.bfloat16, "this CPU has matrix units for it (AMX)"
    if platform.machine() in ("x86_64", "AMD64") and not torch.cpu._is_avx512_bf16_supported():
        return torch.float32, "this CPU has no instructions for bfloat16"
    times = bfloat16_gain(config.hidden_size, getattr(config, "intermediate_size", 4 * config.hidden_size))
    picked = torch.bfloat16 if times >= CLEARLY_FASTER else torch.float32
    return picked, f"on this CPU a product is {times:.1f} times as fast in bfloat16 as in float32"


def bfloat16_gain(width: int, outputs: int) -> float:
    """The time of a product [256 width] x [width outputs] in float32, divided by its time in bfloat16.

    Each time is the best of 5, on one thread; the two dtypes alternate. It is CPU time, which hardly changes on a busy
    machine.
    """
    sizes = ((ROWS, width), (min(outputs, MOST_OUTPUTS), width))
    factors = {dtype: [torch.ones(size, dtype=dtype) for size in sizes] for dtype in (torch.float32, torch.bfloat16)}
    best = dict.fromkeys(factors, float("inf"))
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for turn in range(1 + TURNS):
        for dtype, (x, weight) in factors.items():
            began = time.thread_time()
            _product(x, weight)
            if turn > 0:  # the first turn warms up
                best[dtype] = min(best[dtype], time.thread_time() - began)
    torch.set_num_threads(n_threads)
    return best[torch.float32] / best[torch.bfloat16]


@torch.no_grad()
def _product(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, weight)
