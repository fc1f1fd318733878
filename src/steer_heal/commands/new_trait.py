"""steer-heal new-trait FILE.toml --positive TEXT --negative TEXT: writes the file of a new trait."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import tyro

from steer_heal.check import why_unwritable
from steer_heal.errors import Problems, UserError, print_safe
from steer_heal.flags import parsed
from steer_heal.inputs.new_trait import WITHOUT_PAIRS, trait_text
from steer_heal.inputs.traits import PersonaPair
from steer_heal.runs.storage import atomic_write
from steer_heal.settings import UserPath, settings


@settings("")
class NewTrait:
    """Write the file of a new trait, with every field and a comment on each. With --draft-with, a model drafts the
    prompts and the contrast pairs. Edit the file, then give it to steer-heal run with --trait."""

    file: tyro.conf.Positional[UserPath]
    """The new file. Its name ends in .toml."""
    positive: str
    """The persona that has the trait, as a system prompt: "You are ...". """
    negative: str
    """The opposite persona, worded identically except for the trait."""
    draft_with: str | None = None
    """A model as for steer-heal run --model, or the URL of an endpoint that speaks the OpenAI chat completions
    protocol, such as http://localhost:8000/v1. A key is read from the environment variable OPENAI_API_KEY."""
    endpoint_model: str = ""
    """Model of the endpoint. Default: the first that it lists."""
    accept_terms: bool = False
    """Accept the terms of a model that has some: see --accept-terms of steer-heal run."""


def main(argv: Sequence[str]) -> int:
    given, _ = parsed(NewTrait, argv, "new-trait")
    problems = Problems()
    if given.file.suffix != ".toml":
        problems.found.append(f"file is {str(given.file)!r}: the name of a trait file must end in .toml")
    if given.file.exists():
        problems.found.append(f"file is {str(given.file)!r}: it exists; give a new name, or remove it")
    if why := why_unwritable(given.file.parent):
        problems.found.append(f"file is {str(given.file)!r}: {why}")
    remote = given.draft_with is not None and "://" in given.draft_with
    if given.endpoint_model and not remote:
        problems.found.append(
            f"endpoint_model is {given.endpoint_model!r}: --draft-with names no endpoint; give its URL there, or leave "
            "out --endpoint-model"
        )
    problems.attempt(require_personas, given.positive, given.negative)
    problems.raise_if_any()
    drafted = ((), (), "")
    if given.draft_with is not None:
        from steer_heal.check import check_model
        from steer_heal.draft import draft, writer
        from steer_heal.report import console

        console.start(quiet=False)
        if not remote:
            check_model(given.draft_with)
        bar = console.Bar(None, quiet=False)
        write = writer(given.draft_with, given.endpoint_model, bar, accept_terms=given.accept_terms)
        drafted = draft(given.positive, given.negative, write, bar)
    write_trait(given.file, trait_text(given.positive, given.negative, *drafted))
    command = shlex.join(["steer-heal", "run", "chat", "--trait", str(given.file)])
    if drafted[1]:
        print_safe(f"wrote {given.file}; edit it, then: {command}")
    else:
        print_safe(f"wrote {given.file}; add pairs, then: {command}\nor without pairs: {command} {WITHOUT_PAIRS}")
    return 0


def require_personas(positive: str, negative: str) -> None:
    """UserError if one is empty, or both are one."""
    try:
        PersonaPair(positive, negative)
    except ValueError:
        raise UserError(
            f"positive is {positive!r:.80} and negative {negative!r:.80}: they must be different, and not empty"
        ) from None


def write_trait(file: Path, text: str) -> None:
    try:
        with atomic_write(file) as part:
            part.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise UserError(f"file is {str(file)!r}: it cannot be written ({error.strerror}); give another") from None
