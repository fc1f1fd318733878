"""Instruments (how vignettes are asked) and vignettes, read from data and checked with their line or field."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from steer_heal.files import read_jsonl, read_toml, resolve
from steer_heal.records import FOUNDATIONS, UserError

_COARSE = {name.lower(): name for name in FOUNDATIONS} | {"socialnorms": "social", "social norms": "social"}


@dataclass(frozen=True)
class Vignette:
    """A scene and the foundation that it violates; `also` names a second one where the scene is ambiguous."""

    id: str
    foundation: str
    text: str
    also: str | None = None


@dataclass(frozen=True)
class Instrument:
    """The wording of the forced choice. `order` is the first frame; the second lists it reversed."""

    name: str
    order: tuple[str, ...]
    prompt: str
    """The user message, with {vignette} and {schema}."""
    schema: str
    """With {options}: the option lines, joined by newlines."""
    option: str
    """One line, with {index} (its position) and {gloss}."""
    think_open: str
    think_close: str
    nudge: str
    """User turn that ends the thinking; empty: the answer follows in the same turn."""
    prefill: str
    gloss: dict[str, str]

    def question(self, vignette: str, order: tuple[str, ...]) -> str:
        options = "\n".join(
            self.option.replace("{index}", str(i)).replace("{gloss}", self.gloss[name]) for i, name in enumerate(order)
        )
        return self.prompt.replace("{schema}", self.schema.replace("{options}", options)).replace("{vignette}", vignette)

    @property
    def frames(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return self.order, self.order[::-1]


def load_instrument(path: Path) -> Instrument:
    path = resolve(path, "eval.instrument")
    table = read_toml(path)
    names = [field.name for field in fields(Instrument)]
    for name in names:
        if name not in table:
            raise UserError(f"{path}: field {name!r} is missing; an instrument has {', '.join(names)}")
        kind = {"order": list, "gloss": dict}.get(name, str)
        if not isinstance(table[name], kind):
            raise UserError(f"{path}: {name!r} is {table[name]!r}: it must be a {kind.__name__}")
    if sorted(table["order"]) != sorted(FOUNDATIONS) or sorted(table["gloss"]) != sorted(FOUNDATIONS):
        raise UserError(f"{path}: order and [gloss] must each name the seven answers {', '.join(FOUNDATIONS)} once")
    for name, slots in {"prompt": ("{vignette}", "{schema}"), "schema": ("{options}",), "option": ("{index}", "{gloss}")}.items():
        for slot in slots:
            if slot not in table[name]:
                raise UserError(f"{path}: {name!r} lacks {slot}")
    if not table["prefill"]:
        raise UserError(f"{path}: 'prefill' is empty: the answer slot needs text before it")
    return Instrument(**{name: tuple(table[name]) if name == "order" else table[name] for name in names})


def load_vignettes(path: Path) -> list[Vignette]:
    path = resolve(path, "eval.vignettes")
    rows = read_jsonl(path, {"id": str, "foundation_coarse": str, "text": str})
    vignettes = []
    seen: set[str] = set()
    for row in rows:
        also = row.get("also")
        for value in (row["foundation_coarse"], also):
            if value is not None and str(value).lower() not in _COARSE:
                raise UserError(f"{path} line {row['line']}: foundation {value!r} is not one of {', '.join(FOUNDATIONS)}")
        if row["id"] in seen:
            raise UserError(f"{path} line {row['line']}: id {row['id']!r} was used before; ids must differ")
        seen.add(row["id"])
        vignettes.append(Vignette(row["id"], _COARSE[row["foundation_coarse"].lower()], row["text"], _COARSE[also.lower()] if also else None))
    return vignettes
