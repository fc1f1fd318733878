"""Vector and per-row dose -> completions, one batch mixing prompts and doses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from steer_heal.lm import LM
from steer_heal.records import Completion
from steer_heal.steering import Decoding, Row, Tape, Vector, decode


@dataclass(frozen=True)
class Ask:
    """One completion to write: which prompt, at which dose, from which random stream."""

    prompt_index: int
    prompt: str
    alpha: float
    kappa: float
    seed: int


def generate(
    lm: LM, asks: Sequence[Ask], vector: Vector | None, system: str, plain_system: str, max_new_tokens: int, batch_size: int,
    on_rows: Callable[[int], None] = lambda n: None, tape: Tape = lambda batch: batch(),
) -> list[Completion]:
    """Completions in the order of `asks`, written under `system` as the model's generation config samples.

    The record holds the prompt under `plain_system`, without the persona that may have written the text.
    """
    rows = [Row(lm.chat(ask.prompt, system), ask.kappa * ask.alpha, ask.seed) for ask in asks]
    written = decode(lm, rows, vector, Decoding(max_new_tokens, batch_size), on_rows, tape)
    return [
        Completion(
            prompt_index=ask.prompt_index, prompt=ask.prompt, prompt_ids=lm.chat(ask.prompt, plain_system), completion_ids=ids,
            text=lm.tokenizer.decode(ids, skip_special_tokens=True), alpha=ask.alpha, dose=row.dose, seed=ask.seed,
        )
        for ask, row, ids in zip(asks, rows, written, strict=True)
    ]
