"""Moral-foundation vignettes: the likelihood of seven answers, which are whole sentences, as the model's reply."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from jaxtyping import Float
from torch import Tensor

from steer_heal.evals.base import Eval, Items, Subject
from steer_heal.inputs.instruments import FOUNDATIONS, LikelihoodInstrument, Vignette
from steer_heal.model.decode import GrowingCache
from steer_heal.model.lm import LM
from steer_heal.model.prompts import require_finite
from steer_heal.model.steering import Condition, steer
from steer_heal.records import Metric

LOGP = "logp_"
"""Prefix of the items with the log-likelihood of a foundation."""
P = "p_likelihood_"
"""Prefix of the items with its calibrated probability."""


@torch.no_grad()
def reply_logp(
    lm: LM, prompts: Sequence[Sequence[int]], replies: Sequence[Sequence[int]], condition: Condition
) -> Float[Tensor, "i w"]:
    """log p of each of w replies (the sum over its tokens) after each of i prompts, in nats.

    The model runs over each prompt once. The replies continue from its cache, each as a row.
    """
    return own_reply_logp(lm, prompts, [replies] * len(prompts), condition)


@torch.no_grad()
def own_reply_logp(
    lm: LM, prompts: Sequence[Sequence[int]], replies: Sequence[Sequence[Sequence[int]]], condition: Condition
) -> Float[Tensor, "i w"]:
    """As `reply_logp`, for prompts that each have w replies of their own."""
    n = max(map(len, replies), default=0)
    longest = [max(map(len, own)) for own in replies]
    out = torch.full((len(prompts), n), torch.nan, dtype=torch.float64)

    def work(group: list[int]) -> None:
        rows = torch.arange(len(group), device=lm.device).repeat_interleave(n)
        every, real = lm.pad([reply for i in group for reply in replies[i]])
        cache = GrowingCache(lm, max(len(prompts[i]) for i in group) + every.shape[1] - 1)
        with steer(lm, condition.vector, [condition.dose] * len(group)) as steering:
            last = cache.feed(*lm.pad([prompts[i] for i in group], "left"))[:, -1]
            cache.select(rows)
            steering.select(rows)
            before = last[rows, None]
            if every.shape[1] > 1:
                before = torch.cat([before, cache.feed(every[:, :-1], real[:, :-1])], dim=1)
        logp = torch.zeros(every.shape, dtype=torch.float64)
        logp[real.bool().cpu()] = -lm.nll(before[real.bool()], every[real.bool()].tolist()).double().cpu()
        out[group] = logp.sum(-1).view(len(group), n)

    lm.in_batches([n * (len(prompt) + room) for prompt, room in zip(prompts, longest, strict=True)], work)
    return out


def ask(
    lm: LM, vignettes: Sequence[Vignette], instrument: LikelihoodInstrument, condition: Condition
) -> Float[Tensor, "i f"]:
    """For each vignette, the mean of log p over the wordings of each of the seven answers, in nats, not calibrated."""
    prompts = [lm.chat(instrument.question(vignette.text), condition.system) for vignette in vignettes]
    replies = [[lm.encode_reply(text) for text in instrument.answers[name]] for name in FOUNDATIONS]
    logp = reply_logp(lm, prompts, list(chain.from_iterable(replies)), condition)
    if not condition.dose:
        require_finite(lm, logp)
    by_answer = logp.split([len(wordings) for wordings in replies], dim=1)
    return torch.stack([part.mean(1) for part in by_answer], dim=1)


def calibration(subject: Subject, logp: Float[Tensor, "i f"]) -> Float[Tensor, " f"]:
    """The mean of log p of each answer over the vignettes under the plain base model, up to a constant that the seven
    share.

    Calibrating with another state would subtract the shift of the trait. `logp` are the values of this state, which
    are used if it is the plain base model itself. If base items are given, the calibration follows from them for any
    system prompt, because log p_likelihood = logp - calibration - a constant of the vignette.
    """
    if subject.base is not None:
        logp_base, p_base = (_by_foundation(subject.base.items, prefix) for prefix in (LOGP, P))
        return (logp_base - p_base.log()).nanmean(0)
    plain = Condition(subject.inputs.trait.plain_system)
    if (subject.state.adapters, subject.state.condition) != ("base", plain):
        with subject.student.using("base") as lm:
            logp = ask(lm, subject.inputs.vignettes, subject.inputs.likelihood, plain)
    return logp.nanmean(0)


def _by_foundation(items: Items, prefix: str) -> Float[Tensor, "i f"]:
    return torch.tensor([items[prefix + name] for name in FOUNDATIONS], dtype=torch.float64).T


def items(subject: Subject) -> Items:
    """For each vignette: logp_<foundation> (nats, not calibrated), p_likelihood_<foundation>, likelihood_top1 and
    answers_logp (nats). NaN if the model returns NaN."""
    vignettes = subject.inputs.vignettes
    with subject.student.using(subject.state.adapters) as lm:
        logp = ask(lm, vignettes, subject.inputs.likelihood, subject.state.condition)
    p = (logp - calibration(subject, logp)).softmax(-1)
    right = [FOUNDATIONS[k] in (v.foundation, v.also) for v, k in zip(vignettes, p.argmax(-1).tolist(), strict=True)]
    return {
        **{LOGP + name: logp[:, k].tolist() for k, name in enumerate(FOUNDATIONS)},
        **{P + name: p[:, k].tolist() for k, name in enumerate(FOUNDATIONS)},
        "likelihood_top1": torch.where(p.isfinite().all(-1), torch.tensor(right).double(), torch.nan).tolist(),
        "answers_logp": logp.mean(1).tolist(),
    }


EVAL = Eval(
    items,
    (
        *(
            Metric(
                name=f"{name}_likelihood_nats",
                item=P + name,
                how="log_mean",
                title=f"{name} (likelihood)",
                form="+.3f",
                unit="nats",
                moved=0.3,
                shown=False,
            )
            for name in FOUNDATIONS
        ),
        Metric(name="answers_nats", item="answers_logp", title="all answers", form="+.2f", unit="nats"),
        Metric(
            name="likelihood_top1_acc",
            item="likelihood_top1",
            title="named right (likelihood)",
            form=".0%",
            shown=False,
        ),
    ),
    of="vignette",
)
