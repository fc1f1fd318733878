"""Gates score each text. They decide which completions may train the student and which texts are degenerate."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from steer_heal.inputs.attacks import Attack, attacked
from steer_heal.model.lm import LM
from steer_heal.records import Completion, GateFacts, Scored, Trait, alone
from steer_heal.settings import FilterCfg
from steer_heal.stages.words import sentences, words

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
"""Phrases of a refusal to answer. A bare "i cannot" is not among them, since defiance, which is on trait, says "I
cannot stand by"."""
WORST_WINDOW_TOKENS = 12
LOOP_WINDOW_WORDS = 20
STUCK_SENTENCE_WORDS = 4
NO_QUESTION = "..."
"""User message that replaces the question when `relevance` is scored."""
_LOOP = re.compile(r"(.{2,4}?)\1{3,}", re.DOTALL)
_ONE_CHARACTER_LOOP = re.compile(r"(\S)\1{5,}")


@dataclass(frozen=True)
class Text:
    """What the gates know of a completion."""

    lower: str
    """The text in lower case, with straight apostrophes."""
    nll: Float[Tensor, " n"]
    """-log p of each token under the base, in nats."""
    alone: Float[Tensor, " n"]
    """The same, with NO_QUESTION in place of the question."""
    narration: Sequence[str]
    """Phrases that narrate the trait instead of acting it out."""


@dataclass(frozen=True)
class Gate:
    """A score of a text, and the limit past which the text fails."""

    measures: str
    """What the score is, in words."""
    score: Callable[[Text], float]
    limit: str | float
    """Name of a field of FilterCfg, or the limit itself."""
    at_least: bool = False
    """A text fails below the limit, not above it."""
    degenerate: bool = False
    """A text that fails is degenerate, whatever it says. Reports call such texts broken."""

    def limit_in(self, cfg: FilterCfg) -> float:
        return float(getattr(cfg, self.limit) if isinstance(self.limit, str) else self.limit)

    def fix(self, name: str) -> str:
        """The flag that lets more texts through."""
        if not isinstance(self.limit, str):
            return f"leave {name} out of --filter.gates"
        return f"{'lower' if self.at_least else 'raise'} --filter.{self.limit.replace('_', '-')}"

    def fails(self, score: float, cfg: FilterCfg) -> bool:
        limit = self.limit_in(cfg)
        return score < limit if self.at_least else not score <= limit  # NaN fails


def tail_perplexity(text: Text) -> float:
    """Perplexity of the last quarter. Steered text starts well and collapses later, which a mean over the whole text
    hides."""
    return perplexity(text.nll[-max(1, len(text.nll) // 4) :])


def worst_perplexity(text: Text) -> float:
    """Perplexity of those 12 consecutive tokens where it is highest."""
    if not len(text.nll):
        return math.inf
    return max(perplexity(part) for part in text.nll.unfold(0, min(WORST_WINDOW_TOKENS, len(text.nll)), 1))


def perplexity(nll: Float[Tensor, " n"]) -> float:
    """exp of the mean. Infinite if the mean is not finite or the text is empty, since neither must count as fluent."""
    mean = nll.double().mean().item() if len(nll) else math.inf
    return math.exp(min(mean, 700.0)) if math.isfinite(mean) else math.inf


def relevance(text: Text) -> float:
    """Nats per token by which the question makes the text likelier (pointwise mutual information). Near 0, the text
    would fit any question, however fluent it is."""
    gain = (text.alone - text.nll).double().mean().item() if len(text.nll) else -math.inf
    return gain if math.isfinite(gain) else -math.inf


def repetition(text: str) -> float:
    """0 to 1, the highest of three shares: repeated word n-grams (n = 2 to 4) in the whole text, the same in its last
    quarter, and characters in a block of 2 to 4 that follows itself at least three times (a single one: five times)."""
    said = words(text)
    ending = said[-max(16, len(said) // 4) :]
    looping = sum(len(m.group()) for pattern in (_LOOP, _ONE_CHARACTER_LOOP) for m in pattern.finditer(text))
    return max(_repeated_ngrams(said), _repeated_ngrams(ending), min(1.0, looping / max(1, len(text))))


def _repeated_ngrams(said: Sequence[str]) -> float:
    grams = [[tuple(said[i : i + n]) for i in range(len(said) - n + 1)] for n in (2, 3, 4)]
    shares = [1 - len(set(each)) / len(each) for each in grams if each]
    return sum(shares) / len(shares) if shares else 0.0


def loop(text: str) -> float:
    """0 to 1: the largest share of repeated words in any 20 consecutive words. It is 1 if a sentence of 4 or more words
    follows itself or occurs three times.

    A short loop fills its window, however long and clean the rest of the text is. Perplexity does not show it, since
    the base finds a sentence likely after it has read it twice, and neither does the repetition of the whole text.
    """
    seen: Counter[str] = Counter()
    before = None
    for sentence in sentences(text):
        if len(words(sentence)) >= STUCK_SENTENCE_WORDS:
            seen[sentence] += 1
            if sentence == before or seen[sentence] == 3:
                return 1.0
        if any(map(str.isalpha, sentence)):  # not the number of a list, or marks
            before = sentence
    said = words(text)
    size = min(LOOP_WINDOW_WORDS, len(said))
    if size < 2:
        return 0.0
    return max(1 - len(set(said[i : i + size])) / size for i in range(len(said) - size + 1))


def phrases(text: str, known: Sequence[str]) -> float:
    """Number of known phrases that the text contains."""
    return float(sum(phrase in text for phrase in known))


GATES: dict[str, Gate] = {
    "perplexity": Gate("tail perplexity", tail_perplexity, "ppl_max", degenerate=True),
    "spike": Gate("perplexity of the worst 12 tokens", worst_perplexity, "spike_max", degenerate=True),
    "repetition": Gate("repetition", lambda text: repetition(text.lower), "rep_max", degenerate=True),
    "loop": Gate("loop", lambda text: loop(text.lower), "loop_max", degenerate=True),
    "relevance": Gate("nats per token that the question explains", relevance, "relevance_min", at_least=True),
    "short": Gate("words", lambda text: float(len(words(text.lower))), "min_words", at_least=True),
    "narration": Gate("phrases that narrate the trait", lambda text: phrases(text.lower, text.narration), 0.0),
    "refusal": Gate("phrases of refusal", lambda text: phrases(text.lower, REFUSALS), 0.0),
}
"""Gates by the name that `filter.gates` takes. All of them score every text. Only those that are on drop it."""


def gate_facts(cfg: FilterCfg) -> dict[str, GateFacts]:
    """What readers of a run need to know of each gate."""
    return {
        name: GateFacts(
            measures=gate.measures,
            limit=gate.limit_in(cfg),
            at_least=gate.at_least,
            degenerate=gate.degenerate,
            on=name in cfg.gates,
        )
        for name, gate in GATES.items()
    }


def score_texts(
    lm: LM,
    completions: Sequence[Completion],
    *,
    trait: Trait,
    cfg: FilterCfg,
    hold: Sequence[Attack] = (),
    nlls: Sequence[Tensor] | None = None,
) -> list[Scored]:
    """Every completion with its scores and the reasons to drop it. Call it while the base is used.

    Args:
        hold: The attacks under which completions were written.
        nlls: -log p of each token under the base and the plain prompt, a Float[n] for each completion, if known.
    """
    ids = [c.completion_ids for c in completions]
    if nlls is None:
        nlls = lm.completion_nll([c.prompt_ids for c in completions], ids)
    unasked = {"": alone(NO_QUESTION)} | {attack.name: attacked(attack, NO_QUESTION, trait) for attack in hold}
    prompts = {name: lm.prompt(conversation, trait.plain_system) for name, conversation in unasked.items()}
    without_question = lm.completion_nll([prompts[c.attack] for c in completions], ids)
    return [
        score_text(c, nll=nll, alone=without, narration=trait.narration, cfg=cfg)
        for c, nll, without in zip(completions, nlls, without_question, strict=True)
    ]


def score_text(
    completion: Completion,
    *,
    nll: Float[Tensor, " n"],
    alone: Float[Tensor, " n"],
    narration: Sequence[str],
    cfg: FilterCfg,
) -> Scored:
    """The completion with its score at every gate, the gates that it fails, and those of them that are on."""
    text = Text(completion.text.lower().replace("\u2019", "'"), nll=nll, alone=alone, narration=narration)
    scores = {name: gate.score(text) for name, gate in GATES.items()}
    failed = tuple(name for name, gate in GATES.items() if gate.fails(scores[name], cfg))
    return Scored(completion, scores, failed=failed, reasons=tuple(name for name in failed if name in cfg.gates))


def degenerate(scored: Scored) -> bool:
    """Whether the text fails a gate for degenerate text, on or off, or has no words."""
    return any(GATES[name].degenerate for name in scored.failed) or scored.scores["short"] == 0
