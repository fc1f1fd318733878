"""Trait files: a pair of personas, prompts, contrast pairs, and the metric that is the target of the trait."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import field, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.dataclasses import dataclass

from steer_heal.errors import UserError, nearest, validated
from steer_heal.inputs.alike import alike
from steer_heal.inputs.files import DATA, DataFile, Text, candidates, parse_toml, read_file, resolve
from steer_heal.inputs.pairs import Pair, parse_pairs, require_two
from steer_heal.records import Trait

TRAITS = DATA / "traits"
SHARED_BY_A_COPY = 0.25
"""Part of the prompts of a bundled trait. A trait with so many of them is a copy of it."""
_STRICT = ConfigDict(extra="forbid")
_BY_PATH = re.compile(r"(.+\.toml)(?:/([^/]*))?", re.DOTALL)


def _lower_case(phrase: str) -> str:
    if not phrase.strip() or phrase != phrase.lower():
        raise ValueError(f"narration contains {phrase!r}: the filter compares lower-case text; write it in lower case")
    return phrase


def _listed(target: object) -> object:
    """A single target as a tuple."""
    return tuple(target) if isinstance(target, list | tuple) else (target,)


@dataclass(frozen=True, config=_STRICT)
class PersonaPair:
    """Two system prompts that differ along one axis."""

    positive: Text
    negative: Text

    @model_validator(mode="after")
    def _check(self) -> PersonaPair:
        require_two("positive and negative must be different", self.positive, self.negative)
        return self


@dataclass(frozen=True, config=_STRICT)
class SystemPrompts:
    """System prompts under which text is written. Empty: without one."""

    steered: str = ""
    plain: str = ""


TARGETS = ("contrast_nats", "persona_log_odds")
"""Of a trait whose file names none."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid", validate_default=True))
class TraitFile:
    """The fields of a trait file. It has one pair of personas, or several phrasings of it and the default phrasing. All
    other fields may be left out."""

    description: str = ""
    target: Annotated[tuple[Text, ...], Field(min_length=1), BeforeValidator(_listed)] = TARGETS
    """One or more metrics. The target of a run is the first that its evals report."""
    sign: Literal[-1, 1] = 1
    """Of a target that is a moral foundation. A metric that rises towards the positive persona always has +1."""
    narration: tuple[Annotated[str, AfterValidator(_lower_case)], ...] = ()
    prompts: tuple[Text, ...] = ()
    """Empty: everyday messages of the package."""
    system: SystemPrompts = field(default_factory=SystemPrompts)
    off_targets: tuple[str, ...] = ()
    pairs: tuple[Pair, ...] = ()
    pairs_file: Text | None = None
    """JSON lines to use instead of `pairs`. A relative path is looked up in the folder of the trait file, then in the
    package."""
    persona: PersonaPair | None = None
    phrasing: dict[str, PersonaPair] = field(default_factory=dict)
    default_phrasing: str | None = None

    # A field sees the valid ones above it, so that one error tells all that is wrong with a file.
    @field_validator("off_targets")
    @classmethod
    def _without_target(cls, names: tuple[str, ...], above: ValidationInfo) -> tuple[str, ...]:
        if both := [name for name in above.data.get("target", ()) if name in names]:
            raise ValueError("\n".join(f"off_targets contains the target {name!r}; remove it" for name in both))
        return names

    @field_validator("pairs_file")
    @classmethod
    def _one_source(cls, name: str | None, above: ValidationInfo) -> str | None:
        if name is not None and above.data.get("pairs"):
            raise ValueError("give either [[pairs]] or pairs_file, not both")
        return name

    @field_validator("phrasing")
    @classmethod
    def _or_persona(cls, phrasing: dict[str, PersonaPair], above: ValidationInfo) -> dict[str, PersonaPair]:
        if "persona" in above.data and (above.data["persona"] is None) is not bool(phrasing):
            raise ValueError("give either [persona], or default_phrasing and one [phrasing.<name>] or more")
        return phrasing

    @field_validator("default_phrasing")
    @classmethod
    def _a_phrasing(cls, name: str | None, above: ValidationInfo) -> str | None:
        if (known := above.data.get("phrasing")) and name not in known:
            raise ValueError(f"default_phrasing is {name!r}: choose from {', '.join(known)}")
        return name


def available() -> list[str]:
    """The names of the bundled traits."""
    return sorted(path.stem for path in TRAITS.glob("*.toml"))


def load_trait(name: str) -> Trait:
    """A trait by its name or path, such as `love`, `love/inner` or `my/love.toml`."""
    return make_trait(name, read_trait(name)[1])


def read_trait(name: str) -> tuple[DataFile, TraitFile]:
    """The file of a trait, with all fields checked, including those of other phrasings."""
    file = _file_of(name)
    return file, validated(TraitFile, parse_toml(file), str(file.path))


def readable_part(name: str) -> tuple[DataFile, TraitFile] | None:
    """The file of a trait, and of its content only the prompts and the pairs, if they are valid. With it the other
    checks tell what else is wrong with a file that `read_trait` refuses. None: it is no TOML file."""
    part: dict[str, object] = {"persona": {"positive": "+", "negative": "-"}}
    try:
        file = _file_of(name)
        table = parse_toml(file)
    except UserError:
        return None
    for field_name in ("prompts", "pairs"):
        with suppress(UserError, KeyError):
            validated(TraitFile, {**part, field_name: table[field_name]})
            part[field_name] = table[field_name]
    return file, validated(TraitFile, part)


def _file_of(name: str) -> DataFile:
    source, _ = _split(name)
    if by_path(name):
        return read_file(resolve(source, "trait"))
    if source in available():
        return read_file(TRAITS / f"{source}.toml")
    if name.startswith((".", "/", "~")) or Path(f"{name}.toml").is_file():
        close = f"; did you mean {name + '.toml'!r}?" if Path(f"{name}.toml").is_file() else ""
        raise UserError(f"trait is {name!r}: the name of a trait file ends in .toml{close}")
    fix = "give your own trait by its path, which ends in .toml"
    raise UserError(f"trait is {source!r}: {nearest(source, available())} ({fix})")


def make_trait(name: str, file: TraitFile, prompts: Sequence[str] = ()) -> Trait:
    """The trait that a file describes, with its first target. A trait given by its path has the name of its file."""
    _, phrasing = _split(name)
    pair = _pair(name, file, phrasing)
    stem = _stem(name)
    return Trait(
        name=f"{stem}/{phrasing}" if phrasing else stem,
        description=file.description,
        target=file.target[0],
        sign=file.sign,
        off_targets=file.off_targets,
        positive=pair.positive,
        negative=pair.negative,
        steered_system=file.system.steered,
        plain_system=file.system.plain,
        narration=file.narration,
        prompts=tuple(prompts) or file.prompts,
    )


def other_traits(trait: Trait, pairs: Sequence[Pair] = ()) -> list[str]:
    """The bundled traits that are not this one: they have another name, none of its personas, and less than a quarter
    of their prompts in common with it and its pairs."""
    personas, prompts = _alike((trait.positive, trait.negative)), _alike(trait.prompts) | _prompts(pairs)
    known = ((name, *_of_bundled(name)) for name in available() if name != trait.name.partition("/")[0])
    return [
        name
        for name, theirs, asked in known
        if not personas & theirs and len(prompts & asked) < SHARED_BY_A_COPY * len(asked)
    ]


@cache
def _of_bundled(name: str) -> tuple[frozenset[str], frozenset[str]]:
    """What compares equal to (a persona of a bundled trait, a prompt of it or of its pairs)."""
    own, file = read_trait(name)
    both = [*file.phrasing.values(), *([file.persona] if file.persona else [])]
    placed = read_pairs(None, name, own, file)[1]
    sides = [side for each in both for side in (each.positive, each.negative)]
    return _alike(sides), _alike(file.prompts) | _prompts(pair for _, pair in placed)


def _prompts(pairs: Iterable[Pair]) -> frozenset[str]:
    return _alike(pair.prompt for pair in pairs)


def _alike(texts: Iterable[str]) -> frozenset[str]:
    return frozenset(map(alike, texts))


def by_path(name: str) -> bool:
    """Whether the name of a trait is the path of its file."""
    return _BY_PATH.fullmatch(name) is not None


def _stem(name: str) -> str:
    """The name of a trait without its phrasing or, if it is the path of a file, the name of that file."""
    source, _ = _split(name)
    return Path(source).stem if by_path(name) else source


def _split(name: str) -> tuple[str, str | None]:
    """(name or path of the file, phrasing) of a trait. None is the default phrasing."""
    if found := _BY_PATH.fullmatch(name):
        return found[1], found[2]
    source, slash, phrasing = name.partition("/")
    return source, phrasing if slash else None


def _pair(name: str, file: TraitFile, phrasing: str | None) -> PersonaPair:
    """The personas of a phrasing. UserError if there is no such phrasing."""
    if phrasing is None:
        return file.persona or file.phrasing[file.default_phrasing or ""]
    if phrasing not in file.phrasing:
        only_one = "the file has a single pair of personas; leave out the phrasing"
        fix = nearest(phrasing, file.phrasing) if file.phrasing else only_one
        raise UserError(f"trait is {name!r}: there is no phrasing {phrasing!r}; {fix}")
    return file.phrasing[phrasing]


def prompts_file(source: Path, trait: str) -> Path | None:
    """The file of prompts: `source`, or <trait>.jsonl in it if it is a folder.

    None: use the trait's own prompts (or there is no such trait). UserError if the folder has no prompts for a bundled
    trait.
    """
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
    """(file with the contrast pairs of a trait, list of (place, pair)).

    The file is `source`, or the trait's file in it if that is a folder; otherwise the pairs are those of the trait file
    `own`, or of the file that it names. The checksum of pairs in the trait file covers only the pairs.
    """
    if source is not None and (path := _of_trait(source, name, "eval.pairs")) is not None:
        given = read_file(path)
    elif file.pairs_file is not None:
        given = read_file(resolve(file.pairs_file, f"{own.path}: pairs_file", own.path.parent))
    else:
        digest = hashlib.sha256(repr(file.pairs).encode()).hexdigest()
        return replace(own, sha256=digest), [(f"{own.path} pairs.{i}", pair) for i, pair in enumerate(file.pairs)]
    return given, parse_pairs(given)


def read_panel(source: Path | None, trait: Trait, pairs: Sequence[Pair]) -> dict[str, list[tuple[str, Pair]]]:
    """The place and pair of each pair of each other bundled trait that has some.

    If `source` is a folder, only files in it are read. UserError if there is no other trait.
    """
    folder = None if source is None else _folder(source)
    found = {}
    for other in other_traits(trait, pairs):
        if folder is not None and not (folder / f"{other}.jsonl").is_file():
            continue
        _, placed = read_pairs(folder, other, *read_trait(other))
        if placed:
            found[other] = placed
    if not found:
        raise UserError(
            f"eval.evals contains 'panel': there are no pairs of a trait other than {trait.name!r} in "
            f"{str(folder or TRAITS)!r}; add the file <trait>.jsonl of another trait, or leave out panel"
        )
    return found


def _of_trait(source: Path, name: str, setting: str) -> Path | None:
    """`source`, or <trait>.jsonl in it if it is a folder. None if it has no such file, or the trait is given by its
    path.
    """
    folder = _folder(source)
    stem, _ = _split(name)
    if folder is None:
        return resolve(source, setting)
    file = folder / f"{stem}.jsonl"
    return file if stem in available() and file.is_file() else None


def _folder(source: Path) -> Path | None:
    """The first candidate that is a folder, or None."""
    with suppress(OSError, ValueError):  # as in files.resolve
        return next((place for place in candidates(source) if place.is_dir()), None)
