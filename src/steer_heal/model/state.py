"""The states of a model that can be measured and talked to."""

from __future__ import annotations

from dataclasses import dataclass

from steer_heal.model.steering import Condition
from steer_heal.model.student import AdapterState
from steer_heal.records import StateName, Trait, state_label


@dataclass(frozen=True, kw_only=True)
class State:
    """Which adapters act, and under which condition."""

    name: StateName
    round: int | None = None
    """None: before the loop."""
    adapters: AdapterState = "full"
    condition: Condition

    @property
    def label(self) -> str:
        """`base`, `healed round 1`."""
        return state_label(self.name, self.round)


def base_state(trait: Trait) -> State:
    """The untouched model under the plain prompt."""
    return State(name="base", adapters="base", condition=Condition(trait.plain_system))


def prompted_state(trait: Trait) -> State:
    """The untouched model with the positive persona as system prompt."""
    return State(name="prompted", adapters="base", condition=Condition(trait.positive))


def control_state(trait: Trait) -> State:
    """The student after the control's heal, under the plain prompt."""
    return State(name="control", condition=Condition(trait.plain_system))


def steered_state(r: int, teacher: Condition) -> State:
    """The student before round r under what makes its teacher."""
    return State(name="steered", round=r, adapters="prev", condition=teacher)


def healed_state(r: int, trait: Trait) -> State:
    """The student after round r under the plain prompt."""
    return State(name="healed", round=r, condition=Condition(trait.plain_system))
