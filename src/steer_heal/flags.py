"""The flags of a command: those of its own dataclass, and settings that it takes too."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import MISSING, field, fields, is_dataclass, make_dataclass, replace
from difflib import get_close_matches
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro
from pydantic import TypeAdapter, ValidationError
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from steer_heal.errors import Problems, UserError, nearest, print_safe, problem_lines, wrapped
from steer_heal.settings import RunConfig, Unread, leaves, read_word

Given = TypeVar("Given")
REGISTRY = ConstructorRegistry()
POSITIONAL = get_args(tyro.conf.Positional[int])[1]
"""What marks the type of an argument without a flag."""
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
    """Numbers. A word that is none is told about with the flags that are outside their limits."""
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
def choice(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """One of several words, with the nearest of them for a word that is none."""
    choices = get_args(info.type)
    if get_origin(info.type) is not Literal or not all(isinstance(each, str) for each in choices):
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{{{','.join(choices)}}}",
        instance_from_str=lambda words: (
            words[0] if words[0] in choices else Unread(words[0], nearest(words[0], choices))
        ),
        is_instance=lambda value: value in choices,
        str_from_instance=lambda value: [value],
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
    beside: type | None = None,
) -> Given:
    """The flags of a command as a dataclass. UserError with a line for each one that it does not have, or whose value
    it does not take.

    Args:
        beside: A dataclass whose flags `--help` shows too. They were read before.
    """
    more = [] if beside is None else _unchecked_fields(beside)
    return _checked(kind, _read_all(_unchecked(kind, more), argv, command, default, description or kind.__doc__ or ""))


def _read_all(kind: Any, argv: Sequence[str], command: str, default: Any, description: str) -> Any:
    """As `_read`. UserError if an argument is not known."""
    given, unknown = _read(kind, argv, command, default, description)
    if unknown:
        known = [flag for _, flag, _ in _flags(kind) if flag.startswith("--")]
        raise UserError(*_not_known([word.partition("=")[0] for word in unknown], known, f"steer-heal {command}"))
    return given


def read_known(kind: type[Given], argv: Sequence[str], command: str) -> tuple[Given, list[str]]:
    """(the flags of a dataclass, the other arguments). `--help` is one of the others."""
    given, rest = _read(_unchecked(kind), argv, command, None, "", add_help=False)
    return _checked(kind, given), rest


def _read(
    kind: Any, argv: Sequence[str], command: str, default: Any, description: str, *, add_help: bool = True
) -> tuple[Any, list[str]]:
    """(the flags as an instance of what `_unchecked` makes, the arguments that are not known)."""
    text = "  " + description.replace("\n", "\n  ")
    try:
        with redirect_stderr(io.StringIO()):  # `_lacking` tells the same in one line
            given, unknown = tyro.cli(
                kind,
                args=argv,
                prog=f"steer-heal {command}",
                default=None if default is None else _filled(kind, default),
                description=wrapped(text, indent=4, fallback=80),  # tyro would join lines without indent
                return_unknown_args=True,
                registry=REGISTRY,
                config=(tyro.conf.AvoidSubcommands, tyro.conf.PositionalMetavarFromFieldName),
                add_help=add_help,
            )
    except SystemExit as stopped:
        if stopped.code:
            raise UserError(f"{_lacking(kind, argv)}; steer-heal {command} --help lists what it takes") from None
        print_examples(command)
        raise
    _require_read(given)
    return given, unknown


def _unchecked(kind: Any, more: Sequence[tuple[str, Any, Any]] = ()) -> Any:
    """A dataclass with the flags of another one and `more`, which takes any value: what is wrong with several flags is
    told at once, by `_checked`."""
    return _any_values(kind) if not more else _made(kind, [*_unchecked_fields(kind), *more])


@cache
def _any_values(kind: Any) -> Any:
    return _made(kind, _unchecked_fields(kind))


def _made(kind: Any, its: Sequence[tuple[str, Any, Any]]) -> Any:
    made: Any = make_dataclass(kind.__name__, its, frozen=True, kw_only=True)
    made.__doc__ = kind.__doc__
    return made


def _unchecked_fields(kind: Any) -> list[tuple[str, Any, Any]]:
    """(name, type, field) of each flag of a dataclass."""
    out = []
    hints = get_type_hints(kind, include_extras=True)
    for each in fields(kind):
        hint: Any = hints[each.name]
        kept: dict[str, Any] = {"metadata": each.metadata}
        if is_dataclass(hint):
            hint = _unchecked(hint)
            kept = {"metadata": {"help": hint.__doc__}, "default_factory": hint}  # tyro would parse the source for it
        elif each.default_factory is not MISSING:
            kept["default_factory"] = each.default_factory
        elif each.default is not MISSING:
            kept["default"] = each.default
        if len(kept) == 2 and not is_dataclass(hint):
            hint = Annotated[hint, tyro.conf.arg(help_behavior_hint=_default_words)]
        out.append((each.name, hint, field(**kept)))
    return out


def _default_words(default: str) -> str:
    return "" if default in ("", "''") else f"(default: {default})"


def _filled(kind: Any, cfg: Any) -> Any:
    """The values of a dataclass as what `_unchecked` makes of it."""
    values = {each.name: getattr(cfg, each.name) for each in fields(cfg)}
    sections = {each.name: each.default_factory for each in fields(kind)}
    return kind(
        **{name: _filled(sections[name], each) if is_dataclass(each) else each for name, each in values.items()}
    )


def _checked(kind: type[Given], given: Any) -> Given:
    """An instance of a dataclass with what was given. UserError with a line for each flag whose value it does not
    take."""
    values = {each.name: _as_dict(getattr(given, each.name)) for each in fields(kind)}  # pyright: ignore[reportArgumentType]
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        lines = problem_lines(error, kind, lambda at: at)
    raise UserError(*_typed(lines, given))


def _require_read(given: Any) -> None:
    """UserError with a line for each flag whose words are no value of its type."""
    bad = {name.replace("__", "."): _unread(value) for name, value in leaves(given).items()}
    lines = [f"{name} is {each.words!r:.80}: {each.limit}" for name, each in bad.items() if each]
    if lines:
        raise UserError(*_typed(lines, given))


def _typed(lines: Sequence[str], given: Any) -> list[str]:
    flags = {name: flag for name, flag, _ in _flags(type(given))}
    return [typed(line, flags) for line in lines]


def _as_dict(value: Any) -> Any:
    return {each.name: getattr(value, each.name) for each in fields(value)} if is_dataclass(value) else value


def _unread(value: Any) -> Unread | None:
    """What could not be read of the value of a flag."""
    parts = value if isinstance(value, tuple) else value.values() if isinstance(value, Mapping) else (value,)
    return next((each for each in parts if isinstance(each, Unread)), None)


def typed(line: str, flags: Mapping[str, str]) -> str:
    """A line about a setting, with the flag in place of the name that it begins with."""
    name = re.match(r"[\w.]*(?= is | are | contains |: )", line)
    found = name.group() if name else ""
    while found and found not in flags:
        found = found.rpartition(".")[0]
    return flags[found] + line[len(found) :] if found else line


SHORTER = {"--prompts": "gen.prompts"}
"""Flags that stand for a setting of another name."""


def flags_in(argv: Sequence[str]) -> dict[str, str]:
    """The flags among the arguments, by the settings that they stand for."""
    given = [word.partition("=")[0] for word in argv if word.startswith("--")]
    return {name: flag for flag in given for name in (flag[2:].replace("-", "_"), SHORTER.get(flag)) if name}


def _lacking(kind: Any, argv: Sequence[str]) -> str:
    """Which flag has no value, or else which arguments a command needs."""
    one = [flag for _, flag, hint in _flags(kind) if get_args(hint)[:1] != (bool,)]
    for word, following in zip(argv, [*argv, "--"][1:], strict=True):
        if word.replace("_", "-") in one and following.startswith("--"):
            return f"{word} needs a value"
    return f"give {' '.join(flag for _, flag, _ in _flags(kind) if not flag.startswith('--'))}"


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


def _flags(kind: Any, section: str = "") -> Iterator[tuple[str, str, Any]]:
    """(dotted name, how it is given, type) of each flag: (heal.tau, --heal.tau, float), (run, RUN, Path)."""
    hints = get_type_hints(kind, include_extras=True)
    for each in fields(kind):
        hint = hints[each.name]
        name = f"{section}{each.name}".replace("__", ".")
        if is_dataclass(hint):
            yield from _flags(hint, f"{name}.")
        else:
            notes = getattr(hint, "__metadata__", ())
            metavar = next((note.metavar for note in notes if getattr(note, "metavar", None)), each.name.upper())
            yield name, metavar if POSITIONAL in notes else f"--{name}".replace("_", "-"), hint


def parsed(
    kind: type[Given], argv: Sequence[str], command: str, also: Sequence[str] = ()
) -> tuple[Given, dict[str, Any]]:
    """(the flags of a command, by its dataclass; the settings that were given beside them, by dotted name).

    UserError with a line for each flag that is outside the limits of its annotation. Limits that depend on other
    settings are not checked here.

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
    given = _read_all(_unchecked(kind, made), argv, command, None, kind.__doc__ or "")
    problems = Problems()
    own = problems.attempt(_checked, kind, given)
    values = {name: getattr(given, _joined(name)) for name in also}
    values = {name: value for name, value in values.items() if value is not None and value is not False}
    hints = get_type_hints(type(given), include_extras=True)
    for name, value in values.items():
        try:
            values[name] = TypeAdapter(hints[_joined(name)]).validate_python(value)
        except ValidationError as error:
            lines = problem_lines(error, hints[_joined(name)], lambda at, name=name: f"{name}.{at}".removesuffix("."))
            problems.found += _typed(lines, given)
    problems.raise_if_any()
    assert own is not None
    return own, values


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
