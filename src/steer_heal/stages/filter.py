"""Completions -> scores and the reasons to drop them. Call under the base gate: perplexity is the base's."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from steer_heal.lm import LM
from steer_heal.records import Completion, Scored
from steer_heal.stages.cfg import FilterCfg

REFUSALS = (
    "as an ai", "as a language model", "as an artificial intelligence", "i cannot assist", "i can't assist",
    "i cannot help with", "i can't help with", "i cannot fulfill", "i can't fulfill", "i am unable to assist",
    "i'm unable to assist", "i'm not able to assist", "i am not able to help", "i cannot provide", "i can't provide",
    "i'm sorry, but i can", "against my programming", "i don't have personal",
)
"""Boilerplate of refusing to answer. Never bare "i cannot": on-trait defiance says "I cannot stand by"."""
_LOOP = re.compile(r"(.{2,4}?)\1{3,}", re.DOTALL)
_ONE_CHARACTER_LOOP = re.compile(r"(\S)\1{5,}")


def score(lm: LM, completions: Sequence[Completion], narration: Sequence[str], cfg: FilterCfg) -> list[Scored]:
    """Every completion with its scores and the reasons against it (none: kept)."""
    nlls = lm.completion_nll([c.prompt_ids for c in completions], [c.completion_ids for c in completions])
    return [judge(c, nll, narration, cfg) for c, nll in zip(completions, nlls, strict=True)]


def judge(completion: Completion, nll: Float[Tensor, " n"], narration: Sequence[str], cfg: FilterCfg) -> Scored:
    text = completion.text.lower().replace("\u2019", "'")
    scores = {
        "ppl": perplexity(nll),
        "ppl_tail": perplexity(tail(nll)),
        "rep": repetition(text),
        "words": float(len(text.split())),
    }
    reasons = []
    if not scores["ppl_tail"] <= cfg.ppl_max:
        reasons.append("perplexity")
    if scores["rep"] > cfg.rep_max:
        reasons.append("repetition")
    if scores["words"] < cfg.min_words:
        reasons.append("short")
    if any(phrase in text for phrase in narration):
        reasons.append("narration")
    if any(phrase in text for phrase in REFUSALS):
        reasons.append("refusal")
    return Scored(completion, scores, tuple(reasons))


def degenerate(scored: Scored) -> bool:
    """Whether the text itself is broken, whatever it says; an answer without a word is."""
    return bool({"perplexity", "repetition"} & set(scored.reasons)) or scored.scores["words"] == 0


def tail(nll: Float[Tensor, " n"]) -> Float[Tensor, " m"]:
    """The last quarter: steered text starts well and collapses later, and a mean over all of it hides that."""
    return nll[-max(1, len(nll) // 4) :]


def perplexity(nll: Float[Tensor, " n"]) -> float:
    """exp of the mean; infinite for an empty text, which no model should be credited for."""
    return math.exp(min(nll.double().mean().item(), 700.0)) if len(nll) else math.inf


def repetition(text: str) -> float:
    """0 to 1, the worst of: repeated word n-grams (n = 2 to 4) over the text and over its last quarter, and the
    share of characters inside blocks of 2 to 4 that come four times or more in a row (or of 1, six times)."""
    words = text.split()
    ending = words[-max(16, len(words) // 4) :]
    looping = sum(len(m.group()) for pattern in (_LOOP, _ONE_CHARACTER_LOOP) for m in pattern.finditer(text))
    return max(_repeated_ngrams(words), _repeated_ngrams(ending), min(1.0, looping / max(1, len(text))))


def _repeated_ngrams(words: Sequence[str]) -> float:
    shares = []
    for n in (2, 3, 4):
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        if grams:
            shares.append(1 - len(set(grams)) / len(grams))
    return sum(shares) / len(shares) if shares else 0.0
