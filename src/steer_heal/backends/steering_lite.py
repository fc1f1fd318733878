"""Extraction of the vector by the optional package steering-lite. The dose still acts as in `model/steering.py`.

This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from steer_heal.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from steer_heal.model.lm import LM

SERVED = ("mean_diff", "cosine_gated", "directional_ablation")
"""All three extract the mean difference. They differ in how a dose acts."""
REFUSED = {
    "pca": "the package centres the differences first, and returns length 1 and arbitrary sign, unlike the builtin pca"
}
MAX_LENGTH = 1 << 20
"""Maximum number of tokens per prompt. The package's default of 256 would cut off the assistant tag, and the length has
been checked against max_prompt_tokens."""


def check(method: str) -> None:
    """UserError unless the package is installed and supports the method. Imports nothing."""
    if method not in SERVED:
        why = REFUSED.get(method, "this method is unsupported")
        raise UserError(
            f"steer.method is {method!r} and steer.backend 'steering-lite': {why}; "
            f"use --steer.backend builtin, or one of the methods {', '.join(SERVED)}"
        )
    if find_spec("steering_lite") is None:
        raise UserError(
            "steer.backend is 'steering-lite': its package is not installed; "
            "pip install 'git+https://github.com/wassname/steering-lite.git', or use builtin"
        )


def extract(
    lm: LM, positive: Sequence[tuple[int, ...]], negative: Sequence[tuple[int, ...]], band: range
) -> dict[int, Tensor]:
    """Mean difference of hidden states at the last token, float32[d] on the CPU for each block of the band.

    `positive` and `negative` are the token ids of paired prompts. They are decoded, because the package needs text.
    """
    import torch

    package = import_module("steering_lite")
    bos = str(lm.tokenizer.bos_token or "")
    adds_bos = lm.tokenizer("").input_ids == [lm.tokenizer.bos_token_id]  # the package calls the tokenizer like this
    added = bos if adds_bos else ""
    texts = [[str(lm.tokenizer.decode(list(ids))).removeprefix(added) for ids in side] for side in (positive, negative)]
    config = package.MeanDiffC(layers=tuple(band), normalize=False, dtype=torch.float32)
    vector = package.Vector.train(lm.model, lm.tokenizer, *texts, config, max_length=MAX_LENGTH)
    states = vector.state if hasattr(vector, "state") else vector.stacked  # newer versions: `stacked`, [1, d]
    return {layer: state["v"].detach().float().cpu().reshape(-1) for layer, state in states.items()}
