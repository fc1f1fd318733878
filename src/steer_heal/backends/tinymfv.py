"""Moral-foundation vignettes asked by the optional package tinymfv, which is called moral-maps since July 2026.

This module does not import torch.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from steer_heal.errors import UserError
from steer_heal.inputs.instruments import FOUNDATIONS, Vignette

if TYPE_CHECKING:
    from steer_heal.model.lm import LM

DISTRIBUTIONS = {"moralmaps": "moral-maps", "tinymfv": "tiny-mfv"}
"""Import name and distribution name of each version of the package, the newer one first."""
ROLLOUT = "guided_rollout_forced_choice"
NEEDED = {
    f"guided.{ROLLOUT}": ("user_prompts", "max_think_tokens"),
    "guided.ForcedChoiceResult": ("p", "top1", "pmass_allowed", "nll_prefill"),
    "EvalResult": ("frac_unscorable",),
}
"""Annotated names that `ask` relies on, by their owner. The last one marks the versions that return NaN for an invalid
answer. Older versions return a made-up number."""
INSTALL = "pip install 'git+https://github.com/wassname/tinymfv.git', or use builtin"
ROWS_AT_ONCE = 16
"""The package keeps the logits of each thinking token: rows x tokens x vocabulary x 4 bytes."""


def check() -> None:
    """UserError unless the package is installed and has the interface that `ask` uses. Does not load a model."""
    name = _installed()
    if name is None:
        raise UserError(f"eval.backend is 'tinymfv': its package is not installed; {INSTALL}")
    try:
        package = import_module(name)
    except Exception as error:  # its dependencies can fail in any way
        raise UserError(
            f"eval.backend is 'tinymfv': {_described(name)} cannot be imported ({type(error).__name__}: "
            f"{str(error).partition(chr(10))[0]}); {INSTALL}"
        ) from None
    lacking = [
        f"{owner}.{field}"
        for owner, fields in NEEDED.items()
        for field in fields
        if field not in getattr(_attribute(package, owner), "__annotations__", {})
    ]
    if lacking:
        raise UserError(
            f"eval.backend is 'tinymfv': {_described(name)} lacks {', '.join(lacking)}; all versions are numbered "
            f"0.1.0, and those since 26 June 2026 (commit 3732994) work: pip uninstall {DISTRIBUTIONS[name]}, then "
            f"{INSTALL}"
        )


def ask(lm: LM, vignettes: Sequence[Vignette], condition: Any, think_tokens: int) -> dict[str, list[float]]:
    """Item values of moral_foundations, from the package's own instrument.

    For each vignette: p_<foundation>, mass, prefill_nll (nats per token), top1, unscorable. They are NaN if the answer
    is invalid. `condition` has `system`, `vector` and `dose`. The package does not support system prompts, so a persona
    goes before the vignette.

    All prompts of a batch have the same length: with padding on the left, the package uses wrong positions, which moves
    the log-probability of a foundation by about 0.3 nats. UserError if digits or padding would be misinterpreted.
    """
    if condition.contrast is not None:
        raise UserError("moral-maps cannot measure a teacher that is a contrast; use --eval.backend builtin")
    from steer_heal.model.steering import steer

    rollout = getattr(import_module(f"{_installed()}.guided"), ROLLOUT)
    texts = [f"{condition.system}\n\n{v.text}" if condition.system else v.text for v in vignettes]
    # after each text the package writes a blank line and a constant text, so these prompts have equal lengths together
    prompts = [lm.chat(f"{text}\n\nA") for text in texts]
    _check_tokens(lm, prompts)
    by_length: dict[int, list[int]] = defaultdict(list)
    for i, prompt in enumerate(prompts):
        by_length[len(prompt)].append(i)
    groups = [same[k : k + ROWS_AT_ONCE] for same in by_length.values() for k in range(0, len(same), ROWS_AT_ONCE)]
    answers: dict[int, Any] = {}
    with steer(lm, condition.vector, [condition.dose]), unpadded(lm):
        for group in groups:
            asked = [texts[i] for i in group]
            given = rollout(lm.model, lm.tokenizer, asked, max_think_tokens=max(1, think_tokens))
            answers |= zip(group, given, strict=True)
    return _columns(vignettes, [answers[i] for i in range(len(vignettes))])


def _columns(vignettes: Sequence[Vignette], answers: Sequence[Any]) -> dict[str, list[float]]:
    """The package's answers as item values."""
    rows = []
    for vignette, answer in zip(vignettes, answers, strict=True):
        right = answer.top1 in (vignette.foundation, vignette.also)
        row = {f"p_{name}": answer.p[name] for name in FOUNDATIONS}
        row |= {"mass": answer.pmass_allowed, "prefill_nll": answer.nll_prefill, "top1": right}
        scorable = all(map(math.isfinite, row.values()))
        shown = {name: float(value) if scorable else math.nan for name, value in row.items()}
        rows.append({**shown, "unscorable": float(not scorable)})
    return {name: [row[name] for row in rows] for name in rows[0]}


@contextmanager
def unpadded(lm: LM) -> Iterator[None]:
    """Inside the context, a batch with padding on the left is a UserError, because the package's results for it would
    be wrong."""

    def refuse(_module: object, _args: tuple, inputs: dict[str, Any]) -> None:
        mask: Any = inputs.get("attention_mask")
        if getattr(mask, "ndim", 0) == 2 and not mask[:, 0].all():
            raise UserError(
                f"eval.backend is 'tinymfv': {_described(_installed())} padded prompts of equal length, and its "
                "results for padded prompts are wrong; use builtin"
            )

    with lm.model.register_forward_pre_hook(refuse, with_kwargs=True):
        yield


def _check_tokens(lm: LM, prompts: Sequence[tuple[int, ...]]) -> None:
    """UserError if the package would use the wrong answer token, or mask tokens of the prompts."""
    if any(len(lm.tokenizer.encode(str(k), add_special_tokens=False)) != 1 for k in range(len(FOUNDATIONS))):
        raise UserError(
            f"eval.backend is 'tinymfv': the answers are digits, and the tokenizer of {lm.name!r} does not encode each "
            "digit as one token; use another model"
        )
    if any(lm.pad_id in prompt for prompt in prompts):
        raise UserError(
            f"eval.backend is 'tinymfv': it masks each {lm.tokenizer.pad_token!r} as padding, and the chat template of "
            f"{lm.name!r} writes that token; give its tokenizer a separate pad_token, or use builtin"
        )


def _installed() -> str | None:
    return next((name for name in DISTRIBUTIONS if find_spec(name)), None)


def _described(name: str | None) -> str:
    """The installed package with its version."""
    try:
        return f"the installed {name} {version(DISTRIBUTIONS[name or ''])}"
    except (KeyError, PackageNotFoundError):
        return f"the installed {name} of unknown version"


def _attribute(package: object, path: str) -> object:
    """The attribute at a dotted path, or None."""
    return reduce(lambda owner, name: getattr(owner, name, None), path.split("."), package)
