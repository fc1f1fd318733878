"""The optional steering-lite package as the extractor of the vector; steering itself stays ours (doses per row)."""

from __future__ import annotations

from collections.abc import Sequence

import steering_lite
import torch
from torch import Tensor

from steer_heal.lm import LM
from steer_heal.stages.cfg import SteerCfg

_MAX_LENGTH = 1 << 20
"""Its own default cuts at 256 tokens and loses the assistant tag; lengths are checked before."""

_CONFIGS = {
    "mean_diff": steering_lite.MeanDiffC, "pca": steering_lite.PCAC, "cosine_gated": steering_lite.MeanDiffC,
    "directional_ablation": steering_lite.MeanDiffC,
}
"""Who extracts for each of our methods; the last two differ from mean_diff only in how a dose is applied, which stays ours."""


def steering_lite_vec(
    lm: LM, positive: Sequence[tuple[int, ...]], negative: Sequence[tuple[int, ...]], band: range, cfg: SteerCfg
) -> dict[int, Tensor]:
    """The directions of `steering_lite.Vector.train` on the same templated prompts."""
    bos = lm.tokenizer.bos_token or ""  # its own tokenizer call adds one again
    adds_bos = lm.tokenizer("").input_ids == [lm.tokenizer.bos_token_id]
    texts = [[lm.tokenizer.decode(ids).removeprefix(bos if adds_bos else "") for ids in side] for side in (positive, negative)]
    config = _CONFIGS[cfg.method](layers=tuple(band), normalize=cfg.normalize, dtype=torch.float32)
    vector = steering_lite.Vector.train(lm.model, lm.tokenizer, *texts, config, max_length=_MAX_LENGTH)
    return {layer: state["v"].detach().float().cpu().reshape(-1) for layer, state in vector.state.items()}
