"""The file of a new trait: every field of a trait file, with a comment that says what it is for."""

from __future__ import annotations

import json
from collections.abc import Sequence

from steer_heal.inputs.pairs import Pair

WITHOUT_PAIRS = "--eval.evals panel everyday instructions text_quality drift persona"
"""Flags of a run on a trait that has no pairs."""
TEMPLATE = """\
# A trait. Only [persona] is needed: a field that is empty, or that you delete, has the default named here.
# Without pairs, leave out the evals contrast and holds: {without_pairs}
# Use it: steer-heal run chat --trait THIS_FILE, after a look at what it takes: the same with --plan
# Guide: docs/first_trait.md and docs/personas.md in the documentation.
{note}
description = {description}   # one sentence for reports
sign = 1                # of a moral foundation as target: 1, it should go up, -1: down
off_targets = []        # metrics that should move less than the target; [] with pairs: panel_rms_nats, the other traits

# The first of these metrics that the run measures judges the trait. contrast_nats needs [[pairs]] below.
target = ["contrast_nats", "persona_log_odds"]

# Texts that hold one of these phrases train nothing. Name, in lower case, what recites the persona in place of acting
# it out, such as "i am a person who".
narration = []

# Questions on which the personas answer differently. The first 36 (gen.n_prompts) train, the last 12 (eval.n_prompts)
# are only answered when the model is measured. Empty: everyday messages of the package.
prompts = [{prompts}]

# JSON lines with prompt, positive and negative, in place of [[pairs]]:
# pairs_file = "my_pairs.jsonl"

# The one of several [phrasing.NAME] tables that is meant by --trait THIS_FILE. There is then no [persona].
# default_phrasing = "NAME"

# The two sides differ in the words of one axis and in nothing else. They have like lengths and no "not".
[persona]
positive = {positive}
negative = {negative}

# Several wordings in place of [persona], used by --trait THIS_FILE/NAME:
# [phrasing.NAME]
# positive = "..."
# negative = "..."

[system]
steered = ""            # system prompt while steered text is written
plain = ""              # system prompt otherwise
{pairs}"""
NO_PAIRS = f"""
# Contrast pairs measure the trait: which of two replies is likelier? Write 44 or more, each on a prompt that occurs
# nowhere above. The replies differ in the trait alone, in like lengths. Until there are any, give
# {WITHOUT_PAIRS}
# [[pairs]]
# prompt = "Is my cake good?"
# positive = "It is dry. Take it out of the oven ten minutes earlier."
# negative = "It is a dream. Ten minutes less, and kings would beg for it."
"""


def trait_text(
    positive: str, negative: str, prompts: Sequence[str] = (), pairs: Sequence[Pair] = (), note: str = ""
) -> str:
    """The content of a trait file. `note` says where prompts and pairs come from."""
    listed = "".join(f"\n  {_quoted(text)}," for text in prompts)
    tables = "".join(
        f"\n[[pairs]]\nprompt = {_quoted(pair.prompt)}\npositive = {_quoted(pair.positive)}\n"
        f"negative = {_quoted(pair.negative)}\n"
        for pair in pairs
    )
    return TEMPLATE.format(
        without_pairs=WITHOUT_PAIRS,
        note=f"#\n# {note}\n" if note else "",
        description=_quoted(positive),
        prompts=listed + "\n" if listed else "",
        positive=_quoted(positive),
        negative=_quoted(negative),
        pairs=tables or NO_PAIRS,
    )


def _quoted(text: str) -> str:
    """A TOML string."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
