"""Moral-foundation vignettes: which of seven answers the model gives, read as log-probabilities of digits.

The protocol is that of moral-maps: each vignette is asked twice, with the options listed forward and reversed;
the model thinks greedily for a fixed number of tokens, a turn boundary and the prefill are forced, and the slot
behind them is read. Averaging the two log-probabilities of a foundation cancels position and digit bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from steer_heal.backends import tinymfv
from steer_heal.errors import UserError
from steer_heal.evals.base import Eval, Items, Subject
from steer_heal.inputs.instruments import FOUNDATIONS, Instrument, Vignette
from steer_heal.model.decode import Decoding, Row, decode_then_read
from steer_heal.model.lm import LM
from steer_heal.model.steering import Condition, steer
from steer_heal.records import Metric


@dataclass(frozen=True)
class Slot:
    """A sequence that ends where the answer digit comes next, and where its prefill begins."""

    ids: tuple[int, ...]
    prefill_start: int


def read(
    lm: LM,
    vignettes: Sequence[Vignette],
    instrument: Instrument,
    condition: Condition,
    think_tokens: int,
    batch_size: int,
) -> Items:
    """Per vignette: p_<foundation>, mass, prefill_nll (nats per token), unscorable, top1. NaN where unscorable."""
    questions = [(vignette, order) for vignette in vignettes for order in instrument.frames]
    asked = [instrument.question(v.text, order) for v, order in questions]
    _, digit_logp, prefill_nll = answer_slots(lm, asked, instrument, condition, think_tokens, batch_size)
    by_foundation = torch.stack(
        [digit_logp[i][[order.index(name) for name in FOUNDATIONS]] for i, (_, order) in enumerate(questions)]
    )
    logp = rearrange(by_foundation, "(i frame) f -> i frame f", frame=2)
    p = reduce(logp, "i frame f -> i f", "mean").softmax(-1)
    mass = reduce(logp.exp().sum(-1), "i frame -> i", "mean")
    nll = reduce(prefill_nll, "(i frame) -> i", "mean", frame=2)
    scorable = torch.isfinite(p).all(-1) & torch.isfinite(nll)
    right = torch.tensor(
        [FOUNDATIONS[k] in (v.foundation, v.also) for v, k in zip(vignettes, p.argmax(-1).tolist(), strict=True)]
    )
    hide = lambda values: torch.where(scorable, values.double(), torch.nan).tolist()
    items = {f"p_{name}": hide(p[:, k]) for k, name in enumerate(FOUNDATIONS)}
    return items | {
        "mass": hide(mass),
        "prefill_nll": hide(nll),
        "top1": hide(right),
        "unscorable": (~scorable).double().tolist(),
    }


def digit_ids(lm: LM) -> list[int]:
    """Token ids of "0" to "6"; an answer split over several tokens would lose its mass."""
    ids = [lm.encode(str(i)) for i in range(len(FOUNDATIONS))]
    if any(len(i) != 1 for i in ids):
        raise UserError(
            f"the tokenizer of {lm.name!r} does not write each digit as one token; moral_foundations needs that"
        )
    return [i[0] for i in ids]


def answer_slots(
    lm: LM, questions: Sequence[str], instrument: Instrument, condition: Condition, think_tokens: int, batch_size: int
) -> tuple[list[Slot], Float[Tensor, "n f"], Float[Tensor, " n"]]:
    """(slots, log-probabilities of the digits in them [n, 7], mean NLL of the prefill's tokens [n]), in nats.

    Each question is thought about, then the prefill is forced and read from the cache of the thinking. Where the
    thinking already wrote the prefill, its own slot is read.
    """
    close, prefill = lm.encode(instrument.think_close), lm.encode(instrument.prefill)
    boundary, digits = lm.encode(turn_boundary(lm, instrument)), digit_ids(lm)
    prompts = [_open_thought(lm, question, instrument.think_open, condition.system) for question in questions]
    suppress = lm.end_ids.union(close if len(close) == 1 else ())
    how = Decoding(think_tokens, batch_size, sample=False, suppress=suppress)
    rows = [Row(prompt, condition.dose) for prompt in prompts]
    slots = [Slot((), 0)] * len(rows)
    logp, nll = torch.full((len(rows), len(digits)), torch.nan), torch.full((len(rows),), torch.nan)
    own = []
    for i, thought, hidden in decode_then_read(lm, rows, condition.vector, how, boundary + prefill):
        forced, written = prompts[i] + thought + boundary, find_prefill(lm, thought, instrument.prefill)
        if written is None:
            slots[i] = Slot(forced + prefill, len(forced))
            logp[i], nll[i] = _read_slot(lm, hidden[-len(prefill) - 1 :], prefill, digits)
        else:
            start, end = written
            slots[i] = Slot(prompts[i] + thought[:end], len(prompts[i]) + start)
            own.append(i)
    logp[own], nll[own] = read_slots(lm, [slots[i] for i in own], digits, condition)
    return slots, logp, nll


def _open_thought(lm: LM, question: str, think_open: str, system: str) -> tuple[int, ...]:
    text = lm.chat_text(question, system)
    opened = text.rstrip().endswith("<think>")
    return lm.encode_prompt(text if opened else text + think_open)


_SENTINEL = "ANSWER-GOES-HERE"


def turn_boundary(lm: LM, instrument: Instrument) -> str:
    """What stands between the thinking and the prefill: the end of the thought and, with a nudge, of the turn,
    the user's nudge and a newly opened assistant turn, all as the chat template writes them."""
    if not instrument.nudge:
        return instrument.think_close
    user, assistant = {"role": "user", "content": "_"}, {"role": "assistant", "content": _SENTINEL}
    nudge = {"role": "user", "content": instrument.nudge}  # in one conversation: what opens it is not written again
    whole = lm.render([user, assistant, nudge, assistant], continue_final_message=True)
    return instrument.think_close + whole.split(_SENTINEL)[1]


def find_prefill(lm: LM, thought: Sequence[int], prefill: str) -> tuple[int, int] | None:
    """(start, end) token positions of the first prefill text in a thought that something follows, or None."""
    text = lm.decode(thought, special=True)
    begin = text.find(prefill)
    if begin < 0:
        return None
    start = end = None
    for t in range(len(thought)):
        length = len(lm.decode(thought[: t + 1], special=True))
        if start is None and length > begin:
            start = t
        if length >= begin + len(prefill):
            end = t + 1
            break
    return (start, end) if start is not None and end is not None and end < len(thought) else None


@torch.no_grad()
def read_slots(
    lm: LM, slots: Sequence[Slot], digits: Sequence[int], condition: Condition
) -> tuple[Float[Tensor, "n f"], Float[Tensor, " n"]]:
    """The log-probabilities and NLLs of `answer_slots`, by one forward pass over whole sequences, right-padded."""
    logp = torch.full((len(slots), len(digits)), torch.nan)
    nll = torch.full((len(slots),), torch.nan)

    def read(group: list[int]) -> None:
        with steer(lm, condition.vector, [condition.dose] * len(group)):
            hidden = lm.hidden([slots[i].ids for i in group])
        for row, i in enumerate(group):
            end, start = len(slots[i].ids), slots[i].prefill_start
            logp[i], nll[i] = _read_slot(lm, hidden[row, start - 1 : end], slots[i].ids[start:], digits)

    lm.in_batches([len(slot.ids) for slot in slots], read)
    return logp, nll


@torch.no_grad()
def _read_slot(
    lm: LM, hidden: Float[Tensor, "s d"], prefill: Sequence[int], digits: Sequence[int]
) -> tuple[Float[Tensor, " f"], Float[Tensor, ""]]:
    """(log-probabilities of the digits, mean NLL of the prefill) from the final states before and at the prefill."""
    logp = lm.logits(hidden[-1:]).log_softmax(-1)[0, list(digits)]
    return logp.cpu(), lm.nll(hidden[:-1], prefill).mean().cpu()


def items(subject: Subject) -> Items:
    """Per vignette, by the built-in reader or the one of moral-maps: see `read`."""
    cfg, inputs = subject.cfg, subject.inputs
    with subject.student.using(subject.adapters) as lm:
        if cfg.backend == "tinymfv":
            return tinymfv.read(lm, inputs.vignettes, subject.condition, cfg.think_tokens)
        how = (subject.condition, cfg.think_tokens, cfg.batch_size)
        return read(lm, inputs.vignettes, inputs.instrument, *how)


EVAL = Eval(
    items,
    (
        *(
            Metric(
                name=f"{name}_nats",
                item=f"p_{name}",
                how="log_mean",
                title=name,
                form="+.3f",
                unit="nats",
                moved=0.3,
                shown=False,
            )
            for name in FOUNDATIONS
        ),
        Metric(name="coherence", item="mass", title="coherence", form=".4f", good=0.95, broken=0.85),
        Metric(name="prefill_nll", item="prefill_nll", title="prefill NLL", form=".4f", unit="nats a token"),
        Metric(name="frac_unscorable", item="unscorable", title="unscorable vignettes", form=".0%", shown=False),
        Metric(name="top1_acc", item="top1", title="vignettes named right", form=".0%", shown=False),
    ),
    of="vignette",
)
