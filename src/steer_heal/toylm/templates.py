"""The template language of grammar.py: sampling one text, and the regular expression of all texts."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from functools import cache

_TOKEN = re.compile(r"[(|)]|\{\w+\}|[^(|){}]+")


@cache
def _parse(template: str) -> tuple:
    """A template as nested tuples: literal strings, ("slot", name), and ("any", (sequence, ...))."""
    tokens = _TOKEN.findall(template)

    def sequence(i: int) -> tuple[tuple, int]:
        parts: list = []
        while i < len(tokens) and tokens[i] not in ("|", ")"):
            token = tokens[i]
            if token == "(":
                options = []
                while tokens[i] != ")":
                    option, i = sequence(i + 1)
                    options.append(option)
                parts.append(("any", tuple(options)))
            else:
                parts.append(("slot", token[1:-1]) if token[0] == "{" else token)
            i += 1
        return tuple(parts), i

    return sequence(0)[0]


def expand(template: str, rng: random.Random, bound: Mapping[str, str]) -> str:
    """A sample of a template. `bound` maps the names of slots to their values."""

    def draw(parts: tuple) -> str:
        out = []
        for part in parts:
            if isinstance(part, str):
                out.append(part)
            elif part[0] == "any":
                out.append(draw(rng.choice(part[1])))
            else:
                value = bound[part[1].lower()]
                out.append(value[0].upper() + value[1:] if part[1][0].isupper() else value)
        return "".join(out)

    return draw(_parse(template))


def pattern(template: str, slots: Mapping[str, Sequence[str]]) -> str:
    """The regular expression of all texts that a template can produce, with any values of its slots."""

    def build(parts: tuple) -> str:
        out = []
        for part in parts:
            if isinstance(part, str):
                out.append(re.escape(part))
            elif part[0] == "any":
                out.append("(?:" + "|".join(build(option) for option in part[1]) + ")")
            else:
                values = [build(_parse(value)) for value in slots[part[1].lower()]]
                if part[1][0].isupper():
                    values = [value[0].upper() + value[1:] for value in values]
                out.append("(?:" + "|".join(values) + ")")
        return "".join(out)

    return build(_parse(template))
