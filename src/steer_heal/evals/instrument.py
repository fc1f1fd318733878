"""Instruments (how vignettes are asked) and vignettes, read from data and checked with their line or field."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from steer_heal.files import check_fields, read_jsonl, read_toml, resolve
from steer_heal.records import FOUNDATIONS, Problems

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


FIELDS = {field.name: {"order": list, "gloss": dict}.get(field.name, str) for field in fields(Instrument)}
SLOTS = {"prompt": ("{vignette}", "{schema}"), "schema": ("{options}",), "option": ("{index}", "{gloss}")}


def load_instrument(path: Path) -> Instrument:
    path = resolve(path, "eval.instrument")
    table, problems = read_toml(path), Problems()
    check_fields(f"{path}", table, FIELDS)
    with problems.noted():
        check_fields(f"{path} [gloss]", table["gloss"], dict.fromkeys(FOUNDATIONS, str))
    if sorted(table["order"]) != sorted(FOUNDATIONS):
        problems.found.append(f"{path}: order must name the seven answers {', '.join(FOUNDATIONS)} once each")
    problems.found += [f"{path}: {name!r} lacks {slot}" for name, slots in SLOTS.items() for slot in slots if slot not in table[name]]
    if not table["prefill"]:
        problems.found.append(f"{path}: 'prefill' is empty: the answer slot needs text before it")
    problems.complain()
    return Instrument(**table | {"order": tuple(table["order"])})


def load_vignettes(path: Path) -> list[Vignette]:
    path = resolve(path, "eval.vignettes")
    vignettes: dict[str, Vignette] = {}
    problems = Problems()
    for row in read_jsonl(path, {"id": str, "foundation_coarse": str, "text": str}):
        where, own, also = f"{path} line {row['line']}", row["foundation_coarse"], row.get("also")
        unknown = [value for value in (own, also) if value is not None and str(value).lower() not in _COARSE]
        problems.found += [f"{where}: foundation {value!r:.80} is not one of {', '.join(FOUNDATIONS)}" for value in unknown]
        if row["id"] in vignettes:
            problems.found.append(f"{where}: id {row['id']!r:.80} was used before; ids must differ")
        if not unknown:
            vignettes[row["id"]] = Vignette(row["id"], _COARSE[own.lower()], row["text"], _COARSE[also.lower()] if also else None)
    problems.complain()
    return list(vignettes.values())
