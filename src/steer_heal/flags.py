"""The flags of a command: those of its own dataclass, and settings that it takes too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, make_dataclass, replace
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from steer_heal.errors import UserError, print_safe, wrapped
from steer_heal.settings import RunConfig, read_word

Given = TypeVar("Given")
REGISTRY = ConstructorRegistry()
EXAMPLES = {
    "run": ("run fast-dev", "run chat --model path/to/model --trait care --seed 43", "run toy --n-rounds 2 --plan"),
    "new-trait": ("new-trait mine.toml --positive 'Be blunt.' --negative 'Be mild.'",),
    "resume": ("resume out/RUN", "resume out/RUN --n-rounds 4"),
    "sweep": ("sweep studies/toy_arms.toml --jobs 2", "sweep studies/toy_arms.toml --results"),
    "verify": ("verify out/RUN",),
    "eval": ("eval --run out/RUN", "eval --model path/to/model --adapter out/RUN/ckpt/r0 --json"),
    "chat": ("chat out/RUN", "chat out/RUN --web --round 1"),
    "report": ("report out/RUN", "report out/A out/B --compare compare.html"),
    "tasks": ("tasks out/RUN --tasks arc_easy --limit 100",),
    "inspect": ("inspect out/RUN",),
    "export": ("export out/RUN merged", "export out/RUN model --format gguf --quantization q8_0"),
    "push": ("push out/RUN OWNER/NAME", "push out/RUN OWNER/NAME --yes"),
}
"""What `--help` of a command ends with."""


@REGISTRY.primitive_rule
def number(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Numbers, with an error in words."""
    if info.type not in (int, float):
        return None
    kind: Any = info.type
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=kind.__name__.upper(),
        instance_from_str=lambda words: read_word(kind, words[0]),
        is_instance=lambda value: isinstance(value, (int, kind)),
        str_from_instance=lambda value: [str(value)],
    )


@REGISTRY.primitive_rule
def optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """`X | None` is read and shown as X. The word None stands for None."""
    kinds = get_args(info.type)
    if get_origin(info.type) not in (Union, UnionType) or NoneType not in kinds:
        return None
    inner: Any = Union[tuple(kind for kind in kinds if kind is not NoneType)]  # noqa: UP007
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(inner, info.markers))
    if not isinstance(spec, PrimitiveConstructorSpec):
        return None
    return replace(
        spec,
        instance_from_str=lambda words: None if words == ["None"] else spec.instance_from_str(words),
        is_instance=lambda value: value is None or spec.is_instance(value),
        str_from_instance=lambda value: ["None"] if value is None else spec.str_from_instance(value),
    )


def read_flags(
    kind: type[Given],
    argv: Sequence[str],
    command: str,
    *,
    default: Given | None = None,
    description: str | None = None,
) -> Given:
    """The flags of a command as a dataclass. UserError with a line for each one that it does not have."""
    name = f"steer-heal {command}"
    text = kind.__doc__ or "" if description is None else description
    described = wrapped(
        "  " + text.replace("\n", "\n  "), indent=4, fallback=80
    )  # tyro would join lines without indent
    given: Any
    try:
        given, unknown = tyro.cli(
            kind,
            args=argv,
            prog=name,
            default=default,
            description=described,
            return_unknown_args=True,
            registry=REGISTRY,
            config=(tyro.conf.AvoidSubcommands,),
        )
    except SystemExit as stopped:
        if not stopped.code:
            print_examples(command)
        raise
    if unknown:
        raise UserError(*_not_known([word.partition("=")[0] for word in unknown], list(_names(kind)), name))
    return given


def print_examples(command: str) -> None:
    lines = [f"  steer-heal {line}" for line in EXAMPLES.get(command.split()[0], ())]
    if lines:
        print_safe("\n".join(["examples:", *lines]))


def _not_known(words: Sequence[str], known: Sequence[str], name: str) -> Iterator[str]:
    """A line for each flag that is not known or, if there is none, for each argument too many."""
    flags = [word for word in words if word.startswith("-")]
    for word in flags or words:
        close = get_close_matches(word.replace("_", "-"), known, n=1)
        meant = f"did you mean {close[0]}? " if close else ""
        yield f"unknown {'flag' if flags else 'argument'} {word}; {meant}{name} --help lists what it takes"


def _names(kind: Any, section: str = "") -> Iterator[str]:
    """The flags of a dataclass: --seed, --heal.epochs."""
    hints = get_type_hints(kind)
    for each in fields(kind):
        if is_dataclass(hints[each.name]):
            yield from _names(hints[each.name], f"{section}{each.name}.")
        else:
            yield f"--{section}{each.name}".replace("__", ".").replace("_", "-")


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
    given = read_flags(both, argv, command)
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
