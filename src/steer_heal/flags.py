"""The flags of a command: those of its own dataclass, and settings that it takes too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, make_dataclass
from typing import Annotated, Any, TypeVar, get_type_hints

import tyro

from steer_heal.errors import UserError
from steer_heal.settings import RunConfig

Given = TypeVar("Given")


def parsed(
    kind: type[Given], argv: Sequence[str], command: str, also: Sequence[str] = ()
) -> tuple[Given, dict[str, Any]]:
    """(the flags of a command, by its dataclass; the settings that were given beside them, by dotted name).

    UserError with a line for each flag that is outside the limits of its annotation. Settings are not checked here.

    Args:
        kind: A dataclass made by `settings`.
        also: Dotted names of settings that the command takes too, such as `eval.batch_size`. None has a default here; a
            switch can only be turned on.
    """
    made = []
    for name in also:
        section, _, key = name.rpartition(".")
        home = get_type_hints(RunConfig)[section] if section else RunConfig
        text = home.__dataclass_fields__[key].metadata["help"]
        flag = tyro.conf.arg(name=name.replace("_", "-"), help=text, help_behavior_hint="(optional)")
        hint = get_type_hints(home, include_extras=True)[key]
        switch = hint is bool  # given without a value
        made.append((_joined(name), Annotated[hint if switch else hint | None, flag], False if switch else None))
    both = make_dataclass(kind.__name__, made, bases=(kind,), frozen=True, kw_only=True)
    both.__doc__ = kind.__doc__
    given = tyro.cli(both, args=argv, prog=f"steer-heal {command}")
    try:
        own = kind(**{each.name: getattr(given, each.name) for each in fields(kind)})  # pyright: ignore[reportArgumentType]
    except ValueError as error:
        raise UserError(*str(error).split("\n")) from None
    values = {name: getattr(given, _joined(name)) for name in also}
    return own, {name: value for name, value in values.items() if value is not None and value is not False}


REPEATED = ("--plugin", "--plugin-set")


def merged(argv: Sequence[str]) -> list[str]:
    """The arguments with the values of each flag of REPEATED in one place, since of a flag that is given twice only the
    last is read."""
    values: dict[str, list[str]] = {name: [] for name in REPEATED}
    out: list[str] = []
    to = out
    for word in argv:
        flag, equals, value = word.partition("=")
        if flag in values:
            to = values[flag]
            to += [value] if equals else []
        else:
            to = out if word.startswith("-") else to
            to.append(word)
    return out + [word for name, given in values.items() if given for word in (name, *given)]


def _joined(name: str) -> str:
    return name.replace(".", "__")
