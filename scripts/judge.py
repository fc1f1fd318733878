"""What does a judge say? Any OpenAI-compatible endpoint rates a run's unsteered answers for trait and coherence.

Nothing else in the project needs a judge. The texts leave this machine for --url.
"""

import os
import re
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import tyro
from common import cli

from steer_heal.backends.endpoint import KEY, reply
from steer_heal.diag.lab import show
from steer_heal.events import Measured, Run
from steer_heal.records import Answer
from steer_heal.runs.stored import FolderRun

QUESTION = """A user asked:
{prompt}

An assistant answered:
{text}

Two descriptions of a person:
A: {positive}
B: {negative}

Rate the answer. "trait": 1 if it was clearly given by B, 5 if clearly by A, 3 if neither. "coherent": 1 if the text \
is broken, 5 if it is sound writing; what it says does not matter for this. Reply with one JSON object and nothing \
else, such as {{"trait": 3, "coherent": 5}}."""
MARK = re.compile(r'"(trait|coherent)"\s*:\s*([1-5](?:\.\d+)?)(?![\d.])')


def ask(url: str, model: str, key: str | None, prompt: str, timeout_s: float) -> dict[str, float]:
    """The marks in the endpoint's reply; those it did not give are missing. UserError where there is no answer."""
    messages = [{"role": "user", "content": prompt}]
    content = reply(url, {"model": model, "temperature": 0, "max_tokens": 64, "messages": messages}, key, timeout_s)
    return {name: float(value) for name, value in MARK.findall(content)}


def answers(run: Run, per_state: int) -> dict[str, tuple[Answer, ...]]:
    """Unsteered free-text answers by state, to the same prompts in each: base, prompted, control, healed round 0."""
    return {state.label: state.texts[:per_state] for state in run.each(Measured) if state.state != "steered"}


def main(
    run: Annotated[Path, tyro.conf.Positional],
    url: str,
    model: str,
    per_state: int = 16,
    api_key_env: str = KEY,
    n_parallel: int = 8,
    timeout_s: float = 120.0,
    out: Path = Path("out/diag"),
) -> None:
    opened = FolderRun.read(run)
    trait = opened.start.trait
    key = os.environ.get(api_key_env)

    def ask_one(answer: Answer) -> dict[str, float]:
        personas = {"positive": trait.positive, "negative": trait.negative}
        return ask(url, model, key, QUESTION.format(**personas, prompt=answer.prompt, text=answer.text), timeout_s)

    with ThreadPoolExecutor(n_parallel) as pool:
        marks = {state: list(pool.map(ask_one, texts)) for state, texts in answers(opened, per_state).items()}
    rows = []
    for state, given in marks.items():
        values = {name: [mark[name] for mark in given if name in mark] for name in ("trait", "coherent")}
        row = {"state": state, **{name: statistics.mean(v) if v else None for name, v in values.items()}}
        rows.append(row | {"n": len(given), "unread": sum(mark.keys() != {"trait", "coherent"} for mark in given)})
    should = (
        "trait rise from base over the healed rounds towards prompted; 5 is the positive persona, 3 neither.",
        "coherent stay near the base's; unread (replies without both marks) be 0, else the judge is too weak "
        "for the form.",
    )
    show(__doc__, rows, should, out, "judge", run=run.name, url=url, model=model, marks=marks)


if __name__ == "__main__":
    sys.exit(cli(main))
