"""Moral-foundation vignettes: the likelihood of seven answers, which are whole sentences, as the model's reply."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from jaxtyping import Float
from torch import Tensor

from steer_heal.evals.base import Eval, Items, Subject, log_probability
from steer_heal.evals.replies import reply_logp
from steer_heal.inputs.instruments import FOUNDATIONS, LikelihoodInstrument, Vignette
from steer_heal.model.lm import LM
from steer_heal.model.prompts import require_finite
from steer_heal.model.steering import Condition
from steer_heal.records import Metric, alone

LOGP = "logp_"
"""Prefix of the items with the log-likelihood of a foundation."""
P = "p_likelihood_"
"""Prefix of the items with its calibrated probability."""


def ask(
    lm: LM, vignettes: Sequence[Vignette], instrument: LikelihoodInstrument, condition: Condition
) -> Float[Tensor, "i f"]:
    """For each vignette, the mean of log p over the wordings of each of the seven answers, in nats, not calibrated."""
    asked = [alone(instrument.question(vignette.text)) for vignette in vignettes]
    replies = [[lm.encode_reply(text) for text in instrument.answers[name]] for name in FOUNDATIONS]
    logp = reply_logp(lm, asked, [list(chain.from_iterable(replies))] * len(asked), condition)
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
            log_probability(name=f"{name}_likelihood_nats", item=P + name, title=f"{name} (likelihood)")
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
