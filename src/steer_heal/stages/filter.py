"""Gates: which completions may train the student, and which texts count as broken."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from steer_heal.model.lm import LM
from steer_heal.records import Completion, GateFacts, Scored
from steer_heal.settings import FilterCfg

REFUSALS = (
    "as an ai",
    "as a language model",
    "as an artificial intelligence",
    "i cannot assist",
    "i can't assist",
    "i cannot help with",
    "i can't help with",
    "i cannot fulfill",
    "i can't fulfill",
    "i am unable to assist",
    "i'm unable to assist",
    "i'm not able to assist",
    "i am not able to help",
    "i cannot provide",
    "i can't provide",
    "i'm sorry, but i can",
    "against my programming",
    "i don't have personal",
)
"""Phrases of refusing to answer. Never bare "i cannot": on-trait defiance says "I cannot stand by"."""
WORST_WINDOW_TOKENS = 12
LOOP_WINDOW_WORDS = 20
STUCK_SENTENCE_WORDS = 4
NO_QUESTION = "..."
"""User message beside which `relevance` is read."""
_LOOP = re.compile(r"(.{2,4}?)\1{3,}", re.DOTALL)
_ONE_CHARACTER_LOOP = re.compile(r"(\S)\1{5,}")


@dataclass(frozen=True)
class Text:
    """A completion as the gates read it."""

    lower: str
    """Lower case, with straight apostrophes."""
    nll: Float[Tensor, " n"]
    """-log p of each token under the base, nats."""
    alone: Float[Tensor, " n"]
    """The same where NO_QUESTION stands in place of the question."""
    narration: Sequence[str]
    """The trait's phrases of telling instead of acting."""

    @property
    def words(self) -> list[str]:
        return self.lower.split()


@dataclass(frozen=True)
class Gate:
    """A number read from a text, and the limit past which the text fails."""

    measures: str
    """What the number is, in words."""
    score: Callable[[Text], float]
    limit: str | float
    """A field of FilterCfg, or the limit itself."""
    at_least: bool = False
    """The text fails below the limit instead of above it."""
    broken: bool = False
    """A text that fails is broken, whatever it says."""

    def limit_in(self, cfg: FilterCfg) -> float:
        return float(getattr(cfg, self.limit) if isinstance(self.limit, str) else self.limit)

    def fails(self, score: float, cfg: FilterCfg) -> bool:
        limit = self.limit_in(cfg)
        return score < limit if self.at_least else not score <= limit  # what is not a number fails


def tail_perplexity(text: Text) -> float:
    """Of the last quarter: steered text starts well and collapses later, and a mean over all of it hides that."""
    return perplexity(text.nll[-max(1, len(text.nll) // 4) :])


def worst_perplexity(text: Text) -> float:
    """Of the 12 tokens in a row where it is highest."""
    if not len(text.nll):
        return math.inf
    return max(perplexity(part) for part in text.nll.unfold(0, min(WORST_WINDOW_TOKENS, len(text.nll)), 1))


def perplexity(nll: Float[Tensor, " n"]) -> float:
    """exp of the mean. Infinite where that is not a number, and for an empty text: it must not count as fluent."""
    mean = nll.double().mean().item() if len(nll) else math.inf
    return math.exp(min(mean, 700.0)) if math.isfinite(mean) else math.inf


def relevance(text: Text) -> float:
    """Nats a token by which the question makes the text likelier (pointwise mutual information). Near 0 the text fits
    any question as well, however fluent it is."""
    gain = (text.alone - text.nll).double().mean().item() if len(text.nll) else -math.inf
    return gain if math.isfinite(gain) else -math.inf


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


def loop(text: str) -> float:
    """0 to 1: the largest share of words in any window of 20 that the window has already said. It is 1 where a sentence
    of 4 words or more follows itself or comes a third time.

    A loop of few words is dense where it is, however long and clean the rest of the text, and a base that has seen
    a sentence twice finds it likely: neither perplexity nor repetition over the whole text sees these.
    """
    said: Counter[str] = Counter()
    before = None
    for sentence in re.split(r"[.!?\n]+\s*", text):
        if len(sentence.split()) >= STUCK_SENTENCE_WORDS:
            said[sentence] += 1
            if sentence == before or said[sentence] == 3:
                return 1.0
            before = sentence
    words = text.split()
    size = min(LOOP_WINDOW_WORDS, len(words))
    if size < 2:
        return 0.0
    return max(1 - len(set(words[i : i + size])) / size for i in range(len(words) - size + 1))


def phrases(text: str, known: Sequence[str]) -> float:
    """How many of the known phrases the text holds."""
    return float(sum(phrase in text for phrase in known))


GATES: dict[str, Gate] = {
    "perplexity": Gate("tail perplexity", tail_perplexity, "ppl_max", broken=True),
    "spike": Gate("perplexity of the worst 12 tokens", worst_perplexity, "spike_max", broken=True),
    "repetition": Gate("repetition", lambda text: repetition(text.lower), "rep_max", broken=True),
    "loop": Gate("loop", lambda text: loop(text.lower), "loop_max", broken=True),
    "relevance": Gate("nats a token that the question explains", relevance, "relevance_min", at_least=True),
    "short": Gate("words", lambda text: float(len(text.words)), "min_words", at_least=True),
    "narration": Gate("phrases that narrate the trait", lambda text: phrases(text.lower, text.narration), 0.0),
    "refusal": Gate("phrases of refusal", lambda text: phrases(text.lower, REFUSALS), 0.0),
}
"""Every gate by the name that `filter.gates` takes. All of them score every text; those that are on drop it."""


def gate_facts(cfg: FilterCfg) -> dict[str, GateFacts]:
    """What readers of a run need to know of each gate."""
    return {
        name: GateFacts(
            measures=gate.measures,
            limit=gate.limit_in(cfg),
            at_least=gate.at_least,
            degenerate=gate.broken,
            on=name in cfg.gates,
        )
        for name, gate in GATES.items()
    }


def score(
    lm: LM, completions: Sequence[Completion], plain_system: str, narration: Sequence[str], cfg: FilterCfg
) -> list[Scored]:
    """Every completion with its scores and the reasons to drop it. Call it while the base is used."""
    nlls = lm.completion_nll([c.prompt_ids for c in completions], [c.completion_ids for c in completions])
    return judge_all(lm, completions, nlls, plain_system, narration, cfg)


def judge_all(
    lm: LM,
    completions: Sequence[Completion],
    nlls: Sequence[Tensor],
    plain_system: str,
    narration: Sequence[str],
    cfg: FilterCfg,
) -> list[Scored]:
    """`score` where -log p of each token under the base is known: a Float[n] each."""
    nothing = lm.chat(NO_QUESTION, plain_system)
    alone = lm.completion_nll([nothing] * len(completions), [c.completion_ids for c in completions])
    return [judge(c, nll, a, narration, cfg) for c, nll, a in zip(completions, nlls, alone, strict=True)]


def judge(
    completion: Completion,
    nll: Float[Tensor, " n"],
    alone: Float[Tensor, " n"],
    narration: Sequence[str],
    cfg: FilterCfg,
) -> Scored:
    """The completion with the number of every gate, the gates that it fails, and those of them that are on."""
    text = Text(completion.text.lower().replace("\u2019", "'"), nll, alone, narration)
    scores = {name: gate.score(text) for name, gate in GATES.items()}
    failed = tuple(name for name, gate in GATES.items() if gate.fails(scores[name], cfg))
    return Scored(completion, scores, failed, tuple(name for name in failed if name in cfg.gates))


def degenerate(scored: Scored) -> bool:
    """Whether the text itself is broken, whatever it says. An answer without a word is."""
    return any(GATES[name].broken for name in scored.failed) or scored.scores["short"] == 0
