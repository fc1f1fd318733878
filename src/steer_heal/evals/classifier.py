"""A classifier of words reads the answers: does an answer look like one by the positive or by the negative persona?

The base writes the texts that it learns from, under either persona. Needs the extra `classifier` (scikit-learn).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from steer_heal.errors import UserError
from steer_heal.evals.base import Eval, Items, Subject
from steer_heal.inputs import Inputs
from steer_heal.model.decode import Decoding
from steer_heal.model.steering import Condition
from steer_heal.records import Metric, derive_seed
from steer_heal.stages.generate import Ask, generate

N_PROMPTS = 48
"""Prompts at most of its training texts. Both personas answer each of them."""
N_FOLDS = 6
AS_EMAIL = "Write your reply as an e-mail."
"""What the texts in another format are asked for."""


def check() -> None:
    """UserError unless scikit-learn is there."""
    if not find_spec("sklearn"):
        raise UserError(
            "eval.evals contains 'classifier': scikit-learn is not installed; pip install 'steer-heal[classifier]'"
        )


def answers(subject: Subject, prompts: Sequence[str], *, after: str = "") -> tuple[list[str], list[int]]:
    """(the base's answers to the prompts under the positive persona, then under the negative one; for each of them 1 or
    0). `after`: a paragraph after each prompt."""
    trait, cfg = subject.inputs.trait, subject.cfg
    asked = [f"{prompt}\n\n{after}" if after else prompt for prompt in prompts]
    asks = [Ask(i, text, derive_seed(subject.seed, "classifier", i)) for i, text in enumerate(asked)]
    how = Decoding(cfg.max_new_tokens, cfg.batch_size)
    texts: list[str] = []
    for persona in (trait.positive, trait.negative):
        key = hashlib.sha256(json.dumps(["classifier", subject.seed, how.max_new_tokens, persona, asked]).encode())
        if (place := key.hexdigest()) not in subject.cache:
            with subject.student.using("base") as lm:
                written = generate(lm, asks, Condition(persona), plain_system=trait.plain_system, how=how)
            subject.cache[place] = [each.text for each in written]
        texts += subject.cache[place]
    return texts, [1] * len(asks) + [0] * len(asks)


def classifier() -> Any:
    """Logistic regression on the TF-IDF of words, marks and pairs of them, untrained."""
    text, linear, pipeline = (
        import_module(f"sklearn.{name}") for name in ("feature_extraction.text", "linear_model", "pipeline")
    )
    words = text.TfidfVectorizer(token_pattern=r"\w+|[^\w\s]", ngram_range=(1, 2), sublinear_tf=True)
    return pipeline.make_pipeline(words, linear.LogisticRegression(C=10.0, max_iter=1000))


def items(subject: Subject) -> Items:
    """For each answer, the probability that it is by the positive persona. For the base also the share of texts by the
    two personas that the classifier tells apart, the same number for each answer: of texts to prompts that it did not
    train on, and of e-mails to those of the answers. Chance is 0.5. NaN: no value, as other states have no share."""
    asked, prompts = _prompts(subject.inputs)
    texts, sides = answers(subject, prompts)
    trained = classifier().fit(texts, sides)
    likely = trained.predict_proba([text.text for text in subject.texts])[:, 1]
    right = email = math.nan
    if subject.base is None and len(prompts) > 1:
        selection = import_module("sklearn.model_selection")
        folds = selection.GroupKFold(min(N_FOLDS, len(prompts)))
        guesses = selection.cross_val_predict(classifier(), texts, sides, cv=folds, groups=[*range(len(prompts))] * 2)
        right = float((guesses == sides).mean())
        emails, email_sides = answers(subject, asked, after=AS_EMAIL)
        email = float((trained.predict(emails) == email_sides).mean())
    n = len(likely)
    return {"classifier_trait": likely.tolist(), "classifier_right": [right] * n, "classifier_email": [email] * n}


def _prompts(inputs: Inputs) -> tuple[list[str], list[str]]:
    """(the prompts of the answers, the others that it learns from)."""
    asked = dict.fromkeys(inputs.eval_prompts)
    return list(asked), [prompt for prompt in inputs.trait.prompts if prompt not in asked][:N_PROMPTS]


EVAL = Eval(
    items,
    (
        Metric(
            name="classifier_trait",
            item="classifier_trait",
            title="classifier: trait",
            form=".2f",
            moved=0.05,
            towards_persona=True,
            reads_persona=True,
        ),
        Metric(name="classifier_right", item="classifier_right", title="classifier: right", form=".0%", shown=False),
        Metric(
            name="classifier_email",
            item="classifier_email",
            title="classifier: right on e-mails",
            form=".0%",
            shown=False,
        ),
    ),
    of="text",
    writes=lambda inputs: 2 * sum(map(len, _prompts(inputs))),
)
