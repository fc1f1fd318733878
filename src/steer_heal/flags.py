"""How the dataclass of a command becomes its flags, beside settings that the command takes too."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, make_dataclass
from functools import cache
from types import MappingProxyType
from typing import Annotated, Any, TypeVar, get_type_hints

import tyro
from pydantic import TypeAdapter, ValidationError

from steer_heal.errors import UserError, problem_lines
from steer_heal.settings import RunConfig, reflowed

Kind = TypeVar("Kind", bound=type)
Given = TypeVar("Given")


def described(kind: Kind) -> Kind:
    """Decorates a dataclass whose fields are flags: `--help` shows the docstrings of class and fields, reflowed.

    tyro reads these docstrings itself, but keeps the line breaks of the source.
    """
    kind.__doc__ = reflowed(kind.__doc__ or "")
    texts = _field_docstrings(kind.__module__).get(kind.__name__, {})
    for name, each in kind.__dataclass_fields__.items():  # pyright: ignore[reportAttributeAccessIssue]
        if name in texts:
            each.metadata = MappingProxyType({**each.metadata, "help": reflowed(texts[name])})
    return kind


@cache
def _field_docstrings(module: str) -> Mapping[str, Mapping[str, str]]:
    """The string below each field of each top-level class of a module."""
    source = inspect.getsource(sys.modules[module])
    return {node.name: _strings_below(node) for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}


def _strings_below(node: ast.ClassDef) -> dict[str, str]:
    found = {}
    for field, below in zip(node.body, node.body[1:], strict=False):
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            found[field.target.id] = str(below.value.value)
    return found


def parsed(
    kind: type[Given], argv: Sequence[str], command: str, *, owner: type = RunConfig, also: Sequence[str] = ()
) -> tuple[Given, dict[str, Any]]:
    """(the flags of a command, by its dataclass; the settings that were given beside them, by dotted name).

    UserError with a line for each flag that is outside the limits of its annotation. Settings are not checked here.

    Args:
        owner: The settings dataclass that has the settings `also`.
        also: Dotted names of settings that the command takes too, such as `eval.batch_size`. None has a default here.
    """
    made = []
    for name in also:
        section, _, key = name.rpartition(".")
        home = get_type_hints(owner)[section] if section else owner
        text = home.__dataclass_fields__[key].metadata["help"]
        flag = tyro.conf.arg(name=name.replace("_", "-"), help=text, help_behavior_hint="(optional)")
        made.append((_joined(name), Annotated[get_type_hints(home, include_extras=True)[key] | None, flag], None))
    both = make_dataclass(kind.__name__, made, bases=(kind,), frozen=True, kw_only=True)
    both.__doc__ = kind.__doc__
    given = tyro.cli(both, args=argv, prog=f"steer-heal {command}")
    try:
        TypeAdapter(kind).validate_python({each.name: getattr(given, each.name) for each in fields(kind)})  # pyright: ignore[reportArgumentType]
    except ValidationError as error:
        raise UserError(*problem_lines(error, kind, lambda place: place)) from None
    values = {name: getattr(given, _joined(name)) for name in also}
    return given, {name: value for name, value in values.items() if value is not None}


def _joined(name: str) -> str:
    return name.replace(".", "__")
