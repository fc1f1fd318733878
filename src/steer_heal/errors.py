"""Errors that a person can fix, how they are gathered, and text that is safe to print."""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from types import GenericAlias
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

Checked = TypeVar("Checked")
SHOWN_PROBLEMS = 20
UNPRINTABLE = re.compile(
    "\x1b\\[[0-?]*[ -/]*[@-~]|\x1b\\][^\x07\x1b]*(?:\x07|\x1b\\\\)?"
    "|[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)
"""Terminal sequences, other control characters, overrides of the writing direction, halves of surrogate pairs."""


class UserError(Exception):
    """Something that the person at the keyboard can fix. Each problem names the value, the limit and the fix."""

    def __init__(self, *problems: str, resumable: bool = True) -> None:
        """`resumable`: a run that was stopped by it can go on once the cause is gone."""
        super().__init__("\n".join(problems))
        self.problems = list(problems)
        self.resumable = resumable


class Problems:
    """Gathers what several checks find, so that a person can fix everything in one go.

    with problems.noted():
        load_contexts(cfg.steer)
    problems.raise_if_any()
    """

    def __init__(self) -> None:
        self.found: list[str] = []

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Keeps a UserError raised inside, so that the next check can run."""
        try:
            yield
        except UserError as error:
            self.found += error.problems

    def raise_if_any(self) -> None:
        """UserError with everything that was found."""
        if self.found:
            raise UserError(*self.found)


def nearest(name: object, known: Iterable[str]) -> str:
    """`did you mean 'x'?` for a name close to a known one, else the list of the known ones."""
    known = list(known)
    close = get_close_matches(str(name), known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"it must be one of {', '.join(known)}"


# --- values checked by pydantic --------------------------------------------------------------------------------
_LIMITS = {"greater_than": "gt", "greater_than_equal": "ge", "less_than": "lt", "less_than_equal": "le"}
_SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def problem_lines(error: ValidationError, where: Callable[[str], str], known: Iterable[str] = ()) -> list[str]:
    """One line for each invalid field: its place by `where`, its value, its limit, and the nearest known name."""
    lines = []
    for found in error.errors():
        at, kind, context = ".".join(map(str, found["loc"])), found["type"], found.get("ctx", {})
        value, field = f"{found['input']!r:.80}", str(found["loc"][-1]) if found["loc"] else ""
        if kind == "value_error":
            lines += [f"{where(at)}: {line}".removeprefix(": ") for line in str(context["error"]).split("\n")]
        elif kind in ("unexpected_keyword_argument", "extra_forbidden"):
            lines.append(f"{where(at)} is not a field here; {nearest(field, known)}")
        elif kind in ("missing", "missing_argument", "missing_keyword_only_argument"):
            lines.append(f"{where(at)} is missing")
        elif kind == "too_short":
            if len(found["input"]) < context["min_length"]:  # else its bad items have lines of their own
                lines.append(f"{where(at)} is {value}: it must hold at least {context['min_length']}")
        elif kind == "literal_error":
            names = re.findall(r"'([^']*)'", context["expected"])
            fix = nearest(found["input"], names) if names else f"it must be {context['expected']}"
            lines.append(f"{where(at)} is {value}: {fix}")
        elif kind in _LIMITS:
            name = _LIMITS[kind]
            lines.append(f"{where(at)} is {value}: it must be {_SIGNS[name]} {context[name]:g}")
        else:
            told = found["msg"].replace("Input should be", "it must be").replace("Input should", "it should")
            told = told.replace("String should", "it should")
            lines.append(f"{where(at)} is {value}: {told[0].lower() + told[1:]}")
    return lines


def validated_json(
    kind: type[Checked] | GenericAlias, text: str | bytes, where: str, known: Iterable[str] = ()
) -> Checked:
    """JSON text as a `kind`. UserError with a line for each invalid field, beginning with `where`; `known` are field
    names for the nearest-name hint, besides those of `kind`."""
    fields = [*getattr(kind, "__dataclass_fields__", {}), *known]
    try:
        return _adapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        lines = problem_lines(error, lambda at: f"{where}: {at!r}" if at else where, fields)
        raise UserError(*lines) from None


_adapter = functools.cache(TypeAdapter)
"""Of a type. Building one takes longer than checking a row of a data file."""


def validated(kind: type[Checked], value: Any, where: str, known: Iterable[str] = ()) -> Checked:
    """A value made of JSON types as a `kind`: see `validated_json`."""
    return validated_json(kind, json.dumps(value, default=str), where, known)


# --- printing --------------------------------------------------------------------------------------------------
def printable(text: str) -> str:
    """The text with U+FFFD for what does not print. Line ends become newlines."""
    return UNPRINTABLE.sub("\ufffd", text.replace("\r\n", "\n").replace("\r", "\n"))


def print_safe(text: object, file: Any = None, end: str = "\n") -> None:
    """Prints to stdout, or to the text stream `file`; at once where the line goes on. Nothing in the text can control
    the terminal."""
    print(printable(str(text)), file=file, end=end, flush=end != "\n")


def print_error(error: object) -> None:
    """Prints one error on stderr. An error with several problems is counted, and the first ones are listed."""
    problems = error.problems if isinstance(error, UserError) else [str(error)]
    listed = [f"- {line}" for line in problems[:SHOWN_PROBLEMS]]
    listed += [f"and {len(problems) - SHOWN_PROBLEMS} more"] * (len(problems) > SHOWN_PROBLEMS)
    text = f"error: {problems[0]}" if len(problems) == 1 else "\n".join([f"error: {len(problems)} problems", *listed])
    print_safe(text, sys.stderr)
