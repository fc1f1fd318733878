"""The conversation in a terminal, or with lines from a file: one message, answered by each state in turn."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from steer_heal.chat.talk import Question, Talk
from steer_heal.errors import UserError, nearest, print_error, print_safe, printable

COMMANDS = {
    "/system": "TEXT: a system prompt for all states, behind the one that makes a state what it is; none: as it was",
    "/dose": "X: the dose of the steered state; none: the round's own",
    "/states": "NAME ...: who answers, of base, prompted, steered and healed; each has its own conversation",
    "/reset": "begin new conversations",
    "/seed": "N: of the random stream that all states draw from",
    "/help": "these lines",
    "/quit": "leave; so does the end of the input",
}
HINT = "Ctrl-C stops an answer; /help lists the commands, /quit leaves"


class Halted(Exception):
    """The user stopped an answer."""


class Terminal:
    """Conversations with several states; `question` holds the settings that the next message is asked with."""

    def __init__(self, talk: Talk, states: Sequence[str], question: Question) -> None:
        self.talk, self.question = talk, question
        self.states = [talk.known(name) for name in dict.fromkeys(states)]
        self.turns: dict[str, list[str]] = {name: [] for name in talk.states}

    def run(self, lines: Iterator[str]) -> None:
        """Answers each line until /quit or the end."""
        for line in lines:
            line = printable(line).strip()
            try:
                if line == "/quit":
                    return
                if line.startswith("/"):
                    self.obey(*line.split(maxsplit=1))
                elif line:
                    self.ask(line)
            except UserError as error:
                sys.stdout.flush()
                print_error(error)

    def obey(self, name: str, given: str = "") -> None:
        """One command. UserError where there is none of that name, or its value is wrong."""
        if name == "/system":
            self.question = replace(self.question, system=given)
        elif name == "/dose":
            self.question = replace(self.question, dose=_number(float, name, given) if given else None)
        elif name == "/seed":
            self.question = replace(self.question, seed=_number(int, name, given))
        elif name == "/states":
            names = dict.fromkeys(given.replace(",", " ").split())
            self.states = [self.talk.known(each) for each in names] or self.states
        elif name == "/reset":
            self.turns = {each: [] for each in self.turns}
        elif name == "/help":
            print_safe("\n".join(f"{each:8} {told}" for each, told in COMMANDS.items()))
            return
        else:
            raise UserError(f"there is no command {name!r}: {nearest(name, COMMANDS)}")
        print_safe(self.told())

    def told(self) -> str:
        """The settings in force, and how long the conversations are."""
        state, q = self.talk.states["steered"], self.question
        dose = state.dose if q.dose is None else q.dose
        n = max(len(self.turns[name]) for name in self.states) // 2
        system = f", system prompt {q.system!r}" if q.system else ""
        return f"{', '.join(self.states)}; dose {dose:.3g}, seed {q.seed}{system}; {n} messages so far"

    def ask(self, message: str) -> None:
        """The message, answered by each state. An answer that was stopped stays as far as it came."""
        for name in self.states:
            turns, pieces = [*self.turns[name], message], []
            print_safe(f"\n--- {name}: {self.talk.states[name].about} ---")
            with _interrupts() as stopped:

                def show(piece: str, pieces: list[str] = pieces, stopped: list[int] = stopped) -> None:
                    print_safe(piece, end="")
                    pieces.append(piece)
                    if stopped:
                        raise Halted

                note = ""
                try:
                    answer = self.talk.answer(replace(self.question, state=name, turns=tuple(turns)), show)
                    note = f" [cut at {answer.n_tokens} tokens]" if answer.cut else ""
                except Halted:
                    note = " [stopped]"
            print_safe(note)
            self.turns[name] = [*turns, "".join(pieces)]
        print_safe("")


def _number(kind: type, name: str, given: str) -> Any:
    try:
        value = kind(given)
        if abs(value) < 2**63:  # so neither infinite nor NaN
            return value
    except ValueError:
        pass
    whole = "a whole number" if kind is int else "a number"
    raise UserError(f"{name} is {given!r}: it must be {whole}, nearer to 0 than 2^63")


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """While inside, Ctrl-C adds to the list and does nothing else: the model is never left half changed."""
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda signum, frame: seen.append(signum))
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


def lines() -> Iterator[str]:
    """What is typed, with a prompt; where stdin is no terminal its lines, repeated on stdout."""
    if not sys.stdin.isatty():
        reconfigure = getattr(sys.stdin, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")
        for line in sys.stdin:
            print_safe(f"> {line.strip()}")
            yield line
        return
    with suppress(ImportError):
        import readline  # noqa: F401  arrow keys and a history for input()
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            print_safe(f"\n{HINT}")
        except EOFError:
            print_safe("")
            return


def chat(talk: Talk, states: Sequence[str], question: Question) -> None:
    """A conversation from stdin to stdout, up to its end."""
    terminal = Terminal(talk, states, question)
    print_safe(f"{terminal.told()}\n{HINT}\n")
    terminal.run(lines())
