"""Errors that the user can fix, ways to gather several of them, and text that is safe to print."""

from __future__ import annotations

import functools
import json
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from difflib import get_close_matches
from types import GenericAlias, NoneType, UnionType
from typing import Annotated, Any, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

Checked = TypeVar("Checked")
Given = ParamSpec("Given")
SHOWN_PROBLEMS = 20
UNPRINTABLE = re.compile(
    "\x1b\\[[0-?]*[ -/]*[@-~]|\x1b\\][^\x07\x1b]*(?:\x07|\x1b\\\\)?"
    "|[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)
"""Terminal sequences, other control characters, overrides of the writing direction, halves of surrogate pairs."""

WHOLE_WORDS: dict[str, Any] = {"break_on_hyphens": False, "break_long_words": False}


class UserError(Exception):
    """A mistake that the user can fix. Each problem names the value, the limit and the fix."""

    def __init__(self, *problems: str, resumable: bool = True) -> None:
        """`resumable`: whether the stopped run can be resumed once the cause is fixed."""
        super().__init__("\n".join(problems))
        self.problems = list(problems)
        self.resumable = resumable


class Problems:
    """Collects the errors of several checks, so that the user sees them all at once.

    contexts = problems.attempt(load_contexts, cfg.steer)
    problems.raise_if_any()
    """

    def __init__(self) -> None:
        self.found: list[str] = []

    def attempt(self, check: Callable[Given, Checked], *args: Given.args, **kwargs: Given.kwargs) -> Checked | None:
        """What a check returns. None: it failed, and its problems are noted."""
        with self.noted():
            return check(*args, **kwargs)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Catches a UserError and keeps its problems, so that the next check can run."""
        try:
            yield
        except UserError as error:
            self.found += error.problems

    def raise_if_any(self) -> None:
        """Raises one UserError with all problems found."""
        if self.found:
            raise UserError(*self.found)


def nearest(name: object, known: Iterable[object]) -> str:
    """`did you mean 'x'?` if a known name is close, otherwise the list of known names."""
    names = [str(each) for each in known]
    close = get_close_matches(str(name), names, n=1) or [each for each in names if each.lower() == str(name).lower()]
    if close:
        return f"did you mean {close[0]!r}?"
    quoted = any(" " in each for each in names)
    return f"choose from {', '.join(repr(each) if quoted else each for each in names)}"


# --- values checked by pydantic --------------------------------------------------------------------------------
_TABLE = "it must be a table of named values"
_LIMITS = {
    "greater_than": "it must be > {gt:g}",
    "greater_than_equal": "it must be >= {ge:g}",
    "less_than": "it must be < {lt:g}",
    "less_than_equal": "it must be <= {le:g}",
    "finite_number": "it must be a finite number",
    "float": "it must be a number",
    "int_parsing_size": "it must be a whole number with fewer digits",
    "int": "it must be a whole number",
    "bool": "it must be true or false",
    "string_too_short": "it must have {min_length} or more characters",
    "string_unicode": "it must be valid Unicode",
    "string_type": "it must be a string",
    "path": "it must be a path",
    "tuple": "it must be a list",
    "list": "it must be a list",
    "dict": _TABLE,
    "dataclass": _TABLE,
    "too_short": "it must hold at least {min_length}",
    "too_long": "it must hold at most {max_length}",
    "json_invalid": "it is not valid JSON ({error})",
}
"""What a value must be, by the type of pydantic's error or by the first word of that type, as in int_from_float. The
slots are filled from the error's context."""
_MISSING = ("missing", "missing_argument", "missing_keyword_only_argument")
_UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")


def problem_lines(error: ValidationError, kind: Any, where: Callable[[str], str]) -> list[str]:
    """One line for each invalid field of a value that should be a `kind`: its place, its value, and its limit or fix.

    `where` turns the dotted place of a field into the words that name it; the place of the whole value is empty. Places
    in a list count from 1.
    """
    lines = []
    for found in error.errors():
        place = where(".".join(str(step + 1 if isinstance(step, int) else step) for step in found["loc"]))
        context = found.get("ctx", {})
        if found["type"] == "value_error":  # raised by our own validators, with a line for each problem
            told = str(context["error"]).split("\n")
            lines += [line if line.startswith(f"{place}.") else f"{place}: {line}".removeprefix(": ") for line in told]
        elif found["type"] in _MISSING:
            lines.append(f"{place} is missing")
        elif found["type"] in _UNKNOWN:
            lines.append(f"{place} is not a known field; {_fix_of_name(kind, *found['loc'])}")
        elif found["type"] == "too_short" and len(found["input"]) >= context["min_length"]:
            continue  # the list is long enough; its invalid items have lines of their own
        else:
            lines.append(f"{place} is {shown(found['input']):.80}: {_limit(found, kind)}")
    return lines


def shown(value: object) -> str:
    """A value as it is told about: the items of a tuple as they are typed, anything else as Python writes it."""
    return " ".join(map(str, value)) or "empty" if isinstance(value, tuple) else repr(value)


def _fix_of_name(kind: Any, *place: int | str) -> str:
    """Where a field that stands in a table which does not have it belongs, or the nearest name that the table has."""
    *above, name = place
    owner = _type_at(kind, above)
    if above and name in getattr(kind, "__dataclass_fields__", ()):
        return f"move {name!r} out of this table, above the first [table]"
    hints = _hints(owner) if is_dataclass(owner) else {}
    for table, hint in hints.items():
        if name in getattr(_without_none(hint), "__dataclass_fields__", ()):
            return f"move {name!r} into [{table}]"
    return nearest(name, getattr(owner, "__dataclass_fields__", ()))


def _limit(found: Any, kind: Any) -> str:
    """What the value of one of pydantic's errors must be."""
    context = found.get("ctx", {})
    if found["input"] != found["input"] and found["type"] != "finite_number":
        return "it must be a number"  # NaN, which every limit refuses
    limit = _LIMITS.get(found["type"]) or _LIMITS.get(found["type"].partition("_")[0])
    if limit:
        return limit.format_map(context)
    choices = get_args(_type_at(kind, found["loc"])) if found["type"] == "literal_error" else ()
    if choices:
        return nearest(found["input"], choices)
    message = found["msg"]
    return message[:1].lower() + message[1:]


def _type_at(kind: Any, place: Sequence[int | str]) -> Any:
    """The declared type at a place inside a `kind`, such as ("heal", "tau"). None: it cannot be found."""
    found = _without_none(kind)
    for step in place:
        arguments = get_args(found)
        if is_dataclass(found):
            found = _hints(found).get(str(step))
        elif len(arguments) == 2 and arguments[1] is not Ellipsis:  # a mapping, or a pair
            found = arguments[step if isinstance(step, int) else 1]
        else:
            found = next(iter(arguments), None)
        found = _without_none(found)
    return found


def _without_none(kind: Any) -> Any:
    """`X` of `Annotated[X, ...]` and of `X | None`."""
    while get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if get_origin(kind) in (Union, UnionType):
        return next(each for each in get_args(kind) if each is not NoneType)
    return kind


_hints = functools.cache(get_type_hints)
_adapter = functools.cache(TypeAdapter)
"""The validator of a type. Building one takes longer than validating a row of a data file."""


def validated_json(kind: type[Checked] | GenericAlias, text: str | bytes, where: str = "") -> Checked:
    """Parses JSON text into a `kind`. UserError with a line for each invalid field; each line begins with `where`."""

    def placed(field: str) -> str:
        if not where:
            return field
        return f"{where}: {field!r}" if field else where

    try:
        return _adapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        raise UserError(*problem_lines(error, kind, placed)) from None


def validated(kind: type[Checked], value: Any, where: str = "") -> Checked:
    """Converts a value made of JSON types into a `kind`, as `validated_json` does."""
    return validated_json(kind, json.dumps(value, default=str), where)


# --- printing --------------------------------------------------------------------------------------------------
def printable(text: str) -> str:
    """The text with U+FFFD in place of each character that cannot be printed, and with newlines as line ends."""
    return UNPRINTABLE.sub("\ufffd", text.replace("\r\n", "\n").replace("\r", "\n"))


def plural(n: int, noun: str) -> str:
    """`1 text`, `2,000 texts`."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def wrapped(text: str, indent: int = 0, fallback: int = 0) -> str:
    """Each line broken between words to the width of the terminal, its second and later parts indented. Where there is
    no terminal and COLUMNS is not set, the width is `fallback`; 0: the text itself."""
    width = shutil.get_terminal_size(fallback=(fallback, 0)).columns
    if not width:
        return text
    behind = " " * min(indent, width // 3)
    parts = [textwrap.wrap(line, width, subsequent_indent=behind, **WHOLE_WORDS) or [""] for line in text.split("\n")]
    return "\n".join(line for part in parts for line in part)


def print_safe(text: object, file: Any = None, end: str = "\n") -> None:
    """Prints to stdout or to `file`, without characters that could control the terminal.

    The output is flushed unless it ends in a newline.
    """
    print(printable(str(text)), file=file, end=end, flush=end != "\n")


def print_error(error: object) -> None:
    """Prints an error on stderr. If it has several problems, they are counted and the first ones are listed."""
    problems = error.problems if isinstance(error, UserError) else [str(error)]
    if len(problems) == 1:
        print_safe(f"error: {problems[0]}", sys.stderr)
        return
    lines = [f"error: {len(problems)} problems", *(f"- {line}" for line in problems[:SHOWN_PROBLEMS])]
    if len(problems) > SHOWN_PROBLEMS:
        lines.append(f"and {len(problems) - SHOWN_PROBLEMS} more")
    print_safe("\n".join(lines), sys.stderr)
