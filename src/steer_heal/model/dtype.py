"""The number format of the weights and activations, where the settings leave it open."""

from __future__ import annotations

import platform
import time

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from steer_heal.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NARROW = 256
"""Width below which a model is in float32 on any CPU: a token then costs calls, not products (docs/benchmarks.md)."""
CLEARLY_FASTER = 1.5
"""Times as fast as in float32 that a product in bfloat16 must be to make up for its rounding."""
ROWS, MOST_OUTPUTS, TURNS = 256, 2048, 5
"""Of the product that is timed: under a fifth of a second in all at a width of 576, a second at 8192."""


def pick_dtype(asked: str, device: torch.device, config: PreTrainedConfig) -> tuple[torch.dtype, str]:
    """(dtype, why) of a model with this text config. `auto` is bfloat16 on a GPU and on a CPU that is clearly faster
    in it, else float32. UserError for a dtype that is none."""
    if asked in DTYPES:
        return DTYPES[asked], "as asked"
    if asked != "auto":
        raise UserError(f"dtype is {asked!r}: it must be one of auto, {', '.join(DTYPES)}")
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
    return picked, f"a product in bfloat16 is {times:.1f} times as fast as in float32 here"


def bfloat16_gain(width: int, outputs: int) -> float:
    """Seconds in float32 over seconds in bfloat16 of a product [256 width] x [width outputs], each the best of 5 taken
    in turns, on one thread. Its CPU time counts, so that a busy machine finds the same."""
    sizes = (ROWS, width), (min(outputs, MOST_OUTPUTS), width)
    factors = {dtype: [torch.ones(size, dtype=dtype) for size in sizes] for dtype in (torch.float32, torch.bfloat16)}
    best = dict.fromkeys(factors, float("inf"))
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for turn in range(1 + TURNS):
        for dtype, (x, weight) in factors.items():
            began = time.thread_time()
            _product(x, weight)
            if turn > 0:  # the first one warms up
                best[dtype] = min(best[dtype], time.thread_time() - began)
    torch.set_num_threads(n_threads)
    return best[torch.float32] / best[torch.bfloat16]


@torch.no_grad()
def _product(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, weight)
