"""The command `steer-heal`, also `python -m steer_heal`: the name of a command, then its flags."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

from steer_heal.errors import UserError, nearest, print_error
from steer_heal.flags import flags_in, merged, typed

COMMANDS = {
    "run": "PRESET, or --config FILE: make a new run, in a new folder under ./out",
    "new-trait": "FILE: write the file of a new trait from two personas",
    "resume": "RUN: continue a run that was stopped",
    "sweep": "FILE: many runs, over settings and seeds",
    "verify": "RUN: check a run's files against their recorded hashes",
    "eval": "measure a model, an adapter, or a state of a run again",
    "chat": "RUN: talk to the base, the steered student and the healed one",
    "report": "RUN ...: redraw the pictures and the page, or compare runs",
    "tasks": "RUN --tasks NAME ...: measure what a trait costs on standard tasks",
    "inspect": "RUN: write the answers as an inspect_ai log",
    "export": "RUN DIR: write a student for transformers, PEFT, vLLM, llama.cpp or Ollama",
    "push": "RUN OWNER/NAME: upload a checkpoint with its model card",
    "diag": "QUESTION: answer one question with one table",
}
"""What each module of `commands` does."""
WRONG = 2
"""Exit status for a wrong argument or file."""
BROKEN_PIPE = 141
"""Exit status where the reader of the output has gone."""
SLOW = ("run", "resume", "chat", "eval", "tasks", "export")
"""Commands that load a model."""
HELP = ("-h", "--help")
SHORT = (*HELP, "--quiet", "--print-config")
"""With one of these a command does not say that it starts."""


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {does}" for name, does in COMMANDS.items()]
    return "\n".join(
        [
            "usage: steer-heal COMMAND ...",
            "",
            *lines,
            "",
            "steer-heal COMMAND --help lists its flags.",
            "steer-heal --version prints the version.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 stopped or a check failed, 2 a wrong argument or file, 130 by Ctrl-C, 141 by a closed
    pipe, 143 by SIGTERM. `run --exit-status` has more."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if argv is None:
        _as_program(name, rest)
    try:
        with _flushed():
            if name in ("", "help", *HELP):
                print(usage(), file=None if name else sys.stderr)
                return 0 if name else WRONG
            if name == "--version":
                print(import_module("steer_heal").__version__)
                return 0
            if name.startswith("-"):
                raise UserError(f"unknown flag {name}; {nearest(name, ('--help', '--version'))}")
            if name not in COMMANDS:
                raise UserError(f"unknown command {name!r}; {nearest(name, COMMANDS)}")
            return import_module(f"steer_heal.commands.{name.replace('-', '_')}").main(merged(rest))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes it once more
        return BROKEN_PIPE
    except UserError as error:
        print_error(UserError(*(typed(line, flags_in(rest)) for line in error.problems)))
        return WRONG
    except (OSError, ValueError) as error:
        print_error(error)
        return WRONG
    except KeyboardInterrupt as stopped:
        print("interrupted", file=sys.stderr)
        return getattr(stopped, "status", 130)


def _as_program(name: str, rest: Sequence[str]) -> None:
    """What is done once for a process that runs nothing but a command."""
    atexit.register(gc.freeze)  # else the interpreter spends seconds on collecting what torch has loaded
    if name in SLOW and not {*SHORT} & {*rest}:
        print(f"steer-heal {name}: starting", file=sys.stderr, flush=True)


@contextmanager
def _flushed() -> Iterator[None]:
    """A closed pipe is noticed here, not when the interpreter ends."""
    try:
        yield
    finally:
        sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
