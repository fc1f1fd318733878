"""Prompts and contrast pairs for a new trait, drafted by a model. A person edits them before they are used."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product, zip_longest
from typing import NamedTuple

from loguru import logger

from steer_heal.backends import endpoint
from steer_heal.errors import UserError
from steer_heal.inputs.alike import alike
from steer_heal.inputs.pairs import Pair
from steer_heal.inputs.traits import available, load_trait
from steer_heal.model.decode import Decoding, Row, decode
from steer_heal.model.lm import load
from steer_heal.model.steering import Condition, Contrast
from steer_heal.progress import SILENT, Progress
from steer_heal.records import derive_seed
from steer_heal.stages.words import ENDS, words

N_PROMPTS, N_PAIRS, FEWEST_PAIRS = 48, 44, 8
N_TRIES = 3
"""Replies of each persona to a prompt at most. The pair is the two of nearest lengths that have no fault together."""
TOPICS = ("work", "cooking", "a friend", "money", "a hobby", "health", "writing", "family", "travel", "a purchase")
ASK = (
    "One person answers everybody like this: {positive}\nAnother answers everybody like this: {negative}\n"
    "Write ten short messages about {topic} that somebody might send to either of them, and on which their answers "
    "would differ. Write one message on each line, and nothing else."
)
BRIEF = "Answer in two short sentences of about ten words each."
CONTRAST = 1.5
"""How many times the difference between the personas is added to the plain model while it answers as one of them. Small
models hardly tell two personas apart by their system prompt alone."""
MOST_SHARED = 0.7
"""Share of the words of the shorter of two messages that may also be in the other."""
COPIED = 5
"""Words in a row that a reply copies from its prompt."""
LONGEST_STAND_IN = 25
"""Words of a message that stands in for one that the model did not write."""


class Asked(NamedTuple):
    """A message, the persona that answers it, and the opposite persona."""

    message: str
    persona: str = ""
    opposite: str = ""

    @property
    def condition(self) -> Condition:
        """Who answers on this machine."""
        if not self.persona:
            return Condition()
        return Condition(BRIEF, contrast=Contrast(f"{self.persona} {BRIEF}", f"{self.opposite} {BRIEF}", CONTRAST))


Writer = Callable[[Sequence[Asked], int], list[str]]
"""(requests, maximum number of tokens) -> replies."""


def writer(name: str, endpoint_model: str = "", progress: Progress = SILENT, *, accept_terms: bool = False) -> Writer:
    """What writes with a model, `name` as for the setting `model`, or with the endpoint of that URL. UserError if there
    is none."""
    if name.startswith(("http://", "https://")):
        return _remote(name, endpoint_model, progress)
    lm = load(name, temperature=0.8, top_p=0.95, accept_terms=accept_terms)
    lm.progress = progress
    n_asked = 0

    def write(asked: Sequence[Asked], max_new_tokens: int) -> list[str]:
        nonlocal n_asked
        rows = []
        for message, condition in ((each.message, each.condition) for each in asked):
            seed = derive_seed(0, "draft", n_asked)
            rows.append(Row.under(condition, lambda system, text=message: lm.chat(text, system or None), seed))
            n_asked += 1
        return [lm.decode(ids).strip() for ids in decode(lm, rows, None, Decoding(max_new_tokens, 0))]

    return write


def _remote(url: str, model: str, progress: Progress) -> Writer:
    key = os.environ.get(endpoint.KEY)
    if not model:
        model, *_ = endpoint.models(url, key, timeout_s=30) or [""]

    def one(asked: Asked, max_new_tokens: int) -> str:
        messages = [{"role": "user", "content": asked.message}]
        if asked.persona:
            messages = [{"role": "system", "content": f"{asked.persona} {BRIEF}"}, *messages]
        body = {"model": model, "temperature": 0.8, "max_tokens": max_new_tokens, "messages": messages}
        return endpoint.ask(url, body, key, timeout_s=120).text.strip()

    def write(asked: Sequence[Asked], max_new_tokens: int) -> list[str]:
        replies = []
        with ThreadPoolExecutor(8) as pool:
            for reply in pool.map(lambda each: one(each, max_new_tokens), asked):
                replies.append(reply)
                progress.at(len(replies), len(asked))
        return replies

    return write


def draft(
    positive: str, negative: str, write: Writer, progress: Progress = SILENT
) -> tuple[list[str], list[Pair], str]:
    """(prompts, pairs, where they come from). No prompt of a pair is among the prompts. UserError if fewer than
    FEWEST_PAIRS pairs pass `fault`.

    Where the model writes too few messages, prompts of the bundled traits stand in.
    """
    logger.info("drafting prompts")
    asks = [Asked(ASK.format(positive=positive, negative=negative, topic=topic)) for topic in TOPICS * 2]
    with progress.stage("draft", None, "prompts"):
        drafted = unlike((line for reply in write(asks, 250) for line in _lines(reply)), (positive, negative))
    pool = _distinct([*drafted[: N_PROMPTS + 2 * N_PAIRS], *_stand_ins()])
    n_held = min(len(pool) - N_PROMPTS, 2 * N_PAIRS)
    held, prompts = pool[:n_held], pool[n_held : n_held + N_PROMPTS]
    if len(drafted) > N_PROMPTS:  # both lists get their share of what was drafted
        prompts, held = pool[:N_PROMPTS], pool[N_PROMPTS : N_PROMPTS + n_held]
    logger.info(f"the model wrote {len(drafted)} messages; drafting pairs on {len(held)} others than the prompts")
    with progress.stage("draft", None, "pairs"):
        pairs, faults = _pairs(positive, negative, held, write)
    if len(pairs) < FEWEST_PAIRS:
        raise UserError(
            f"draft_with: of the pairs that the model wrote, {len(pairs)} pass the checks, which is fewer than "
            f"{FEWEST_PAIRS} (first fault: {next(iter(faults), 'none')}); give a larger model, or leave out "
            "--draft-with and write the pairs"
        )
    pairs = pairs[:N_PAIRS]
    own = {*map(alike, drafted)}
    n_own = sum(alike(text) in own for text in prompts)
    note = (
        f"Drafted by a model: {n_own} of the {len(prompts)} prompts (the others are prompts of the bundled traits) "
        f"and all {len(pairs)} pairs. Read each one, and change what is wrong."
    )
    return prompts, pairs, note


def _stand_ins() -> Iterator[str]:
    """Short prompts of the bundled traits, which are about what people think, feel and want. Those of each trait are
    spread over the whole."""
    of_traits = [load_trait(name).prompts for name in available()]
    for row in zip_longest(*of_traits, fillvalue=""):
        yield from (text for text in row if 0 < len(text.split()) <= LONGEST_STAND_IN)


def _pairs(positive: str, negative: str, prompts: Sequence[str], write: Writer) -> tuple[list[Pair], list[str]]:
    """(pairs without a fault, faults of the prompts that have none). Prompts without a pair are answered again, unless
    there are pairs enough."""
    sides = ((positive, negative), (negative, positive))
    replies: dict[str, tuple[list[str], list[str]]] = {prompt: ([], []) for prompt in prompts}
    pairs: dict[str, Pair] = {}
    faults: dict[str, str] = {}
    for _ in range(N_TRIES):
        todo = [prompt for prompt in prompts if prompt not in pairs]
        written = iter(write([Asked(prompt, *side) for prompt in todo for side in sides], 64))
        for prompt in todo:
            for own in replies[prompt]:
                own.append(" ".join(next(written).split()))
            both = sorted(product(*replies[prompt]), key=lambda each: abs(len(each[0]) - len(each[1])))
            found = [fault(prompt, *each) for each in both]
            faults[prompt] = found[0]
            if "" in found:
                pairs[prompt] = Pair(prompt, *both[found.index("")])
        if len(pairs) >= min(N_PAIRS, len(prompts)):
            break
    return [pairs[prompt] for prompt in prompts if prompt in pairs], [
        faults[prompt] for prompt in prompts if prompt not in pairs
    ]


def fault(prompt: str, positive: str, negative: str) -> str:
    """What is wrong with a drafted pair. Empty: nothing that a program sees."""
    sides = (positive.strip(), negative.strip())
    counts = [len(words(side)) for side in sides]
    if min(counts) < 4:
        return "a side does not answer"
    if not all(re.search(f"[{ENDS}][\"'\u201d\u2019)]*$", side) for side in sides):
        return "a side breaks off"
    if max(counts) > 1.4 * min(counts):
        return "the lengths differ"
    shared = [{*re.findall(r"\w+", side.lower())} for side in sides]
    if len(shared[0] & shared[1]) > MOST_SHARED * min(map(len, shared)):
        return "the sides hardly differ"
    asked = re.findall(r"\w+", prompt.lower())
    runs = [" ".join(asked[i : i + COPIED]) for i in range(len(asked) - COPIED + 1)]
    copies = [any(run in " ".join(re.findall(r"\w+", side.lower())) for run in runs) for side in sides]
    return "one side alone copies the prompt" if copies[0] != copies[1] else ""


def _lines(reply: str) -> Iterator[str]:
    """The whole messages in a list that a model wrote, without numbers, bullets and quotes. Headings and personas are
    left out."""
    for line in reply.splitlines():
        text = re.sub(r"^\s*(?:\d+[.):]|[-*\u2022])\s*", "", line).strip().strip("\"'\u201c\u201d").strip()
        is_message = not text.startswith("You are ") and "**" not in text
        if is_message and 3 <= len(words(text)) <= 40 and text.endswith(tuple(ENDS)):
            yield text


def unlike(texts: Iterator[str], known: Sequence[str]) -> list[str]:
    """The texts that share at most MOST_SHARED of their words with each earlier one, and with each of `known`: small
    models repeat themselves, and the personas that they are given."""
    kept: list[str] = []
    words = [{*re.findall(r"\w+", text.lower())} for text in known]
    for text in texts:
        own = {*re.findall(r"\w+", text.lower())}
        if all(len(own & other) <= MOST_SHARED * min(len(own), len(other)) for other in words):
            kept.append(text)
            words.append(own)
    return kept


def _distinct(texts: Iterable[str]) -> list[str]:
    """The texts without those that are alike an earlier one."""
    return list({alike(text): text for text in reversed(list(texts))}.values())[::-1]
