"""steer-heal chat RUN [--round K] [--web]: talk to the states of a round."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated

from loguru import logger
from pydantic import Field

from steer_heal.chat import known_state
from steer_heal.errors import Problems
from steer_heal.flags import parsed
from steer_heal.report import console
from steer_heal.runs.chosen import run_and_round
from steer_heal.runs.resume import require_plugins
from steer_heal.runs.signals import stoppable
from steer_heal.settings import AdapterScale, AllowBroken, Count, Finite, Names, RoundName, RunFolder, settings
from steer_heal.verdict import round_words

PORT = 8765
"""Port of the page if none is given."""


@settings("")
class Chat:
    """Talk to the states of one round. The base, the steered student and the healed student answer the same message. A
    setting that you leave out keeps the run's value."""

    run: RunFolder
    """Folder of the run."""
    round: RoundName = "best"
    allow_broken: AllowBroken = False
    web: bool = False
    """Talk on a page in the browser instead of in the terminal. Its URL works only on this machine and contains a
    secret."""
    port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """With --web: port of the page. 0: any free port. Default: 8765."""
    states: Annotated[Names, Field(min_length=1)] = ("base", "steered", "healed")
    """The states that answer. One more is available: prompted, the base with the persona as system prompt."""
    system: str = ""
    """System prompt for all states. It is appended to the state's own system prompt, if there is one."""
    adapter_scale: AdapterScale = 1.0
    """Multiply the effect of the adapter by this factor, from -4 to 4. 0: no effect; -1: the reverse. It also scales
    the earlier rounds that the steered model contains."""
    dose: Finite | None = None
    """Dose of the steered state, if the run's teacher uses a vector. Default: the dose of the round."""
    seed: int = 0
    """Seed of the sampling. All states use the same random numbers."""
    max_new_tokens: Count = 256
    """Maximum length of an answer, in tokens."""
    quiet: bool = False
    """Print only warnings and errors besides the conversation."""


def main(argv: Sequence[str]) -> int:
    began = time.monotonic()
    given, own = parsed(Chat, argv, "chat", ["temperature", "top_p", "device", "n_threads", "plugin"])
    problems = Problems()
    for name in given.states:
        problems.attempt(known_state, name)
    if given.port is not None and not given.web:
        problems.found.append(f"port is {given.port}: only --web has a port; add it, or leave the port out")
    problems.attempt(require_plugins, given.run, own.get("plugin", ()))
    problems.raise_if_any()
    console.lines(given.quiet)
    _, r = run_and_round(given.run, given.round, allow_broken=given.allow_broken)
    with stoppable():
        from steer_heal.chat import terminal, web
        from steer_heal.chat.talk import Question, Talk
        from steer_heal.recipe import Recipe
        from steer_heal.runs.opened import settings_of
        from steer_heal.runs.stored import FolderRun

        console.start(given.quiet)
        run = FolderRun.read(given.run)
        logger.info(f"{run.folder}: trait {run.start.trait.name}, {round_words(run, r)}")
        if given.dose is not None:
            Recipe.of(run.start.config).require_vector("dose")
        cfg = settings_of(run, **{"device": "auto", "n_threads": 0, **own})
        talk = Talk(run, cfg, r, given.max_new_tokens, given.adapter_scale)
    if given.adapter_scale != 1:
        logger.info(f"adapter scale: {given.adapter_scale:g}")
    question = Question(state="base", turns=("",), system=given.system, dose=given.dose, seed=given.seed)
    logger.info(f"ready after {time.monotonic() - began:.1f} s")
    if given.web:
        web.serve(talk, given.states, question, PORT if given.port is None else given.port)
    else:
        terminal.chat(talk, given.states, question)
    return 0
