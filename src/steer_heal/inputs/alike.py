"""When two prompts are the same one."""

from __future__ import annotations

from unicodedata import category, normalize


def alike(text: str) -> str:
    """Equal for texts that differ only in case, white space, punctuation, or the form of their characters (NFKC)."""
    folded = normalize("NFKC", normalize("NFKC", text).casefold())
    return "".join(letter for letter in folded if category(letter)[0] not in "PZC") or text
