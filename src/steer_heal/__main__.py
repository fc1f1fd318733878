"""The command `steer-heal`, also `python -m steer_heal`: one word, then the flags of that command."""

from __future__ import annotations

import sys
from importlib import import_module

from steer_heal.errors import UserError, nearest, print_error

COMMANDS = {
    "run": ("steer_heal.run:main", "PRESET, or --config FILE: the whole loop, into a new folder in ./out"),
    "resume": ("steer_heal.run:resume", "RUN: continue a run that was stopped"),
    "sweep": ("steer_heal.sweep.command:main", "FILE: many runs, over settings and seeds"),
    "verify": ("steer_heal.runs.verify:main", "RUN: check that a run's files are the ones that it recorded"),
    "eval": ("steer_heal.eval:main", "measure a model, an adapter, or a state of a run again"),
    "chat": ("steer_heal.chat.__main__:main", "RUN: talk to the base, the steered student and the healed one"),
    "report": ("steer_heal.report.__main__:main", "RUN ...: draw pictures and page again, or compare runs"),
    "tasks": ("steer_heal.share.tasks:main", "RUN --tasks NAME ...: what a trait cost on standard tasks"),
    "inspect": ("steer_heal.share.inspect:main", "RUN: the answers as a log of inspect_ai"),
    "push": ("steer_heal.share.push:main", "RUN OWNER/NAME: upload a checkpoint with its model card"),
    "diag": ("steer_heal.diag.__main__:main", "QUESTION: answer one question with one table"),
}
"""By name: where the function is that takes the arguments, and what it does."""


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {told}" for name, (_, told) in COMMANDS.items()]
    return "\n".join(["usage: steer-heal COMMAND ...", "", *lines, "", "steer-heal COMMAND --help lists its flags."])


def main(argv: list[str] | None = None) -> int:
    """Exit status of the command; 2 for one that there is not."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if argv is None:
        sys.argv = [f"steer-heal {name}", *rest]  # what a run records as its command
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name not in COMMANDS:
        print_error(UserError(f"there is no command {name!r}: {nearest(name, COMMANDS)}"))
        return 2
    module, _, function = COMMANDS[name][0].partition(":")
    return getattr(import_module(module), function)(rest)


if __name__ == "__main__":
    sys.exit(main())
