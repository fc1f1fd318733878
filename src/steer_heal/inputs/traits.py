"""Trait files: a persona pair, prompts, and the metric that judges the trait."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, model_validator
from pydantic.dataclasses import dataclass

from steer_heal.errors import Problems, UserError, nearest, validated
from steer_heal.inputs.files import ROOT, DataFile, Text, parse_texts, parse_toml, read_file, resolve
from steer_heal.records import Trait

TRAITS = ROOT / "data" / "traits"
_STRICT = ConfigDict(extra="forbid")


def _lower_case(phrase: str) -> str:
    if not phrase.strip() or phrase != phrase.lower():
        raise ValueError(f"narration holds {phrase!r}: it is looked for in lower-case text, so write it in lower case")
    return phrase


@dataclass(frozen=True, config=_STRICT)
class PersonaPair:
    """Two system prompts that differ along one axis."""

    positive: Text
    negative: Text

    @model_validator(mode="after")
    def _check(self) -> PersonaPair:
        sides = {self.positive.strip(), self.negative.strip()}
        if len(sides) == 1 or "" in sides:
            raise ValueError("positive and negative must be two different texts, neither empty")
        return self


@dataclass(frozen=True, config=_STRICT)
class SystemPrompts:
    """System prompts while text is written; empty: none."""

    steered: str
    plain: str


@dataclass(frozen=True, config=_STRICT)
class TraitFile:
    """The fields of a trait file: one persona pair, or several phrasings of the same axis and a default."""

    description: str
    target: str
    sign: Literal[-1, 1]
    narration: tuple[Annotated[str, AfterValidator(_lower_case)], ...]
    prompts: tuple[Text, ...]
    system: SystemPrompts
    off_targets: tuple[str, ...] = ()
    persona: PersonaPair | None = None
    default_phrasing: str | None = None
    phrasing: dict[str, PersonaPair] = field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> TraitFile:
        if (self.persona is None) is not bool(self.phrasing):
            raise ValueError("give either [persona], or default_phrasing and one [phrasing.<name>] or more")
        if self.phrasing and self.default_phrasing not in self.phrasing:
            names = ", ".join(self.phrasing)
            raise ValueError(f"default_phrasing is {self.default_phrasing!r}: it must be one of {names}")
        if self.target in self.off_targets:
            raise ValueError(f"off_targets holds the target {self.target!r}; leave it out")
        return self


def available() -> list[str]:
    return sorted(path.stem for path in TRAITS.glob("*.toml"))


def phrasings(name: str) -> list[str]:
    """The phrasings that a trait can be asked in as `trait/phrasing`; none where its file has one persona pair."""
    return list(_read(name).phrasing)


def load_trait(name: str, pool: DataFile | None = None) -> Trait:
    """A trait by name, such as `love` or `love/inner`. `pool` (JSON lines with `text`) replaces its prompts."""
    stem, slash, phrasing = name.partition("/")
    problems, prompts = Problems(), None
    with problems.noted():
        file = _read(stem)
        pair = _pair(name, file, phrasing if slash else None)
    if pool is not None:
        with problems.noted():
            prompts = parse_texts(pool)
    problems.raise_if_any()
    return Trait(
        name,
        file.description,
        file.target,
        file.sign,
        file.off_targets,
        pair.positive,
        pair.negative,
        file.system.steered,
        file.system.plain,
        file.narration,
        prompts or file.prompts,
    )


def _pair(name: str, file: TraitFile, phrasing: str | None) -> PersonaPair:
    """The personas that a name asks for."""
    if phrasing is None:
        return file.persona or file.phrasing[file.default_phrasing or ""]
    if phrasing not in file.phrasing:
        fix = (
            nearest(phrasing, file.phrasing)
            if file.phrasing
            else "that file has one persona pair; leave the phrasing out"
        )
        raise UserError(f"trait is {name!r}: there is no phrasing {phrasing!r}; {fix}")
    return file.phrasing[phrasing]


def _read(stem: str) -> TraitFile:
    """The file of a trait, every field of it checked, also in phrasings that nobody asked for."""
    if stem not in available():
        raise UserError(f"trait is {stem!r}: {nearest(stem, available())} (a new trait is a new file in data/traits/)")
    path = TRAITS / f"{stem}.toml"
    known = ("positive", "negative", "steered", "plain")
    return validated(TraitFile, parse_toml(read_file(path)), str(path), known)


def prompts_file(source: Path, trait: str) -> Path:
    """The file of prompts itself, or <trait>.jsonl where `source` is a folder."""
    stem = trait.partition("/")[0]
    folder = next((place for place in (source, ROOT / source) if place.is_dir()), None)
    if folder is None:
        return resolve(source, "gen.prompts")
    if stem in available() and (file := folder / f"{stem}.jsonl").is_file():
        return file
    pools = ", ".join(sorted(pool.stem for pool in folder.glob("*.jsonl"))) or "none"
    raise UserError(f"gen.prompts is {str(source)!r}: it has no {stem}.jsonl; its pools are {pools}; write that file")
