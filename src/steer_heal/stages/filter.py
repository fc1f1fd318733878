"""Completions -> scores and the reasons to drop them. Call under the base gate: perplexity is the base's."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from steer_heal.lm import LM
from steer_heal.records import Completion, Scored
from steer_heal.stages.cfg import FilterCfg, Gate

REFUSALS = (
    "as an ai", "as a language model", "as an artificial intelligence", "i cannot assist", "i can't assist",
    "i cannot help with", "i can't help with", "i cannot fulfill", "i can't fulfill", "i am unable to assist",
    "i'm unable to assist", "i'm not able to assist", "i am not able to help", "i cannot provide", "i can't provide",
    "i'm sorry, but i can", "against my programming", "i don't have personal",
)
"""Boilerplate of refusing to answer. Never bare "i cannot": on-trait defiance says "I cannot stand by"."""
BROKEN = {"perplexity", "spike", "repetition", "loop"}
"""Gates that a text fails for being broken, whatever it says."""
WORST_WINDOW_TOKENS = 12
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
        "ppl_worst": max(perplexity(part) for part in nll.unfold(0, min(WORST_WINDOW_TOKENS, len(nll)), 1)) if len(nll) else math.inf,
        "rep": repetition(text),
        "loop": loop(text),
        "words": float(len(text.split())),
    }
    fails: dict[Gate, bool] = {
        "perplexity": not scores["ppl_tail"] <= cfg.ppl_max,
        "spike": not scores["ppl_worst"] <= cfg.spike_max,
        "repetition": scores["rep"] > cfg.rep_max,
        "loop": scores["loop"] > cfg.loop_max,
        "short": scores["words"] < cfg.min_words,
        "narration": any(phrase in text for phrase in narration),
        "refusal": any(phrase in text for phrase in REFUSALS),
    }
    failed = tuple(gate for gate, fails_it in fails.items() if fails_it)
    return Scored(completion, scores, failed, tuple(gate for gate in failed if gate in cfg.gates))


def degenerate(scored: Scored) -> bool:
    """Whether the text itself is broken, whatever it says; an answer without a word is."""
    return bool(BROKEN & set(scored.failed)) or scored.scores["words"] == 0


def tail(nll: Float[Tensor, " n"]) -> Float[Tensor, " m"]:
    """The last quarter: steered text starts well and collapses later, and a mean over all of it hides that."""
    return nll[-max(1, len(nll) // 4) :]


def perplexity(nll: Float[Tensor, " n"]) -> float:
    """exp of the mean; infinite where it is not a number, and for an empty text, which no model should be credited for."""
    mean = nll.double().mean().item() if len(nll) else math.inf
    return math.exp(min(mean, 700.0)) if math.isfinite(mean) else math.inf


def repetition(text: str) -> float:
    """0 to 1, the worst of: repeated word n-grams (n = 2 to 4) over the text and over its last quarter, and the
    share of characters inside blocks of 2 to 4 that come four times or more in a row (or of 1, six times)."""
    words = text.split()
    ending = words[-max(16, len(words) // 4) :]
    looping = sum(len(m.group()) for pattern in (_LOOP, _ONE_CHARACTER_LOOP) for m in pattern.finditer(text))
    return max(_repeated_ngrams(words), _repeated_ngrams(ending), min(1.0, looping / max(1, len(text))))


LOOP_WINDOW_WORDS = 20
STUCK_SENTENCE_WORDS = 4


def loop(text: str) -> float:
    """0 to 1: the largest share of words in any window of 20 that the window has already said; 1 where the text is
    stuck, that is where a sentence of 4 words or more follows itself or comes a third time.

    A loop of few words is dense where it is, however long and clean the rest of the text, and a base that has seen
    a sentence twice finds it likely: neither perplexity nor repetition over the whole text sees these.
    """
    said = Counter()
    before = None
    for sentence in re.split(r"[.!?\n]+\s*", text):
        if len(sentence.split()) >= STUCK_SENTENCE_WORDS:
            said[sentence] += 1
            if sentence == before or said[sentence] == 3:
                return 1.0
            before = sentence
    words = text.split()
    size = min(LOOP_WINDOW_WORDS, len(words))
    return max((1 - len(set(words[i : i + size])) / size for i in range(len(words) - size + 1)), default=0.0) if size > 1 else 0.0


def _repeated_ngrams(words: Sequence[str]) -> float:
    shares = []
    for n in (2, 3, 4):
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        if grams:
            shares.append(1 - len(set(grams)) / len(grams))
    return sum(shares) / len(shares) if shares else 0.0
