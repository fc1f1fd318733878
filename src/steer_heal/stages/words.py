"""Words and sentences of a text, also in scripts that put no space between words."""

from __future__ import annotations

import re
from itertools import chain

from icu4py.breakers import WordBreaker

_THAI_LAO = "\u0e01-\u0e3a\u0e40-\u0e5b\u0e81-\u0eff"
_UNSPACED = re.compile(
    f"[{_THAI_LAO}"
    "\u1000-\u109f\u1780-\u17ff"  # Burmese, Khmer
    "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
    "\u3041-\u309f\u30a1-\u30ff\u31f0-\u31ff\uff66-\uff9f]"  # Hiragana, Katakana
)
ENDS = (
    ".!?"
    "\u3002\uff01\uff1f\uff61\u104b\u17d4"  # Chinese, Japanese, Burmese, Khmer
    "\u0964\u0965\u06d4\u061f\u0589\u1362\u1367"  # Hindi, Urdu, Arabic, Armenian, Amharic
)
"""Marks that end a sentence."""
_END = re.compile(f"[{ENDS}\n]+\\s*")
_END_UNSPACED = re.compile(
    f"[{ENDS}\n]+\\s*|(?<=[{_THAI_LAO}])\\s+(?=[{_THAI_LAO}])"  # Thai and Lao end a clause with a space
)
_QUOTES = " \"'()\u2018\u2019\u201c\u201d\u300c\u300d\u300e\u300f\uff08\uff09"


def words(text: str) -> list[str]:
    """What stands between white space. Where that is written without spaces, the words that ICU's dictionaries find in
    it, without punctuation."""
    parts = text.split()
    return list(chain.from_iterable(_cut(part) for part in parts)) if _UNSPACED.search(text) else parts


def sentences(text: str) -> list[str]:
    """The sentences without their ends; clauses in Thai and Lao, which do not mark the end of a sentence."""
    if not _UNSPACED.search(text):
        return _END.split(text)
    return [sentence.strip(_QUOTES) for sentence in _END_UNSPACED.split(text)]


def _cut(part: str) -> list[str]:
    if not _UNSPACED.search(part):
        return [part]
    whole = part.encode("utf-8", "replace").decode()  # ICU refuses halves of characters
    return [word for word in WordBreaker(whole, "en") if any(map(str.isalnum, word))]
