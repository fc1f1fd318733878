"""What a model must do to be steered and healed, tried once when it is loaded. UserError names what it does not do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from steer_heal.errors import UserError

if TYPE_CHECKING:
    from steer_heal.model.lm import LM

SAME_LOGITS = 0.02
"""Differences below this share of the largest logit count as rounding. A bfloat16 has 8 bits of precision."""

SHORT_PROMPT = 8
"""Tokens that an adapter is read on when it is attached."""


@torch.no_grad()
def check_model(lm: LM) -> None:
    """UserError unless replies end, blocks give hidden states [b s d], and the logits are the product with the head."""
    assert lm.end_ids
    ids = lm.chat("Hello.")[-lm.max_prompt_tokens :]
    with _shapes_of_first_block(lm) as shapes:
        hidden = lm.hidden([ids])[0]
    if shapes != [(1, len(ids), lm.width)]:
        raise UserError(
            f"model {lm.name!r} ({type(lm.model).__name__}) is unsupported: its first block returns hidden states of "
            f"shape {list(shapes[0]) if shapes else 'none'}, and a vector is added to [batch, tokens, {lm.width}]; use "
            "a model of a family that README lists"
        )
    own = lm.model(lm.pad([ids])[0]).logits[0].float()
    if not own.isfinite().all():
        raise UserError(
            f"model {lm.name!r} has logits that are not finite: its weights are damaged, or too large for "
            f"{lm.model.dtype}; restore them, or use --dtype float32"
        )
    apart = (own - lm.logits(hidden)).abs().max().item()
    if not apart <= SAME_LOGITS * own.abs().max().item():
        raise UserError(
            f"model {lm.name!r} ({type(lm.model).__name__}) is unsupported: its logits differ by {apart:.2g} from the "
            "product with its head; use a model of a family that README lists"
        )


@torch.no_grad()
def short_logits(lm: LM) -> Tensor:
    """The model's own logits [n v] along the end of a short prompt, less their mean."""
    logits = lm.model(lm.pad([lm.chat("Hello.")[-SHORT_PROMPT:]])[0]).logits[0].float()
    return logits - logits.mean(dim=-1, keepdim=True)


@contextmanager
def _shapes_of_first_block(lm: LM) -> Iterator[list[tuple[int, ...]]]:
    """Inside the context, the shapes of what the first block returns are collected."""
    shapes: list[tuple[int, ...]] = []

    def read(_module: nn.Module, _inputs: Any, output: Tensor | tuple) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        shapes.append(tuple(hidden.shape))

    handle = lm.blocks[0].register_forward_hook(read)
    try:
        yield shapes
    finally:
        handle.remove()


def require_all_weights(name: str, loading: dict[str, Any], n_blocks: int) -> None:
    """UserError if weights of the model are not in its files, or the files hold blocks that the model has not.

    `loading` is what `from_pretrained` returns with output_loading_info.
    """
    missing = sorted(loading.get("missing_keys") or ())
    if missing:
        raise UserError(
            f"model {name!r} lacks {len(missing)} of its weights, {missing[0]} among them: they would be random; give "
            "a complete folder, with the config.json that belongs to its files"
        )
    wrong = sorted(str(each[0] if isinstance(each, tuple) else each) for each in loading.get("mismatched_keys") or ())
    if wrong:
        raise UserError(
            f"model {name!r}: the shape of {wrong[0]} is not the one that its config.json names; give the config.json "
            "that belongs to its files"
        )
    extra = [key for key in sorted(loading.get("unexpected_keys") or ()) if _block_index(key) >= n_blocks]
    if extra:
        raise UserError(
            f"model {name!r}: its files hold {extra[0]}, and its config.json names {n_blocks} blocks; give the "
            "config.json that belongs to its files"
        )


def _block_index(key: str) -> int:
    """The index of the block that a weight belongs to; -1 for a weight of no text block."""
    parts = key.split(".")
    if "layers" not in parts or any("vision" in part or "audio" in part or "mtp" in part for part in parts):
        return -1
    after = parts[parts.index("layers") + 1 :]
    return int(after[0]) if after and after[0].isdigit() else -1
