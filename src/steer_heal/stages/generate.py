"""Requests -> completions, one finished batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from steer_heal.model.decode import Decoding, Row, decode_batches
from steer_heal.model.lm import LM
from steer_heal.model.steering import Condition
from steer_heal.records import Completion, Conversation, alone

Batch = Mapping[tuple[int, float], tuple[int, ...]]
"""Token ids of completions that were decoded together, by the seed and dose of their request."""
Known = Sequence[Batch]
"""Batches that were finished before, in their order."""
OnBatch = Callable[[Sequence[Completion]], object]


@dataclass(frozen=True)
class Ask:
    """A request for one completion. By default it is not steered."""

    prompt_index: int
    prompt: str
    seed: int
    """Of its own random stream."""
    alpha: float = 0.0
    """Relative dose, one of gen.alphas."""
    kappa: float = 1.0
    """Multiplier of alpha."""
    attack: str = ""
    """Name of the attack under which it is written. Empty: none."""
    conversation: Conversation | None = None
    """The prompt under that attack. None: the prompt alone."""
    taught: Conversation | None = None
    """What the teacher reads before the completion. None: the prompt alone."""

    @property
    def asked(self) -> Conversation:
        return self.conversation or alone(self.prompt)

    @property
    def dose(self) -> float:
        return self.kappa * self.alpha


def generate(
    lm: LM,
    asks: Sequence[Ask],
    condition: Condition,
    *,
    plain_system: str,
    how: Decoding,
    known: Known | None = None,
    on_batch: OnBatch = lambda batch: None,
) -> list[Completion]:
    """Completions in the order of `asks`, written under the system prompt and the vector of `condition`. Each request
    has its own dose, which replaces that of the condition. Tokens are sampled as the model's generation config says.

    A completion records its prompt under `plain_system`, without the persona that may have written the text. Requests
    in `known` are not decoded again. `on_batch` is called with each batch of new completions once it is finished.

    Where a batch of these requests is known, the others are decoded in batches of its size. Then each row has the
    batch that it would have had without the interruption, which matters in bfloat16: there the other rows of a batch
    change the rounding, and with it the text.
    """
    keys = [(ask.seed, ask.dose) for ask in asks]
    before = [batch for batch in known or () if not batch.keys().isdisjoint(keys)]
    finished_before = {key: ids for batch in before for key, ids in batch.items()}
    if before:
        how = replace(how, batch_size=len(before[-1]))
    out: dict[int, Completion] = {}

    def complete(i: int, ids: tuple[int, ...]) -> Completion:
        ask = asks[i]
        return Completion(
            prompt_index=ask.prompt_index,
            prompt=ask.prompt,
            prompt_ids=lm.prompt(ask.asked, plain_system),
            completion_ids=ids,
            text=lm.decode(ids),
            alpha=ask.alpha,
            dose=ask.dose,
            seed=ask.seed,
            attack=ask.attack,
            taught=ask.taught,
        )

    todo = [i for i, key in enumerate(keys) if key not in finished_before]
    rows = [
        Row.under(replace(condition, dose=ask.dose), partial(lm.prompt, ask.asked), ask.seed)
        for ask in (asks[i] for i in todo)
    ]
    for batch in decode_batches(lm, rows, condition.vector, how):
        finished = {todo[written.row]: complete(todo[written.row], written.ids) for written in batch}
        out |= finished
        on_batch(list(finished.values()))
    return [out[i] if i in out else complete(i, finished_before[key]) for i, key in enumerate(keys)]
