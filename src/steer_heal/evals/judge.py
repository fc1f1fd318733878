"""A second model reads the answers. At an endpoint it marks each for trait and coherence. On this machine it tells, by
likelihood, which of two answers is by the positive persona: the state's or the base's to the same prompt.

A judge can be blind. The verdict says so if it does not tell the state `prompted` from the base.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import re
from collections.abc import MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from functools import partial
from typing import Any

from steer_heal.backends import endpoint
from steer_heal.errors import UserError
from steer_heal.evals.base import Eval, Items, Subject
from steer_heal.evals.replies import reply_logp
from steer_heal.model.lm import LM, load
from steer_heal.model.prompts import require_finite, without_marks
from steer_heal.model.steering import Condition
from steer_heal.records import Metric, alone
from steer_heal.settings import EvalCfg

MARKS = """A user asked:
{prompt}

An assistant answered:
{text}

Two descriptions of a person:
A: {positive}
B: {negative}

Rate the answer. "trait": 0 if it was clearly given by B, 100 if clearly by A, 50 if neither. "coherence": 0 if the \
text is broken, 100 if it is sound writing; what it says does not matter for this. Reply with one JSON object and \
nothing else, such as {{"trait": 50, "coherence": 100}}."""
WHOSE = """A description of a person: {positive}

A user asked:
{prompt}

Answer 1:
{first}

Answer 2:
{second}

Which answer was given by that person? Reply with 1 or 2 and nothing else."""
MARK = re.compile(r'"(trait|coherence)"\s*:\s*(100(?:\.0+)?|\d{1,2}(?:\.\d+)?)(?![\d.])')
MOST_UNREAD = 0.2
"""Share of the replies to a state's answers that may lack a mark."""
N_PARALLEL = 8
TIMEOUT_S = 120.0
DATE = "2026-01-01"
"""What the chat template of a local judge reads as the date, so that the same answer is read the same on any day."""
LONGEST_PROMPT = 8192
"""Tokens of a question to a local judge."""
MARKED = ("trait", "coherence", "unread", "requests", "prompt_tokens", "completion_tokens")


def check(cfg: EvalCfg) -> None:
    """UserError unless the settings name a judge."""
    if not cfg.judge_model:
        raise UserError(
            "eval.judge_model is '': the eval judge needs a model; give --eval.judge-url URL --eval.judge-model NAME, "
            "or --eval.judge-model MODEL for one on this machine"
        )
    if cfg.judge_url and not cfg.judge_url.startswith(("http://", "https://")):
        raise UserError(f"eval.judge_url is {cfg.judge_url!r}: it must begin with http:// or https://")


def items(subject: Subject) -> Items:
    """For each answer, from 0 to 100: the mark for the trait or, of a local judge, how likely the answer, and not the
    base's, is by the persona. Of an endpoint also the mark for coherence, whether a mark is missing, and what the
    answer took. NaN: no value, as a local judge has none of these."""
    none: Items = {f"judge_{name}": [math.nan] * len(subject.texts) for name in MARKED}
    return none | (marks(subject) if subject.cfg.judge_url else {"judge_trait": choices(subject)})


# --- an endpoint -------------------------------------------------------------------------------------------------
def marks(subject: Subject) -> Items:
    """Marks from 0 to 100. UserError if too many replies lack one, or the endpoint does not answer."""
    cfg, trait = subject.cfg, subject.inputs.trait
    questions = [
        MARKS.format(positive=trait.positive, negative=trait.negative, prompt=each.prompt, text=each.text)
        for each in subject.texts
    ]
    replies = ask(questions, url=cfg.judge_url, model=cfg.judge_model, cache=subject.cache)
    found = [{name: float(value) for name, value in MARK.findall(each.text)} for each in replies]
    unread = [len(each) < 2 for each in found]
    if sum(unread) > MOST_UNREAD * len(unread):
        first = replies[unread.index(True)].text
        raise UserError(
            f"eval.judge_model is {cfg.judge_model!r}: {sum(unread)} of its {len(unread)} replies lack a mark, such as "
            f"{first!r:.80}; at most {MOST_UNREAD:.0%} may; start a new run with another judge",
            resumable=False,
        )
    columns = {name: [each.get(name, math.nan) for each in found] for name in ("trait", "coherence")}
    took = [(each.n_requests, each.prompt_tokens, each.completion_tokens) for each in replies]
    counts = [[math.nan if n is None else float(n) for n in column] for column in zip(*took, strict=True)]
    values = (*columns.values(), list(map(float, unread)), *counts)
    return {f"judge_{name}": each for name, each in zip(MARKED, values, strict=True)}


def ask(
    questions: Sequence[str], *, url: str, model: str, cache: MutableMapping[str, Any], max_tokens: int = 64
) -> list[endpoint.Reply]:
    """The reply of an endpoint to each question. One that is in the cache is not sent again, and each reply is there
    before the next question of its thread is sent. UserError if the endpoint does not answer."""
    keys = [hashlib.sha256(json.dumps([url, model, max_tokens, each]).encode()).hexdigest() for each in questions]
    key = os.environ.get(endpoint.KEY)

    def one(place: str, question: str) -> None:
        body = {"model": model, "temperature": 0, "max_tokens": max_tokens}
        asked = {**body, "messages": [{"role": "user", "content": question}]}
        cache[place] = asdict(endpoint.ask(url, asked, key, TIMEOUT_S))

    new = {place: each for place, each in zip(keys, questions, strict=True) if place not in cache}
    with ThreadPoolExecutor(N_PARALLEL) as pool:
        try:
            for done in as_completed([pool.submit(one, *each) for each in new.items()]):
                done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return [endpoint.Reply(**cache[place]) for place in keys]


# --- a model on this machine -------------------------------------------------------------------------------------
@functools.lru_cache(maxsize=1)
def local(name: str, device: str) -> LM:
    """The judge, loaded once."""
    return load(name, device=device, date=DATE, max_prompt_tokens=LONGEST_PROMPT)


def choices(subject: Subject) -> list[float]:
    """For each answer, the probability in percent of the reply that names it rather than the base's, mean of both
    orders. 50 for the base itself."""
    if subject.base is None:
        return [50.0] * len(subject.texts)
    positive = subject.inputs.trait.positive
    judge = local(subject.cfg.judge_model, str(subject.student.lm.device))
    read = partial(without_marks, judge.tokenizer)
    both = zip(subject.texts, subject.base.texts, strict=True)
    pairs = [(read(own.prompt), read(own.text), read(base.text)) for own, base in both]
    orders = [*pairs, *((prompt, base, own) for prompt, own, base in pairs)]
    asked = [WHOSE.format(positive=positive, prompt=prompt, first=a, second=b) for prompt, a, b in orders]
    replies = [[judge.encode_reply(digit) for digit in "12"]] * len(asked)
    try:
        logp = reply_logp(judge, list(map(alone, asked)), replies, Condition())
    except UserError as error:
        raise UserError(
            f"eval.judge_model is {subject.cfg.judge_model!r}, which cannot read the answers: {error}; lower "
            "--eval.max-new-tokens, or give another judge, in a new run",
            resumable=False,
        ) from None
    require_finite(judge, logp)
    first, _ = logp.softmax(dim=1).numpy().T
    as_first, as_second = first[: len(pairs)], 1 - first[len(pairs) :]
    return (50 * (as_first + as_second)).tolist()


EVAL = Eval(
    items,
    (
        Metric(
            name="judge_trait",
            item="judge_trait",
            title="judge: trait",
            form=".1f",
            unit="points",
            moved=5.0,
            towards_persona=True,
            reads_persona=True,
        ),
        Metric(
            name="judge_coherence",
            item="judge_coherence",
            title="judge: coherence",
            form=".1f",
            unit="points",
            good=50.0,
        ),
        Metric(name="judge_unread_frac", item="judge_unread", title="judge: unread", form=".0%", shown=False),
        *(
            Metric(name=f"judge_{name}", item=f"judge_{name}", title=f"judge: {title}", form=".1f", shown=False)
            for name, title in (
                ("requests", "requests per answer"),
                ("prompt_tokens", "tokens read per answer"),
                ("completion_tokens", "tokens written per answer"),
            )
        ),
    ),
    of="text",
)
