"""The conversation in a terminal, or with the lines of a file. Each state in turn answers a message."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from steer_heal.chat import known_state
from steer_heal.chat.talk import Question, Talk
from steer_heal.errors import UserError, nearest, plural, print_error, print_safe, printable

COMMANDS = {
    "/system": "[TEXT]: a system prompt for all states, which follows the state's own; without TEXT: none",
    "/dose": "[X]: the dose of the steered state's vector; without X: the dose of the round",
    "/states": "NAME ...: the states that answer (base, prompted, steered, healed); each has its own conversation",
    "/reset": "start new conversations",
    "/seed": "N: the seed of the random stream, which is the same for all states",
    "/help": "show these lines",
    "/quit": "leave, as at the end of the input",
}
HINT = "Ctrl-C stops an answer; /help lists the commands, /quit leaves"


class Halted(Exception):
    """The user stopped an answer."""


class Terminal:
    """Conversations with several states. `question` holds the settings of the next message."""

    def __init__(self, talk: Talk, states: Sequence[str], question: Question) -> None:
        self.talk = talk
        self.question = question
        self.states = [*dict.fromkeys(states)]
        self.turns: dict[str, list[str]] = {name: [] for name in talk.states}

    def run(self, lines: Iterator[str]) -> None:
        """Answers each line until /quit or the end of the input."""
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
        """Carries out a command. UserError if the command is unknown or its value is invalid."""
        if name == "/system":
            self.question = replace(self.question, system=given)
        elif name == "/dose":
            self.talk.recipe.require_vector("/dose")
            self.question = replace(self.question, dose=_number(float, name, given) if given else None)
        elif name == "/seed":
            self.question = replace(self.question, seed=_number(int, name, given))
        elif name == "/states":
            names = dict.fromkeys(given.replace(",", " ").split())
            self.states = [known_state(each) for each in names] or self.states
        elif name == "/reset":
            self.turns = {each: [] for each in self.turns}
        elif name == "/help":
            print_safe("\n".join(f"{each:8} {text}" for each, text in COMMANDS.items()))
            return
        else:
            raise UserError(f"unknown command {name!r}; {nearest(name, COMMANDS)}")
        print_safe(self.summary())

    def summary(self) -> str:
        """The current settings and the length of the conversations."""
        steered = self.talk.dose(replace(self.question, state="steered"))
        dose = f"dose {steered:.3g}, " if self.talk.recipe.uses_vector else ""
        n = max(len(self.turns[name]) for name in self.states) // 2
        system = f", system prompt {self.question.system!r}" if self.question.system else ""
        so_far = f"{plural(n, 'message')} so far"
        return f"{', '.join(self.states)}; {dose}seed {self.question.seed}{system}; {so_far}"

    def ask(self, message: str) -> None:
        """Prints the answer of each state to a message. Of a stopped answer, what was written is kept."""
        for name in self.states:
            turns = [*self.turns[name], message]
            print_safe(f"\n--- {name}: {self.talk.about(name)} ---")
            self.turns[name] = [*turns, self._answer(replace(self.question, state=name, turns=tuple(turns)))]
        print_safe("")

    def _answer(self, question: Question) -> str:
        """Prints the answer while it is written; returns it. Ctrl-C stops it."""
        pieces: list[str] = []
        with _interrupts() as received:

            def show(piece: str) -> None:
                print_safe(piece, end="")
                pieces.append(piece)
                if received:
                    raise Halted

            note = ""
            try:
                answer = self.talk.answer(question, show)
                note = f" [cut at {answer.n_tokens} tokens]" if answer.cut else ""
            except Halted:
                note = " [stopped]"
        print_safe(note)
        return "".join(pieces)


def _number(kind: type, name: str, given: str) -> Any:
    try:
        value = kind(given)
        if abs(value) < 2**63:  # excludes infinity and NaN
            return value
    except ValueError:
        pass
    wanted = "a whole number" if kind is int else "a number"
    raise UserError(f"{name} is {given!r}: it must be {wanted} whose size is below 2^63")


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """While inside, Ctrl-C only adds to the list. It cannot leave the model half changed."""
    received: list[int] = []
    before = signal.signal(signal.SIGINT, lambda signum, frame: received.append(signum))
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, before)


def lines() -> Iterator[str]:
    """The lines that the user types after a prompt. If stdin is not a terminal, its lines, which are echoed."""
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
    """Talks from stdin to stdout until the user leaves."""
    terminal = Terminal(talk, states, question)
    print_safe(f"{terminal.summary()}\n{HINT}\n")
    terminal.run(lines())
