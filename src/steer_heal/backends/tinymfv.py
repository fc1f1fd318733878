"""The optional tinymfv package (moral-maps since July 2026) as a reader of vignettes. Importing this needs no torch."""

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
"""Names that the package is imported by, the newer one first, and installed by."""
ROLLOUT = "guided_rollout_forced_choice"
NEEDED = {
    f"guided.{ROLLOUT}": ("user_prompts", "max_think_tokens"),
    "guided.ForcedChoiceResult": ("p", "top1", "pmass_allowed", "nll_prefill"),
    "EvalResult": ("frac_unscorable",),
}
"""What `read` relies on, by what is annotated with it. The last one marks the versions that give NaN for an answer
which cannot be read; older ones made up a number."""
INSTALL = "pip install 'git+https://github.com/wassname/tinymfv.git', or use builtin"
ROWS_AT_ONCE = 16
"""The package keeps the logits of each thinking token: rows x tokens x vocabulary x 4 bytes."""


def check() -> None:
    """UserError unless the package is installed and has the interface that `read` calls. Loads no model."""
    name = _installed()
    if name is None:
        raise UserError(f"eval.backend is 'tinymfv': its package is not installed; {INSTALL}")
    try:
        package = import_module(name)
    except Exception as error:  # what it depends on can fail in any way
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
            f"eval.backend is 'tinymfv': {_described(name)} lacks {', '.join(lacking)}; every version is numbered "
            f"0.1.0, and those since 26 June 2026 (commit 3732994) serve: pip uninstall {DISTRIBUTIONS[name]}, then "
            f"{INSTALL}"
        )


def read(lm: LM, vignettes: Sequence[Vignette], condition: Any, think_tokens: int) -> dict[str, list[float]]:
    """Per vignette: p_<foundation>, mass, prefill_nll (nats per token), top1, unscorable, by the package's instrument.

    NaN where the answer cannot be read. `condition` has `system`, `vector` and `dose`. The package takes no system
    prompt: a persona is put before the vignette, as templates without a system role do.

    Prompts of one length go in together: behind padding on the left the package loses the positions, which moves the
    log-probability of a foundation by some 0.3 nats. UserError where digits or padding would be read wrongly.
    """
    from steer_heal.model.steering import steer

    rollout = getattr(import_module(f"{_installed()}.guided"), ROLLOUT)
    texts = [f"{condition.system}\n\n{v.text}" if condition.system else v.text for v in vignettes]
    # behind each text the package writes a blank line and what is the same for all: lengths differ as these do
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
    columns: dict[str, list[float]] = {f"p_{name}": [] for name in FOUNDATIONS}
    columns |= {"mass": [], "prefill_nll": [], "top1": [], "unscorable": []}
    for i, vignette in enumerate(vignettes):
        answer = answers[i]
        right = answer.top1 in (vignette.foundation, vignette.also)
        row = {f"p_{name}": answer.p[name] for name in FOUNDATIONS}
        row |= {"mass": answer.pmass_allowed, "prefill_nll": answer.nll_prefill, "top1": right}
        scorable = all(map(math.isfinite, row.values()))
        for name, value in row.items():
            columns[name].append(float(value) if scorable else math.nan)
        columns["unscorable"].append(float(not scorable))
    return columns


@contextmanager
def unpadded(lm: LM) -> Iterator[None]:
    """While inside, a batch with padding on the left is a UserError: the package's readings of it would be wrong."""

    def refuse(_module: object, _args: tuple, inputs: dict[str, Any]) -> None:
        mask: Any = inputs.get("attention_mask")
        if getattr(mask, "ndim", 0) == 2 and not mask[:, 0].all():
            raise UserError(
                f"eval.backend is 'tinymfv': {_described(_installed())} padded prompts that were given to it at one "
                "length, and reads padded prompts wrongly; use builtin"
            )

    handle = lm.model.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _check_tokens(lm: LM, prompts: Sequence[tuple[int, ...]]) -> None:
    """UserError where the package would take the wrong answer token, or hide tokens of the prompts from the model."""
    if any(len(lm.tokenizer.encode(str(k), add_special_tokens=False)) != 1 for k in range(len(FOUNDATIONS))):
        raise UserError(
            f"eval.backend is 'tinymfv': the tokenizer of {lm.name!r} does not write each digit as one token, and the "
            "answers are digits; use another model"
        )
    if any(lm.pad_id in prompt for prompt in prompts):
        raise UserError(
            f"eval.backend is 'tinymfv': it hides each {lm.tokenizer.pad_token!r} as padding, and the chat template of "
            f"{lm.name!r} writes that token; give its tokenizer a pad_token of its own, or use builtin"
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
