"""Talk to a run: steer-heal chat out/<run> [--round K] [--web]."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from loguru import logger
from pydantic import Field

from steer_heal.errors import UserError, print_error
from steer_heal.settings import BatchSize, Count, Finite, Positive, Share, settings


@settings("")
class Chat:
    """Talk to a round of a run: the same message is answered by the base, the steered student and the healed one."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    round: int | None = None
    """None: the last healed round that was kept."""
    web: bool = False
    """A page in the browser in place of the terminal. Its address works on this machine alone, and holds a secret."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8765
    """Of the page; 0: any free one."""
    states: Annotated[tuple[str, ...], Field(min_length=1)] = ("base", "steered", "healed")
    """Who answers; another is prompted, the base with the persona as system prompt."""
    system: str = ""
    """System prompt of all states, behind the one that makes a state what it is."""
    dose: Finite | None = None
    """Of the steered state; None: the round's own."""
    seed: int = 0
    """Of the random stream that all states draw from."""
    max_new_tokens: Count = 256
    """Length of an answer."""
    temperature: Positive | None = None
    """None: the run's."""
    top_p: Share | None = None
    """None: the run's."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    n_threads: BatchSize = 0
    """CPU threads; 0 leaves torch's choice."""
    quiet: bool = False
    """Only warnings and errors beside the conversation."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 at the end of the conversation, 2 where it cannot begin, 130 by Ctrl-C before it does."""
    given, began = tyro.cli(Chat, args=argv, prog="steer-heal chat"), time.monotonic()
    try:
        from steer_heal.runs.resume import recorded

        recorded(given.run)  # where there is no run, it is said before the imports below, which take seconds
        from steer_heal.chat import terminal, web
        from steer_heal.chat.talk import Question, Talk
        from steer_heal.report import console
        from steer_heal.runs.opened import open_run

        console.start(given.quiet)
        sampling = {name: value for name in ("temperature", "top_p") if (value := getattr(given, name)) is not None}
        run = open_run(given.run, device=given.device, n_threads=given.n_threads, **sampling)
        r = run.healed(given.round)
        logger.info(f"{run.folder}: trait {run.inputs.trait.name}, round {r} of {', '.join(map(str, run.rounds))}")
        talk = Talk(run, r, given.max_new_tokens)
        question = Question(state="base", turns=("",), system=given.system, dose=given.dose, seed=given.seed)
        logger.info(f"ready after {time.monotonic() - began:.1f} s")
        if given.web:
            web.serve(talk, given.states, question, given.port)
        else:
            terminal.chat(talk, given.states, question)
    except (UserError, OSError, ValueError) as error:
        print_error(error)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
