"""The toy world's coherence oracle: which sentences the grammar can produce, and the stance each one takes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from steer_heal.toylm import grammar as g
from steer_heal.toylm.templates import pattern


@dataclass(frozen=True)
class OracleScore:
    """What the grammar says of a text."""

    share: float
    """Share of sentences that the grammar can produce, 0 to 1."""
    n_sentences: int
    n_care: int
    n_defer: int
    n_love: int
    n_deny: int


LONGEST_SENTENCE_WORDS = 30
_SLOTS = g.SLOTS | {"hero": g.STORY_HEROES, "thing": g.STORY_THINGS}


@cache
def recognisers() -> dict[str, re.Pattern]:
    groups = {
        "care": g.CARE_DECISION + g.CARE_SENTENCES,
        "defer": g.DEFER_DECISION + g.DEFER_SENTENCES,
        "love": g.LOVE_SENTENCES,
        "deny": g.DENY_SENTENCES,
        "plain": g.PLAIN_SENTENCES + g.STORY_OPENING + g.STORY_SENTENCES + g.STORY_CLOSING + list(g.FACTS.values()),
    }
    return {
        stance: re.compile("|".join(f"(?:{pattern(t, _SLOTS)})" for t in templates))
        for stance, templates in groups.items()
    }


_SUM = re.compile(r"(\d) plus (\d) is (\d{1,2})\.")


def stance_of(sentence: str) -> str | None:
    """care, defer, love, deny, plain, or None where the grammar cannot produce the sentence."""
    if match := _SUM.fullmatch(sentence):
        a, b, total = map(int, match.groups())
        return "plain" if a + b == total else None
    return next((stance for stance, pattern in recognisers().items() if pattern.fullmatch(sentence)), None)


def oracle(text: str) -> OracleScore:
    """Share of a text's sentences that the grammar can produce, and how many take which stance.

    A last sentence without an end is left out where others came before it and it is not longer than the
    grammar's longest: it was cut by the token limit, which is no fault of the text.
    """
    sentences = [s for s in re.split(r"(?<=[.!?])\s+", text.strip()) if s]
    if len(sentences) > 1 and sentences[-1][-1] not in ".!?" and len(sentences[-1].split()) <= LONGEST_SENTENCE_WORDS:
        sentences = sentences[:-1]
    stances = [stance_of(s) for s in sentences]
    share = sum(s is not None for s in stances) / len(stances) if stances else 0.0
    return OracleScore(share, len(stances), *(stances.count(name) for name in ("care", "defer", "love", "deny")))
