"""What a person reads: text without control characters, and commands that end in one line instead of a traceback."""

from __future__ import annotations

import re
import sys
from typing import TextIO

UNPRINTABLE = re.compile(
    "\x1b\\[[0-?]*[ -/]*[@-~]|\x1b\\][^\x07\x1b]*(?:\x07|\x1b\\\\)?|[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)
"""Terminal sequences, other control characters, overrides of the writing direction, halves of surrogate pairs."""

SHOWN_PROBLEMS = 20


def printable(text: str) -> str:
    """The text with U+FFFD for what does not print; line ends become newlines."""
    return UNPRINTABLE.sub("\ufffd", text.replace("\r\n", "\n").replace("\r", "\n"))


def say(text: object, file: TextIO | None = None) -> None:
    """Prints to stdout, or to `file`; nothing in the text acts on the terminal."""
    print(printable(str(text)), file=file)


def complain(error: object) -> None:
    """One error on stderr; the `problems` of one that has several are counted and the first of them listed."""
    problems = getattr(error, "problems", [str(error)])
    listed = [f"- {line}" for line in problems[:SHOWN_PROBLEMS]] + [f"and {len(problems) - SHOWN_PROBLEMS} more"] * (len(problems) > SHOWN_PROBLEMS)
    say(f"error: {error}" if len(problems) == 1 else "\n".join([f"error: {len(problems)} problems", *listed]), sys.stderr)
