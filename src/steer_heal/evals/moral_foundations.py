"""Moral-foundation vignettes: a forced choice among seven answers, as log-probabilities of digits.

The protocol is that of moral-maps:
1. Each vignette is asked twice, with the options in order and in reverse order.
2. The model thinks for a fixed number of tokens, decoded greedily.
3. A turn boundary and the prefill are forced.
4. The log-probabilities of the digits at the next position, the slot, are the answer.
5. The mean of a foundation's two log-probabilities cancels the bias towards positions and digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from steer_heal.backends import tinymfv
from steer_heal.errors import UserError
from steer_heal.evals.base import Eval, Items, Subject, log_probability
from steer_heal.inputs.instruments import FOUNDATIONS, Instrument, Vignette
from steer_heal.model.decode import Decoding, Row, decode_batches
from steer_heal.model.lm import LM
from steer_heal.model.steering import Condition, steer, weighted
from steer_heal.model.template import CLOSED_THOUGHT
from steer_heal.records import Metric


@dataclass(frozen=True)
class Slot:
    """A sequence after which the answer digit comes next, and the position at which its prefill begins."""

    ids: tuple[int, ...]
    prefill_start: int
    row: Row = Row(())
    """The row whose prompt `ids` begins with. The parts of a contrast read the rest after prompts of their own."""

    def parts(self) -> list[tuple[int, ...]]:
        """The sequence as each part of the row reads it."""
        return [self.ids, *(part.prompt_ids + self.ids[len(self.row.prompt_ids) :] for part in self.row.others)]


def item_values(
    vignettes: Sequence[Vignette],
    frames: Sequence[Sequence[str]],
    digit_logp: Float[Tensor, "n f"],
    prefill_nll: Float[Tensor, " n"],
) -> Items:
    """For each vignette: p_<foundation>, mass, prefill_nll (nats per token), unscorable, top1. NaN if unscorable.

    The answers are those of `answer_slots` to `Instrument.questions`.
    """
    orders = [order for _ in vignettes for order in frames]
    by_foundation = torch.stack(
        [digit_logp[i][[order.index(name) for name in FOUNDATIONS]] for i, order in enumerate(orders)]
    )
    logp = rearrange(by_foundation, "(i frame) f -> i frame f", frame=2)
    p = reduce(logp, "i frame f -> i f", "mean").softmax(-1)
    mass = reduce(logp.exp().sum(-1), "i frame -> i", "mean")
    nll = reduce(prefill_nll, "(i frame) -> i", "mean", frame=2)
    scorable = torch.isfinite(p).all(-1) & torch.isfinite(nll)
    right = torch.tensor(
        [FOUNDATIONS[k] in (v.foundation, v.also) for v, k in zip(vignettes, p.argmax(-1).tolist(), strict=True)]
    )
    values = {f"p_{name}": p[:, k] for k, name in enumerate(FOUNDATIONS)}
    values |= {"mass": mass, "prefill_nll": nll, "top1": right}
    shown = {name: torch.where(scorable, each.double(), torch.nan).tolist() for name, each in values.items()}
    return shown | {"unscorable": (~scorable).double().tolist()}


def digit_ids(lm: LM) -> list[int]:
    """Token ids of "0" to "6". UserError if a digit is several tokens."""
    ids = [lm.encode_on(str(i)) for i in range(len(FOUNDATIONS))]
    if any(len(i) != 1 for i in ids) or len(set(ids)) < len(ids):
        raise UserError(
            f"the tokenizer of {lm.name!r} does not encode each digit as one token, as moral_foundations requires; use "
            "the eval likelihood"
        )
    return [i[0] for i in ids]


def answer_slots(
    lm: LM, questions: Sequence[str], instrument: Instrument, condition: Condition, think_tokens: int, batch_size: int
) -> tuple[list[Slot], Float[Tensor, "n f"], Float[Tensor, " n"]]:
    """(slots, log-probabilities of the digits in them [n, 7], mean NLL of the prefill's tokens [n]), in nats.

    The prefill is forced after the thinking, and continues from its cache. If the model already wrote the prefill while
    it was thinking, the slot is the one after that.
    """
    close = lm.encode_on(instrument.think_close)
    between = turn_boundary(lm, instrument)
    boundary = lm.encode_on(between.rstrip(" "))
    prefill = lm.encode_on(between[len(between.rstrip(" ")) :] + instrument.prefill)
    digits = digit_ids(lm)

    def prompt(i: int, system: str) -> tuple[int, ...]:
        return _open_thought(lm, questions[i], instrument.think_open, system)

    suppress = lm.end_ids.union(close if len(close) == 1 else ())
    how = Decoding(think_tokens, batch_size, sample=False, suppress=suppress)
    rows = [Row.under(condition, partial(prompt, i)) for i in range(len(questions))]
    slots = [Slot((), 0)] * len(rows)
    logp = torch.full((len(rows), len(digits)), torch.nan)
    nll = torch.full((len(rows),), torch.nan)
    own = []
    decoded = decode_batches(lm, rows, condition.vector, how, tail=boundary + prefill)
    for i, thought, hidden in (written for batch in decoded for written in batch):
        forced = rows[i].prompt_ids + thought + boundary
        written = find_prefill(lm, thought, instrument.prefill)
        if written is None:
            slots[i] = Slot(forced + prefill, len(forced), rows[i])
            logp[i], nll[i] = _one_slot(lm, hidden[-len(prefill) - 1 :], prefill, digits=digits)
        else:
            start, end = written
            slots[i] = Slot(rows[i].prompt_ids + thought[:end], len(rows[i].prompt_ids) + start, rows[i])
            own.append(i)
    logp[own], nll[own] = slot_logp(lm, [slots[i] for i in own], digits, condition)
    return slots, logp, nll


def _open_thought(lm: LM, question: str, think_open: str, system: str) -> tuple[int, ...]:
    """The prompt of a question, with the tag that opens the thinking."""
    prompt = lm.template.conversation([question], system, thinks=True)
    opened = prompt.rstrip().endswith("<think>")
    return lm.encode_prompt(prompt if opened else prompt + think_open)


_SENTINEL = "ANSWER-GOES-HERE"


def turn_boundary(lm: LM, instrument: Instrument) -> str:
    """The text between the thinking and the prefill. It closes the thinking. If there is a nudge, it also ends the
    turn, adds the user's nudge, and opens a new assistant turn, all as the chat template writes them."""
    if not instrument.nudge:
        return instrument.think_close
    user = {"role": "user", "content": "_"}
    assistant = {"role": "assistant", "content": _SENTINEL}
    nudge = {"role": "user", "content": instrument.nudge}  # in the same conversation, whose opening is not repeated
    whole = lm.template.render([user, assistant, nudge, assistant], continue_final_message=True)
    return instrument.think_close + whole.split(_SENTINEL)[1]


def find_prefill(lm: LM, thought: Sequence[int], prefill: str) -> tuple[int, int] | None:
    """(start, end) of the first prefill in a thought, as token positions. None if there is none, or nothing follows."""
    begin = lm.decode(thought, special=True).find(prefill)
    if begin < 0:
        return None
    lengths = [len(lm.decode(thought[: t + 1], special=True)) for t in range(len(thought))]
    start = next(t for t, length in enumerate(lengths) if length > begin)
    end = next(t + 1 for t, length in enumerate(lengths) if length >= begin + len(prefill))
    return None if end == len(thought) else (start, end)


@torch.no_grad()
def slot_logp(
    lm: LM, slots: Sequence[Slot], digits: Sequence[int], condition: Condition
) -> tuple[Float[Tensor, "n f"], Float[Tensor, " n"]]:
    """The log-probabilities and NLLs of `answer_slots`, computed by a forward pass over the whole sequences."""
    logp = torch.full((len(slots), len(digits)), torch.nan)
    nll = torch.full((len(slots),), torch.nan)

    def read(group: list[int], k: int, dose: float) -> list[Tensor]:
        """The final states before and at the prefill of each slot, as part k reads it."""
        rows = [slots[i].parts()[k] for i in group]
        with steer(lm, condition.vector, [dose] * len(group)):
            hidden = lm.hidden(rows)
        n_states = [len(slots[i].ids) - slots[i].prefill_start + 1 for i in group]
        return [h[len(ids) - n : len(ids)] for h, ids, n in zip(hidden, rows, n_states, strict=True)]

    def work(group: list[int]) -> None:
        readings = zip(*(read(group, k, term.dose) for k, term in enumerate(condition.terms)), strict=True)
        for i, states in zip(group, readings, strict=True):
            hidden = weighted(condition.weights, states)
            logp[i], nll[i] = _one_slot(lm, hidden, slots[i].ids[slots[i].prefill_start :], digits=digits)

    lm.in_batches([max(map(len, slot.parts())) for slot in slots], work)
    return logp, nll


@torch.no_grad()
def _one_slot(
    lm: LM, hidden: Float[Tensor, "s d"], prefill: Sequence[int], digits: Sequence[int]
) -> tuple[Float[Tensor, " f"], Float[Tensor, ""]]:
    """(log-probabilities of the digits, mean NLL of the prefill), from the final states before and at the prefill."""
    logp = lm.logits(hidden[-1:]).log_softmax(-1)[0, list(digits)]
    return logp.cpu(), lm.nll(hidden[:-1], prefill).mean().cpu()


def _require_thoughts(lm: LM) -> None:
    """UserError if the model thinks between other tags than <think>, or replies in a channel."""
    begun, opening = lm.template.conversation(["?"], thinks=True), lm.template.opening.strip()
    if CLOSED_THOUGHT.search(begun) or (opening and not CLOSED_THOUGHT.search(opening)):
        raise UserError(
            f"eval.evals contains 'moral_foundations': it lets model {lm.name!r} think between <think> tags, and the "
            f"model replies behind {lm.template.conversation(['?'])[-40:]!r}; use the eval likelihood",
            resumable=False,
        )


def items(subject: Subject) -> Items:
    """The item values of the vignettes, which this module or moral-maps asks."""
    cfg = subject.cfg
    vignettes = subject.inputs.vignettes
    instrument = subject.inputs.instrument
    with subject.student.using(subject.state.adapters) as lm:
        _require_thoughts(lm)
        if cfg.backend == "tinymfv":
            return tinymfv.ask(lm, vignettes, subject.state.condition, think_tokens=cfg.think_tokens)
        _, logp, nll = answer_slots(
            lm,
            instrument.questions(vignettes),
            instrument,
            condition=subject.state.condition,
            think_tokens=cfg.think_tokens,
            batch_size=cfg.batch_size,
        )
    return item_values(vignettes, instrument.frames, logp, nll)


EVAL = Eval(
    items,
    (
        *(log_probability(name=f"{name}_nats", item=f"p_{name}", title=name) for name in FOUNDATIONS),
        Metric(name="coherence", item="mass", title="coherence", form=".4f", good=0.95, broken=0.85),
        Metric(name="prefill_nll", item="prefill_nll", title="prefill NLL", form=".4f", unit="nats per token"),
        Metric(name="frac_unscorable", item="unscorable", title="unscorable vignettes", form=".0%", shown=False),
        Metric(name="top1_acc", item="top1", title="vignettes named right", form=".0%", shown=False),
    ),
    of="vignette",
)
