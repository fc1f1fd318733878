"""What a model must do to be steered and healed, tried once when it is loaded. UserError names what it does not do."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig

from steer_heal.errors import UserError
from steer_heal.model.memory import ran_out
from steer_heal.model.prompts import require_characters

if TYPE_CHECKING:
    from steer_heal.model.lm import LM

SAME_LOGITS = {torch.float32: 1e-4, torch.float16: 0.005, torch.bfloat16: 0.02}
"""Differences below this share of the largest logit count as rounding. A bfloat16 has 8 bits of precision."""
SAME_STATES = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}
"""Differences of a final hidden state below this share of its length count as rounding. In float32 they are at most
3e-6 in the families of docs/families.md, and 1e-4 where transformers bounds a step of time in whole texts alone."""
BUFFER = re.compile(r"(inv_freq|masked_bias|attn\.bias)$")
"""Names of constants that older versions of transformers saved with the weights."""
AT_ONCE, ONE_BY_ONE = 4, 4
"""Tokens at the end of a row that are fed after the others: first these at once, then these one by one."""
OTHER_MODEL = "use a model of a family that docs/families.md lists"

SHORT_PROMPT = 8
"""Tokens that an adapter is read on when it is attached."""


@torch.no_grad()
def check_model(lm: LM) -> None:
    """UserError unless replies end, blocks give hidden states [b s d], the logits are the product with the head, and a
    row of a batch is read and continued as it is alone."""
    if getattr(lm.model.config, "is_encoder_decoder", False):
        raise UserError(_no_decoder(lm.name, lm.model.config))
    assert lm.end_ids
    ids = lm.chat("Hello.")[-lm.max_prompt_tokens :]
    unknown = lm.tokenizer.unk_token
    spelled = (
        0 if unknown is None else lm.template.conversation(["Hello."]).count(unknown)
    )  # Granite ends turns with it
    if ids.count(lm.tokenizer.unk_token_id) > spelled:
        raise UserError(
            f"the tokenizer of {lm.name!r} has no token for a part of its own chat template: it would read "
            f"{lm.tokenizer.unk_token!r} there; give the tokenizer that belongs to the template"
        )
    require_characters(lm)
    shapes: list[tuple[int, ...]] = []
    try:
        with lm.after_block(0, lambda hidden: shapes.append(tuple(hidden.shape))):
            hidden = lm.hidden([ids])[0]
        own = lm.model(lm.pad([ids])[0]).logits[0].float()
    except Exception as error:  # each model fails in its own way
        if isinstance(error, UserError) or (isinstance(error, RuntimeError) and ran_out(error)):
            raise
        raise UserError(
            f"model {lm.name!r} ({type(lm.model).__name__}) cannot read a prompt with the settings of its config.json; "
            "correct them"
        ) from error
    if shapes != [(1, len(ids), lm.width)]:
        raise UserError(
            f"model {lm.name!r} ({type(lm.model).__name__}) is unsupported: its first block returns hidden states of "
            f"shape {list(shapes[0]) if shapes else 'none'}, and a vector is added to [batch, tokens, {lm.width}]; "
            + OTHER_MODEL
        )
    if not own.isfinite().all():
        raise UserError(
            f"model {lm.name!r} has logits that are not finite: its weights are damaged, or too large for "
            f"{lm.model.dtype}; restore them, or use --dtype float32"
        )
    apart = (own - lm.logits(hidden)).abs().max().item()
    if not apart <= SAME_LOGITS[lm.head.weight.dtype] * own.abs().max().item():
        raise UserError(
            f"model {lm.name!r} ({type(lm.model).__name__}) is unsupported: its logits differ by {apart:.2g} from the "
            f"product with its head; {OTHER_MODEL}"
        )
    _check_batches(lm, ids)


def require_decoder(name: str, config: PreTrainedConfig) -> Any:
    """The class of transformers that loads a model as a language model: AutoModelForCausalLM or, for one that reads
    pictures too, AutoModelForImageTextToText. UserError if there is none, or it is an encoder with a decoder."""
    kinds = (AutoModelForCausalLM, AutoModelForImageTextToText)
    found = next((kind for kind in kinds if type(config) in kind._model_mapping), None)
    if found is None or config.is_encoder_decoder:
        raise UserError(_no_decoder(name, config))
    return found


def _no_decoder(name: str, config: PreTrainedConfig) -> str:
    return (
        f"model {name!r} is of type {config.model_type!r}, which is not a causal language model (a decoder alone): it "
        f"writes no reply behind a prompt; {OTHER_MODEL}"
    )


def _check_batches(lm: LM, ids: Sequence[int]) -> None:
    """UserError unless a short row beside a long one gives the same hidden states as alone, padded on the right, and
    padded on the left and continued from the cache after the rows changed places.

    Sets `lm.one_by_one` if several tokens at once are not continued right, and one by one are. Unsets
    `lm.pads_inside` if a row is read otherwise with padding inside it.
    """
    short = tuple(ids) * (1 + 2 * (AT_ONCE + ONE_BY_ONE) // len(ids))
    rows = [(*short, *short[:AT_ONCE]), short]
    try:
        alone = [lm.hidden([row])[0] for row in rows]
        padded = lm.hidden(rows)
        right = max(_apart(own, some[: len(row)]) for some, own, row in zip(padded, alone, rows, strict=True))
        left = _continued_apart(lm, rows, alone)
        if not left <= SAME_STATES[alone[0].dtype]:
            lm.one_by_one = True
            left = _continued_apart(lm, rows, alone)
        lm.pads_inside = _inside_apart(lm, rows, alone) <= SAME_STATES[alone[0].dtype] and not _has_hidden_window(lm)
    except Exception as error:  # each model has its own way to refuse a batch, a mask or a cache
        if isinstance(error, RuntimeError) and ran_out(error):
            raise
        raise UserError(
            f"model {lm.name!r} ({type(lm.model).__name__}) is unsupported: it cannot read a padded batch and continue "
            f"from its cache; {OTHER_MODEL}"
        ) from None
    for how, apart in (("padded on the right", right), ("padded on the left and continued from the cache", left)):
        if not apart <= SAME_STATES[alone[0].dtype]:
            raise UserError(
                f"model {lm.name!r} ({type(lm.model).__name__}) is unsupported: in a batch that is {how}, hidden "
                f"states differ by {apart:.2g} of their length from those of each row alone; {OTHER_MODEL}"
            )


def _continued_apart(lm: LM, rows: Sequence[tuple[int, ...]], alone: Sequence[Tensor]) -> float:
    """How far the rows differ from themselves alone, padded on the left, continued in another order and repeated."""
    from steer_heal.model.decode import GrowingCache  # decode imports lm, which imports this module

    cache, n = GrowingCache(lm), AT_ONCE + ONE_BY_ONE
    begun = cache.feed(*lm.pad([row[:-n] for row in rows], "left"))
    order = torch.tensor([1, 0, 1], device=lm.device)
    cache.select(order)
    ends = torch.tensor([row[-n:] for row in rows], device=lm.device)[order]
    at_once = cache.feed(ends[:, :AT_ONCE])
    singly = torch.cat([cache.feed(token) for token in ends[:, AT_ONCE:].split(1, dim=1)], dim=1)
    found = []
    for i, row in enumerate(order.tolist()):
        own = alone[row]
        parts = (begun[row][n - len(own) :], at_once[i], singly[i])
        found += [_apart(*part) for part in zip(own.split([len(own) - n, AT_ONCE, ONE_BY_ONE]), parts, strict=True)]
    return max(found)


def _inside_apart(lm: LM, rows: Sequence[tuple[int, ...]], alone: Sequence[Tensor]) -> float:
    """How far the rows differ from themselves alone if what both begin with is read once, and padding follows it.
    0: the model never reads them so."""
    from steer_heal.model.decode import GrowingCache  # decode imports lm, which imports this module

    cache, n = GrowingCache(lm), len(rows[1]) // 2
    if not cache.n_shared(rows):
        return 0.0
    cache.feed(*lm.pad([rows[0][:n]]))
    cache.select(torch.zeros(len(rows), dtype=torch.long, device=lm.device))
    after = cache.feed(*lm.pad([row[n:] for row in rows], "left"))
    return max(_apart(own[n:], some[n - len(own) :]) for own, some in zip(alone, after, strict=True))


def _has_hidden_window(lm: LM) -> bool:
    """Whether blocks have a sliding window that their layer of the cache does not know: GPT-Neo."""
    return "local" in getattr(lm.model.config.get_text_config(), "attention_layers", ())


def _apart(alone: Float[Tensor, "n d"], states: Float[Tensor, "n d"]) -> float:
    """The distance of a token's states as a share of their length: the median over the tokens. Infinite if one is not
    finite."""
    return shares(alone, states).nan_to_num(torch.inf).median().item()


def shares(one: Float[Tensor, "n d"], other: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """The distance of each row from the other as a share of its length."""
    lengths = one.float().norm(dim=-1).clamp(min=1e-12)  # a padding token may have the state 0
    return (one.float() - other.float()).norm(dim=-1) / lengths


@torch.no_grad()
def short_logits(lm: LM) -> Tensor:
    """The model's own logits [n v] along the end of a short prompt, less their mean."""
    logits = lm.model(lm.pad([lm.chat("Hello.")[-SHORT_PROMPT:]])[0]).logits[0].float()
    return logits - logits.mean(dim=-1, keepdim=True)


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
    unused = sorted(loading.get("unexpected_keys") or ())
    extra = [key for key in unused if _block_index(key) >= 0 and not BUFFER.search(key)]
    if extra:
        raise UserError(
            f"model {name!r}: its files hold {extra[0]}, which a model of {n_blocks} blocks as its config.json "
            "describes it does not use; give the config.json that belongs to its files"
        )


def _block_index(key: str) -> int:
    """The index of the block that a weight belongs to; -1 for a weight of no text block."""
    parts = key.split(".")
    if "layers" not in parts or any("vision" in part or "audio" in part or "mtp" in part for part in parts):
        return -1
    after = parts[parts.index("layers") + 1 :]
    return int(after[0]) if after and after[0].isdigit() else -1
