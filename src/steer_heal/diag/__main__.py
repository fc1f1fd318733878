"""steer-heal diag QUESTION [flags]: one question, one table, also as JSON in out/diag."""

from __future__ import annotations

import sys
from importlib import import_module

from steer_heal.diag import QUESTIONS
from steer_heal.errors import UserError, nearest, print_error


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 answered, 1 stopped by a user error, 2 no such question."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print("usage: steer-heal diag QUESTION ...\n")
        print("\n".join(f"  {question:<10}  {asked}" for question, asked in QUESTIONS.items()))
        return 0
    if name not in QUESTIONS:
        print_error(UserError(f"there is no question {name!r}: {nearest(name, QUESTIONS)}"))
        return 2
    from steer_heal.diag.lab import cli

    return cli(import_module(f"steer_heal.diag.{name}").main, rest, f"steer-heal diag {name}")


if __name__ == "__main__":
    sys.exit(main())
