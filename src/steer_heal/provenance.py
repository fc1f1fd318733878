"""Where a run's numbers come from: base weights -> vector -> kept completions -> adapter -> evaluation, as a chain of SHA-256.

Each link is a digest of the link before it and of what it stands for, and a round's first link follows the last one of the
round before. So whatever was changed upstream shows, and where: `python -m steer_heal.run --verify out/<run>`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from torch import nn

from steer_heal.events import read_events
from steer_heal.files import checksums
from steer_heal.lm import load, weights_sha256
from steer_heal.records import UserError
from steer_heal.terminal import complain, say

Event = Mapping[str, Any]
Digests = Mapping[str, str | None]
LINKS = ("base", "vector", "kept", "adapter", "evaluation")
"""The links of a round, in order."""


def weights_digest(model: nn.Module) -> dict[str, str]:
    """{"sha256", "dtype"} of a model's base weights."""
    return {"sha256": weights_sha256(model), "dtype": str(next(model.parameters()).dtype).removeprefix("torch.")}


def same_weights(start: Event, now: Mapping[str, str], folder: Path) -> None:
    """UserError where the model is not the one that the run began with."""
    then = start.get("weights", now)
    if then != now:
        raise UserError(f"resume is {str(folder)!r}: {_changed(start, now)}; put the model back, or start a new run")


def _changed(start: Event, now: Mapping[str, str]) -> str:
    then, model = start["weights"], start["config"]["model"]
    if then["dtype"] != now["dtype"]:
        return f"model {model!r} was in {then['dtype']} and is now in {now['dtype']} (--dtype and --device decide)"
    return f"the weights of model {model!r} were changed since the run began (SHA-256 {then['sha256'][:12]} then, {now['sha256'][:12]} now)"


# --- the chain -------------------------------------------------------------------------------------------------
def of_round(events: Sequence[Event], r: int, files: Callable[[Digests], Digests] = lambda recorded: recorded) -> dict[str, str]:
    """{link: hex digest} of round r as its events have it; `files` may look at the files again instead of believing the events."""
    before = _event(events, "round", r - 1).get("provenance", {}).get(LINKS[-1], "")
    chain = {}
    for name, content in _contents(events, r, files).items():
        chain[name] = before = link(before, name, content)
    return chain


def link(before: str, name: str, content: Any) -> str:
    """SHA-256 of the link before it, its own name and its content as canonical JSON."""
    text = json.dumps([before, name, content], sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _contents(events: Sequence[Event], r: int, files: Callable[[Digests], Digests]) -> dict[str, Any]:
    """What each link of round r stands for; None where the events do not say."""
    start, vector, gen, heal, healed = (_event(events, *of) for of in (("run_start", None), ("vector", r), ("gen", r), ("heal", r), ("healed", r)))
    trained = sorted((row for row in gen.get("completions", ()) if row.get("train_order") is not None), key=lambda row: row["train_order"])
    return {
        "base": start.get("weights"),
        "vector": files(vector["files"]) if vector else None,
        "kept": [[row.get("prompt_ids"), row.get("completion_ids")] for row in trained],
        "adapter": files(heal["files"]) if heal else None,
        "evaluation": [healed.get("items"), healed.get("metrics")],
    }


def _event(events: Sequence[Event], stage: str, r: int | None) -> Event:
    return next((e for e in events if (e["stage"], e["round"]) == (stage, r)), {})


# --- checking it -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Link:
    """One link of a round, and why it does not hold; empty: it holds."""

    round: int
    name: str
    digest: str
    broken: str = ""


def check(folder: Path) -> list[Link]:
    """Every link of a run's finished rounds, made again from its files, its events and the model's weights.

    UserError where `folder` is not a run.
    """
    try:
        events = read_events(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"verify is {str(folder)!r}: its events.jsonl cannot be read ({error}); give the folder of a run") from None
    if not events or events[0].get("stage") != "run_start":
        raise UserError(f"verify is {str(folder)!r}: its events.jsonl does not begin with a run_start; give the folder of a run")
    start, base = events[0], _loaded_differently(events[0])
    out, before = [], ""
    for event in (e for e in events if e["stage"] == "round"):
        r, recorded = event["round"], event.get("provenance", {})
        for name, content in _contents(events, r, lambda digests: _on_disk(folder, digests)).items():
            broken = base if name == "base" else ""
            if not broken and recorded.get(name) != link(before, name, content):
                broken = _why(folder, events, r, name) if recorded else "it was not recorded: the run was written by an earlier version"
            out.append(Link(r, name, recorded.get(name, ""), broken))
            before = recorded.get(name, "")
    return out if out else [Link(-1, "base", link("", "base", start.get("weights")), base)]


def _loaded_differently(start: Event) -> str:
    """Why the model that is loaded now is not the recorded one; empty where it is."""
    if "weights" not in start:
        return "its weights were not recorded: the run was written by an earlier version"
    try:
        now = weights_digest(load(start["config"]["model"], device="cpu", dtype=start["weights"]["dtype"]).model)
    except UserError as error:
        return f"it cannot be checked: {error}"
    return "" if now == start["weights"] else _changed(start, now)


def _on_disk(folder: Path, digests: Digests) -> Digests:
    return {name: checksums(folder, folder / name)[name] if (folder / name).is_file() else None for name in digests}


def _why(folder: Path, events: Sequence[Event], r: int, name: str) -> str:
    stage = {"vector": "vector", "kept": "gen", "adapter": "heal", "evaluation": "healed"}.get(name, "run_start")
    event = _event(events, stage, None if stage == "run_start" else r)
    if not event:
        return f"events.jsonl has no {stage!r} of round {r}"
    for path, digest in _on_disk(folder, event.get("files", {})).items():
        if digest != event["files"][path]:
            return f"{folder / path} is {'missing' if digest is None else 'not the file that was recorded'}"
    return f"the {stage!r} event, or the link itself, is not what the run wrote"


@dataclass(frozen=True)
class Verify:
    """Makes a run's chain of digests again (base weights, vector, kept completions, adapter, evaluation of every round) and
    names the first link that does not hold. Exit status: 0 it holds, 1 a link does not, 2 the folder is not a run."""

    verify: Path
    """Folder of the run."""


def main(argv: Sequence[str]) -> int:
    """`python -m steer_heal.run --verify out/<run>`."""
    try:
        links = check(tyro.cli(Verify, args=argv, prog="python -m steer_heal.run").verify)
    except UserError as error:
        complain(error)
        return 2
    for r in dict.fromkeys(each.round for each in links):
        say(f"round {r}: " + ", ".join(f"{each.name} {'BROKEN' if each.broken else 'holds'}" for each in links if each.round == r))
    if (bad := next((each for each in links if each.broken), None)) is not None:
        say(f"the chain breaks at the {bad.name} of round {bad.round}: {bad.broken}")
        return 1
    say(f"the chain holds over {len(links) // len(LINKS)} rounds and ends in {links[-1].digest}")
    return 0
