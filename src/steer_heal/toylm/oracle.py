"""The oracle of the toy world: can the grammar produce a sentence, and which stance does it take?"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache

from steer_heal.toylm import grammar as g
from steer_heal.toylm.templates import pattern


@dataclass(frozen=True)
class OracleScore:
    """A text, compared with the grammar."""

    share: float
    """Share of sentences that the grammar can produce, from 0 to 1."""
    n_care: int
    n_defer: int
    n_love: int
    n_deny: int

    @property
    def positive_share(self) -> float:
        """Share of caring and loving sentences among those that take a side. NaN if no sentence takes one."""
        positive = self.n_care + self.n_love
        n = positive + self.n_defer + self.n_deny
        return positive / n if n else math.nan


LONGEST_SENTENCE_WORDS = 30
_SLOTS = g.SLOTS | {"hero": g.STORY_HEROES, "thing": g.STORY_THINGS}


@cache
def recognisers() -> dict[str, re.Pattern]:
    """For each stance, the regular expression of all its sentences."""
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
    """care, defer, love, deny or plain. None if the grammar cannot produce the sentence."""
    if match := _SUM.fullmatch(sentence):
        a, b, total = map(int, match.groups())
        return "plain" if a + b == total else None
    return next((stance for stance, pattern in recognisers().items() if pattern.fullmatch(sentence)), None)


def oracle(text: str) -> OracleScore:
    """Compares a text with the grammar.

    An unfinished last sentence is ignored if others come before it and it is no longer than the grammar's longest
    sentence, because the token limit has probably cut it off.
    """
    sentences = [s for s in re.split(r"(?<=[.!?])\s+", text.strip()) if s]
    if len(sentences) > 1 and sentences[-1][-1] not in ".!?" and len(sentences[-1].split()) <= LONGEST_SENTENCE_WORDS:
        sentences = sentences[:-1]
    stances = [stance_of(s) for s in sentences]
    share = sum(s is not None for s in stances) / len(stances) if stances else 0.0
    return OracleScore(share, *(stances.count(name) for name in ("care", "defer", "love", "deny")))
