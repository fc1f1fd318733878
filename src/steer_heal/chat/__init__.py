"""Talking to a round of a run: the same message answered by the base, the steered student and the healed one."""

from __future__ import annotations

from steer_heal.errors import UserError, nearest
from steer_heal.records import StateName

STATES: tuple[StateName, ...] = ("base", "prompted", "steered", "healed")
"""The states that answer."""


def known_state(name: str) -> str:
    """The name itself. UserError if no state has it."""
    if name not in STATES:
        raise UserError(f"unknown state {name!r}; {nearest(name, STATES)}")
    return name
