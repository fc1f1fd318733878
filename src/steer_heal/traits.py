"""Loads data/traits/*.toml (persona pairs, system prompts, prompt pool, target foundation and sign) and contexts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from steer_heal.files import ROOT, check_fields, read_jsonl, read_toml, resolve
from steer_heal.records import FOUNDATIONS, Problems, Trait, UserError
from steer_heal.stages.cfg import SteerCfg

TRAITS = ROOT / "data" / "traits"

# The fields of a trait file. It has one persona pair, or the same axis in several phrasings of which one is the default.
ANY = {"description": str, "target": str, "sign": int, "narration": list, "prompts": list, "system": dict}
ONE_PAIR, PHRASED = ANY | {"persona": dict}, ANY | {"default_phrasing": str, "phrasing": dict}
PAIR = {"positive": str, "negative": str}
SYSTEM = {"steered": str, "plain": str}


def available() -> list[str]:
    return sorted(path.stem for path in TRAITS.glob("*.toml"))


def phrasings(name: str) -> list[str]:
    """The phrasings that a trait can be asked in as `trait/phrasing`; none where its file has one persona pair."""
    return list(_read(name).get("phrasing", {}))


def load_trait(name: str, prompts_file: Path | None = None) -> Trait:
    """A trait by name, `love` or `love/inner`; `prompts_file` (JSON lines with `text`, or a folder of them named
    after traits) replaces its prompt pool."""
    stem, _, phrasing = name.partition("/")
    problems, prompts = Problems(), None
    with problems.noted():
        table = _read(stem)
        pair = _pair(name, table, phrasing)
    if prompts_file is not None and stem in available():  # a folder holds pools of known traits
        with problems.noted():
            prompts = _prompts(prompts_file, stem)
    problems.complain()
    return Trait(
        name=name, description=table["description"], target=table["target"], sign=table["sign"], **pair,
        steered_system=table["system"]["steered"], plain_system=table["system"]["plain"], narration=tuple(table["narration"]),
        prompts=tuple(table["prompts"]) if prompts is None else prompts,
    )


def _pair(name: str, table: dict[str, Any], phrasing: str) -> dict[str, str]:
    """The personas that a name asks for."""
    known = table.get("phrasing", {})
    if "/" in name and phrasing not in known:
        fix = f"its phrasings are {', '.join(known)}" if known else "that file has one persona pair; ask for it without a phrasing"
        raise UserError(f"trait is {name!r}: {name.partition('/')[0]!r} has no phrasing {phrasing!r}; {fix}")
    return known[phrasing or table["default_phrasing"]] if known else table["persona"]


def _read(stem: str) -> dict[str, Any]:
    """The file of a trait, every field of it checked, also in phrasings that nobody asked for."""
    if stem not in available():
        raise UserError(f"trait is {stem!r}: it must be one of {', '.join(available())}, or a new file in data/traits/")
    path = TRAITS / f"{stem}.toml"
    table, problems = read_toml(path), Problems()
    phrased = bool({"phrasing", "default_phrasing"} & table.keys())
    check_fields(f"{path}", table, PHRASED if phrased else ONE_PAIR)
    with problems.noted():
        check_fields(f"{path} [system]", table["system"], SYSTEM)
    pairs = table["phrasing"] if phrased else {"persona": table["persona"]}
    for name, pair in pairs.items():
        with problems.noted():
            _check_pair(f"{path} [{'phrasing.' if phrased else ''}{name}]", pair)
    if phrased and table["default_phrasing"] not in pairs:
        problems.found.append(f"{path}: default_phrasing is {table['default_phrasing']!r}: it must be one of {', '.join(pairs)}")
    if table["target"] not in FOUNDATIONS:
        problems.found.append(f"{path}: target is {table['target']!r}: it must be one of {', '.join(FOUNDATIONS)}")
    if table["sign"] not in (-1, 1):
        problems.found.append(f"{path}: sign is {table['sign']}: it must be -1 (target goes down) or 1 (up)")
    for phrase in table["narration"]:
        if not phrase.strip() or phrase != phrase.lower():
            problems.found.append(f"{path}: narration holds {phrase!r}: it is looked for in lower-case text, so write it in lower case, and not empty")
    problems.complain()
    return table


def _check_pair(where: str, pair: Any) -> None:
    """Two personas that differ: the vector is what lies between them."""
    if not isinstance(pair, dict):
        raise UserError(f"{where} is {pair!r:.80}: it must be a table with {' and '.join(PAIR)}")
    check_fields(where, pair, PAIR)
    if not all(side.strip() for side in pair.values()) or pair["positive"].strip() == pair["negative"].strip():
        raise UserError(f"{where}: positive and negative must be two different texts, neither empty")


def _prompts(source: Path, stem: str) -> tuple[str, ...]:
    return tuple(row["text"] for row in read_jsonl(prompts_file(source, stem), {"text": str}))


def prompts_file(source: Path, stem: str) -> Path:
    """The file itself, or <stem>.jsonl where `source` is a folder."""
    folder = next((place for place in (source, ROOT / source) if place.is_dir()), None)
    if folder is not None:
        source = folder / f"{stem}.jsonl"
        if not source.is_file():
            pools = ", ".join(sorted(pool.stem for pool in folder.glob("*.jsonl"))) or "none"
            raise UserError(f"gen.prompts is {str(folder)!r}: it has no {source.name}; its pools are {pools}; write that file, or give one")
    return resolve(source, "gen.prompts")


def load_contexts(cfg: SteerCfg) -> list[str]:
    """The user messages that the vector is read on: n_contexts of the file, evenly over it."""
    pool = [row["text"] for row in read_jsonl(resolve(cfg.contexts, "steer.contexts"), {"text": str})]
    if cfg.n_contexts > len(pool):
        raise UserError(f"steer.n_contexts is {cfg.n_contexts}: {cfg.contexts} holds {len(pool)}; ask for fewer or add contexts")
    return [pool[i * len(pool) // cfg.n_contexts] for i in range(cfg.n_contexts)]
