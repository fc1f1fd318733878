"""Loads data/traits/*.toml (personas, system prompts, prompt pool, target foundation and sign) and contexts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from steer_heal.files import ROOT, read_jsonl, read_toml, resolve
from steer_heal.records import FOUNDATIONS, Trait, UserError
from steer_heal.stages.cfg import SteerCfg

TRAITS = ROOT / "data" / "traits"


def available() -> list[str]:
    return sorted(path.stem for path in TRAITS.glob("*.toml"))


def load_trait(name: str, prompts_file: Path | None = None) -> Trait:
    """A trait by name; `prompts_file` (JSON lines with `text`) replaces its prompt pool."""
    if name not in available():
        raise UserError(f"trait is {name!r}: it must be one of {', '.join(available())}, or a new file in data/traits/")
    path = TRAITS / f"{name}.toml"
    table = read_toml(path)

    def take(source: dict[str, Any], field: str, kind: type) -> Any:
        if not isinstance(source.get(field), kind):
            raise UserError(f"{path}: {field!r} is {source.get(field)!r}: it must be a {kind.__name__}")
        return source[field]

    persona, system = take(table, "persona", dict), take(table, "system", dict)
    prompts = take(table, "prompts", list)
    if prompts_file is not None:
        prompts = [row["text"] for row in read_jsonl(resolve(prompts_file, "gen.prompts"), {"text": str})]
    target, sign = take(table, "target", str), take(table, "sign", int)
    if target not in FOUNDATIONS:
        raise UserError(f"{path}: target is {target!r}: it must be one of {', '.join(FOUNDATIONS)}")
    if sign not in (-1, 1):
        raise UserError(f"{path}: sign is {sign}: it must be -1 (target goes down) or 1 (up)")
    return Trait(
        name=name, description=take(table, "description", str), target=target, sign=sign,
        positive=take(persona, "positive", str), negative=take(persona, "negative", str),
        steered_system=take(system, "steered", str), plain_system=take(system, "plain", str),
        narration=tuple(take(table, "narration", list)), prompts=tuple(prompts),
    )


def load_contexts(cfg: SteerCfg) -> list[str]:
    """The user messages that the vector is read on: n_contexts of the file, evenly over it."""
    pool = [row["text"] for row in read_jsonl(resolve(cfg.contexts, "steer.contexts"), {"text": str})]
    if cfg.n_contexts > len(pool):
        raise UserError(f"steer.n_contexts is {cfg.n_contexts}: {cfg.contexts} holds {len(pool)}; ask for fewer or add contexts")
    return [pool[i * len(pool) // cfg.n_contexts] for i in range(cfg.n_contexts)]
