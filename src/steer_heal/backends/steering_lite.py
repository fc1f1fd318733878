"""The optional steering-lite package as the extractor of the vector. Doses stay ours. Importing this needs no torch."""

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
"""All three read the mean difference; they differ in how a dose is applied."""
REFUSED = {
    "pca": "its pca is of differences without their mean, of length 1 and arbitrary sign: another quantity than ours"
}
MAX_LENGTH = 1 << 20
"""Tokens. The package's own limit of 256 cuts off the assistant tag; prompts were checked against max_prompt_tokens."""


def check(method: str) -> None:
    """UserError unless the package is installed and extracts what `steer.method` names. Imports nothing."""
    if method not in SERVED:
        why = REFUSED.get(method, "it does not extract that here")
        raise UserError(
            f"steer.method is {method!r} and steer.backend 'steering-lite': {why}; "
            f"use --steer.backend builtin, or a method among {', '.join(SERVED)}"
        )
    if find_spec("steering_lite") is None:
        raise UserError(
            "steer.backend is 'steering-lite': its package is not installed; "
            "pip install 'git+https://github.com/wassname/steering-lite.git', or use builtin"
        )


def extract(
    lm: LM, positive: Sequence[tuple[int, ...]], negative: Sequence[tuple[int, ...]], band: range, *, normalize: bool
) -> dict[int, Tensor]:
    """Mean difference of the last token's states, float32[d] on the CPU for each block of the band.

    `positive` and `negative` are token ids of templated prompts, in pairs. The package takes text, so they are decoded.
    With `normalize` each direction has length 1.
    """
    import torch

    package = import_module("steering_lite")
    bos = str(lm.tokenizer.bos_token or "")  # the package's own tokenizer call writes one again
    written_again = bos if lm.tokenizer("").input_ids == [lm.tokenizer.bos_token_id] else ""
    texts = [
        [str(lm.tokenizer.decode(list(ids))).removeprefix(written_again) for ids in side]
        for side in (positive, negative)
    ]
    config = package.MeanDiffC(layers=tuple(band), normalize=normalize, dtype=torch.float32)
    vector = package.Vector.train(lm.model, lm.tokenizer, *texts, config, max_length=MAX_LENGTH)
    states = vector.state if hasattr(vector, "state") else vector.stacked  # renamed on a branch, and there [1, d]
    return {layer: state["v"].detach().float().cpu().reshape(-1) for layer, state in states.items()}
