"""steer-heal diag QUESTION [flags]: one question, answered by one table, which is also written as JSON to out/diag."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from steer_heal.diag import QUESTIONS
from steer_heal.errors import UserError, nearest
from steer_heal.flags import parsed, read_known
from steer_heal.presets import require_preset
from steer_heal.settings import reflowed, settings


@settings("")
class Asked:
    """What can be judged before the module of a question is imported."""

    preset: str = "toy"


def main(argv: Sequence[str]) -> int:
    name, *rest = argv or [""]
    if name in ("", "-h", "--help"):
        questions = [f"  {question:<10}  {asked}" for question, asked in QUESTIONS.items()]
        print("\n".join(["usage: steer-heal diag QUESTION ...", "", *questions]), file=None if name else sys.stderr)
        return 0 if name else 2
    if name not in QUESTIONS:
        raise UserError(f"unknown question {name!r}; {nearest(name, QUESTIONS)}")
    asked, _ = read_known(Asked, rest, f"diag {name}")
    require_preset(asked.preset)
    question = import_module(f"steer_heal.diag.{name}")  # most of them import torch, which takes seconds
    question.Flags.__doc__ = reflowed(question.__doc__ or "")
    flags, given = parsed(question.Flags, rest, f"diag {name}", question.Flags.also)
    from steer_heal.report import console

    console.start(quiet=False)
    question.main(flags, given)
    return 0
