"""Writes the table of events in spec.md from the event classes: python scripts/events_table.py"""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import get_args

from steer_heal.events import AnyEvent, Event

SPEC = Path(__file__).parents[1] / "spec.md"
BLOCK = re.compile(r"(<!-- events: [^\n]*-->\n).*?(<!-- end -->)", re.DOTALL)


def table() -> str:
    """A row for each kind of event: its name, its fields without those that all have, and what it records."""
    common = {each.name for each in fields(Event)} | {"event"}
    rows = ["| event | fields | recorded when |", "|---|---|---|"]
    for kind in get_args(AnyEvent):
        name = next(each.default for each in fields(kind) if each.name == "event")
        own = " ".join(each.name for each in fields(kind) if each.name not in common)
        rows.append(f"| `{name}` | `{own}` | {' '.join((kind.__doc__ or '').split())} |")
    return "\n".join(rows)


def with_table(spec: str) -> str:
    """The text of spec.md with the table as the classes are now."""
    return BLOCK.sub(lambda found: f"{found[1]}{table()}\n{found[2]}", spec)


if __name__ == "__main__":
    SPEC.write_text(with_table(SPEC.read_text(encoding="utf-8")), encoding="utf-8")
