"""Trait files: a persona pair, prompts, contrast pairs, and the metric that judges the trait."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import field, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from steer_heal.errors import UserError, nearest, validated
from steer_heal.inputs.files import DATA, DataFile, Text, candidates, parse_toml, read_file, resolve
from steer_heal.inputs.pairs import Pair, parse_pairs
from steer_heal.records import Trait

TRAITS = DATA / "traits"
_STRICT = ConfigDict(extra="forbid")
_BY_PATH = re.compile(r"(.+\.toml)(?:/([^/]*))?", re.DOTALL)


def _lower_case(phrase: str) -> str:
    if not phrase.strip() or phrase != phrase.lower():
        raise ValueError(f"narration holds {phrase!r}: it is looked for in lower-case text, so write it in lower case")
    return phrase


def _listed(target: object) -> object:
    return tuple(target) if isinstance(target, list) else (target,)


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
    target: Annotated[tuple[Text, ...], Field(min_length=1), BeforeValidator(_listed)]
    """One metric or several: the run is judged by the first that its evals measure."""
    sign: Literal[-1, 1]
    narration: tuple[Annotated[str, AfterValidator(_lower_case)], ...]
    prompts: tuple[Text, ...]
    system: SystemPrompts
    off_targets: tuple[str, ...] = ()
    pairs: tuple[Pair, ...] = ()
    pairs_file: Text | None = None
    """JSON lines in place of `pairs`; a relative path begins at the folder of the trait file, or at the checkout."""
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
        if both := [name for name in self.target if name in self.off_targets]:
            raise ValueError("\n".join(f"off_targets holds the target {name!r}; leave it out" for name in both))
        if self.pairs and self.pairs_file is not None:
            raise ValueError("give either [[pairs]] or pairs_file, not both")
        return self


def available() -> list[str]:
    return sorted(path.stem for path in TRAITS.glob("*.toml"))


def phrasings(name: str) -> list[str]:
    """The phrasings that a trait can be asked in as `trait/phrasing`; none where its file has one persona pair."""
    return list(read_trait(name)[1].phrasing)


def load_trait(name: str, prompts: Sequence[str] = ()) -> Trait:
    """A trait by name or path, such as `love`, `love/inner` or `my/love.toml`. `prompts` replace its own."""
    return make_trait(name, read_trait(name)[1], prompts)


def read_trait(name: str) -> tuple[DataFile, TraitFile]:
    """The file of a trait, every field of it checked, also in phrasings that nobody asked for."""
    source, _ = _split(name)
    if by_path(name):
        path = resolve(source, "trait")
    elif source in available():
        path = TRAITS / f"{source}.toml"
    else:
        fix = "a trait of your own is given by its path, which ends in .toml"
        raise UserError(f"trait is {source!r}: {nearest(source, available())} ({fix})")
    file = read_file(path)
    return file, validated(TraitFile, parse_toml(file), str(path))


def make_trait(name: str, file: TraitFile, prompts: Sequence[str] = ()) -> Trait:
    """The trait as its file says, judged by its first target. A trait by path is named by the stem of its file."""
    source, phrasing = _split(name)
    pair = _pair(name, file, phrasing)
    return Trait(
        "/".join([Path(source).stem if by_path(name) else source, *([phrasing] if phrasing else [])]),
        file.description,
        file.target[0],
        file.sign,
        file.off_targets,
        pair.positive,
        pair.negative,
        file.system.steered,
        file.system.plain,
        file.narration,
        tuple(prompts) or file.prompts,
    )


def by_path(name: str) -> bool:
    """Whether a trait is named by the path of its file."""
    return _BY_PATH.fullmatch(name) is not None


def _split(name: str) -> tuple[str, str | None]:
    """(name or path of the file, phrasing) of a trait; None: the default phrasing."""
    if found := _BY_PATH.fullmatch(name):
        return found[1], found[2]
    source, slash, phrasing = name.partition("/")
    return source, phrasing if slash else None


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


def prompts_file(source: Path, trait: str) -> Path | None:
    """The file of prompts itself, or <trait>.jsonl where `source` is a folder. None: the trait's own prompts serve, or
    there is no such trait. UserError where the folder lacks those of a bundled trait."""
    path = _of_trait(source, trait, "gen.prompts")
    stem = _split(trait)[0]
    if path is None and stem in available():
        folder = _folder(source) or source
        pools = ", ".join(sorted(pool.stem for pool in folder.glob("*.jsonl"))) or "none"
        raise UserError(
            f"gen.prompts is {str(source)!r}: it has no {stem}.jsonl; its pools are {pools}; write that file"
        )
    return path


def read_pairs(
    source: Path | None, name: str, own: DataFile, file: TraitFile
) -> tuple[DataFile, list[tuple[str, Pair]]]:
    """(the file that holds the pairs of a trait, each pair with where it stands): `source` or the file of the trait in
    it, else what the trait's own file, `own`, holds or names. Of pairs in the trait's own file the checksum is theirs
    alone."""
    if source is not None and (path := _of_trait(source, name, "eval.pairs")) is not None:
        given = read_file(path)
    elif file.pairs_file is not None:
        given = read_file(resolve(file.pairs_file, f"{own.path}: pairs_file", own.path.parent))
    else:
        digest = hashlib.sha256(repr(file.pairs).encode()).hexdigest()
        return replace(own, sha256=digest), [(f"{own.path} pairs.{i}", pair) for i, pair in enumerate(file.pairs)]
    return given, parse_pairs(given)


def _of_trait(source: Path, name: str, setting: str) -> Path | None:
    """`source`, or <trait>.jsonl in it where it is a folder. None: it has none, or the trait is named by path."""
    folder, (stem, _) = _folder(source), _split(name)
    if folder is None:
        return resolve(source, setting)
    file = folder / f"{stem}.jsonl"
    return file if stem in available() and file.is_file() else None


def _folder(source: Path) -> Path | None:
    """The first candidate that is a folder, or None."""
    with suppress(OSError, ValueError):  # as in files.resolve
        return next((place for place in candidates(source) if place.is_dir()), None)
