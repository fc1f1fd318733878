"""Requests -> completions, one finished batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from steer_heal.model.decode import Decoding, Row, decode_batches
from steer_heal.model.lm import LM
from steer_heal.model.steering import Vector
from steer_heal.records import Completion

Known = Mapping[tuple[int, float], tuple[int, ...]]
"""Token ids of completions that are written already, by seed and dose of their request."""


@dataclass(frozen=True)
class Ask:
    """One completion to write: which prompt, at which dose, from which random stream."""

    prompt_index: int
    prompt: str
    alpha: float
    kappa: float
    seed: int

    @property
    def dose(self) -> float:
        return self.kappa * self.alpha


def generate(
    lm: LM,
    asks: Sequence[Ask],
    vector: Vector | None,
    system: str,
    plain_system: str,
    how: Decoding,
    known: Known | None = None,
    on_batch: Callable[[Sequence[Completion]], None] = lambda batch: None,
) -> list[Completion]:
    """Completions in the order of `asks`, written under `system` as the model's generation config samples.

    The record holds the prompt under `plain_system`, without the persona that may have written the text. Requests in
    `known` are not decoded. `on_batch` gets every batch of new completions as soon as it is finished.
    """
    known = known or {}
    out: dict[int, Completion] = {}

    def complete(i: int, ids: tuple[int, ...]) -> Completion:
        ask = asks[i]
        text = lm.decode(ids)
        prompt_ids = lm.chat(ask.prompt, plain_system)
        return Completion(ask.prompt_index, ask.prompt, prompt_ids, ids, text, ask.alpha, ask.dose, ask.seed)

    todo = [i for i, ask in enumerate(asks) if (ask.seed, ask.dose) not in known]
    rows = [Row(lm.chat(asks[i].prompt, system), asks[i].dose, asks[i].seed) for i in todo]
    for batch in decode_batches(lm, rows, vector, how):
        finished = {todo[j]: complete(todo[j], ids) for j, ids in batch}
        out |= finished
        on_batch(list(finished.values()))
    return [out[i] if i in out else complete(i, known[ask.seed, ask.dose]) for i, ask in enumerate(asks)]
