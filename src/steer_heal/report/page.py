"""events.jsonl -> report.html and diary.md, on one page and as prose: `python -m steer_heal.report out/<run>`."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import shlex
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import tyro
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup
from matplotlib.figure import Figure

from steer_heal import plot
from steer_heal.events import of_stage, read_events, redraw
from steer_heal.readings import MEASURED, nats_name, readings, shift, table, target_of, verdict
from steer_heal.terminal import printable

Event = dict[str, Any]
SHOWN_PROMPTS, SHOWN_ANSWERS, SHOWN_BORDERLINE, SHOWN_CHARACTERS = 64, 64, 3, 1500
"""Evaluation prompts; answers per state; rows on each side of each cut; characters of any one text."""
BEFORE = ("base", "prompted", "control")
COLUMNS = {
    "shift": ("shift, nats", "+.2f"), "interval": ("95 % of the shift", ""), "retain": ("retain", ".0%"), "slope": ("slope", "+.2f"),
    "coherence": ("coherence", ".4f"), "prefill_nll": ("prefill, nats", ".4f"), "text_ppl": ("text perplexity", ".2f"),
    "degenerate": ("degenerate", ".0%"), "oracle": ("possible sentences", ".1%"), "dose": ("dose", ".3g"),
    "cosine_to_first": ("cosine to round 0", "+.2f"), "cosine_student_teacher": ("cosine student, teacher", "+.2f"),
    "cosine_student_first": ("cosine student, round 0", "+.2f"), "kl_base": ("KL to base", ".3f"), "log_odds": ("persona log-odds", "+.3f"),
}
"""Heading and format of a column; one that is not listed shows its own name and three digits."""
CUTS = {
    "perplexity": ("tail perplexity", "ppl_tail", "ppl_max"), "spike": ("perplexity of the worst 12 tokens", "ppl_worst", "spike_max"),
    "repetition": ("repetition", "rep", "rep_max"), "loop": ("loop", "loop", "loop_max"),
}
"""Gate: what it measures in words, the score, the setting that is its limit."""


def report(folder: Path) -> Path | None:
    """Writes report.html and diary.md from the events alone; None where the run did not start yet."""
    events = read_events(folder)
    if not any(e["stage"] == "run_start" for e in events):
        return None
    run = Run(folder.name, events)
    for name, text in (("diary.md", diary(run)), ("report.html", page(run))):
        beside = folder / f".{name}.tmp"
        beside.write_text(text, encoding="utf-8", newline="\n")
        beside.replace(folder / name)
    return folder / "report.html"


@dataclass(frozen=True)
class Run:
    """The events of a run, looked up by stage and round; where a resumed run wrote one twice, the last counts."""

    name: str
    events: Sequence[Event]

    def at(self, stage: str, round_: int | None = -1) -> Event:
        """The event, empty where it was not written yet."""
        return next((e for e in reversed(self.events) if e["stage"] == stage and e["round"] == round_), {})

    @property
    def start(self) -> Event:
        return self.at("run_start", None)

    @property
    def rounds(self) -> list[int]:
        return sorted({e["round"] for e in self.events if e["round"] is not None and e["round"] >= 0})

    def texts(self, stage: str, round_: int) -> Sequence[Event]:
        return self.at("adapter_gen" if stage == "healed" else stage, round_).get("texts") or ()


def visible(text: str) -> str:
    """Text that is safe to show: what does not print becomes U+FFFD, and a long one is cut with a word on how much is missing."""
    text, limit = printable(text), SHOWN_CHARACTERS
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text) - limit:,} characters more)"


def number(value: float | None, form: str = ".3g") -> str:
    return "\u2013" if value is None else format(value, form).replace("-", "\u2212")


def plural(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def inline(text: str) -> Markup:
    """Text that stays inside a line of Markdown: no mark-up, no HTML, no line break."""
    return Markup(re.sub(r"([\\`*_\[\]<>&#|~$])", r"\\\1", " ".join(visible(text).split())))


def fenced(text: str) -> Markup:
    """A block of Markdown that the text cannot end: its fence is longer than any run of backticks in it."""
    text = visible(text)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    lines = [part for line in text.split("\n") for part in textwrap.wrap(line, 100) or [""]]
    return Markup("\n".join([f"{fence}text", *lines, fence]))


def _template(name: str, show: Callable[[str], str]) -> Template:
    """A template beside this file; every string that it prints passes `show`, and is escaped where that did not."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        finalize=lambda value: show(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )
    environment.filters |= {"number": number, "fenced": fenced}
    environment.globals |= {"plural": plural}
    return environment.get_template(name)


def page(run: Run) -> str:
    """The whole of report.html."""
    grade, _, detail = verdict(run.events).partition(":")
    return _template("report.html.j2", visible).render(
        run=run, start=run.start, grade=grade, detail=detail.strip(), progress=progress(run), figures=figures(run), pictures=pictures(run),
        table=round_table(run), answers=answers(run), filters=list(filters(run)), heals=list(plot.heal_curves(run.events)),
        retries=of_stage(run.events, "heal_retry"), command=shlex.join(run.start.get("command") or ()),
    )


def diary(run: Run) -> str:
    """The whole of diary.md: the run told by its answers to the first evaluation prompt."""
    return _template("diary.md.j2", inline).render(
        run=run, start=run.start, verdict=verdict(run.events), progress=progress(run), headline=next(iter(answers(run)["prompts"]), None),
        rows={row["state"]: row for row in table(run.events)}, metric=nats_name(target_of(run.events)[0]), retries=of_stage(run.events, "heal_retry"),
    )


def progress(run: Run) -> tuple[str, str]:
    """(finished, stopped or running, a sentence about it)."""
    last, n_rounds = run.events[-1], len([e for e in run.events if e["stage"] == "round"])
    done = f"{n_rounds} of {plural(run.start['config']['n_rounds'], 'round')}, {last['wall_s'] / 60:.1f} minutes"
    if last["stage"] != "run_end":
        where = "" if last["round"] is None or last["round"] < 0 else f" of round {last['round']}"
        return "running", f"{done}; no end is written yet, the last event is {last['stage']}{where} at {last['t'][:19].replace('T', ' ')} UTC"
    return ("stopped", f"{done}; {last['error']}") if last.get("error") else ("finished", done)


def figures(run: Run) -> list[tuple[str, str, str]]:
    """(what, value, the baselines it stands against) of the last healed student."""
    reads = readings(run.events)
    healed = next((r for r in reversed(reads) if r.stage == "healed"), None)
    base = next((r for r in reads if r.stage == "base"), None)
    if healed is None or base is None:
        return []
    metric = nats_name(target_of(run.events)[0])
    beside = {r.stage: r for r in reads if r.round in (-1, healed.round)}
    against = lambda name, form: ", ".join(f"{stage} {number(r[name], form)}" for stage, r in beside.items() if stage != "healed")
    shifts = ", ".join(f"{stage} {number(shift(r, base, metric), '+.2f')}" for stage, r in beside.items() if stage not in ("base", "healed"))
    interval = f"95 % {number(healed[f'{metric}_lo'], '+.2f')} to {number(healed[f'{metric}_hi'], '+.2f')}"
    return [
        (f"{metric} against base", number(shift(healed, base, metric), "+.2f"), f"{interval}; {shifts}"),
        ("coherence", number(healed["coherence"], ".3f"), against("coherence", ".3f")),
        ("degenerate texts", number(healed["degenerate_frac"], ".0%"), against("degenerate_frac", ".0%")),
        ("text perplexity", number(healed["text_ppl_median"], ".2f"), against("text_ppl_median", ".2f")),
    ]


def pictures(run: Run) -> list[tuple[str, Markup]]:
    """(description, data URI) of the pictures that need a measured base."""
    seen = [e | {"items": None, "texts": None} for e in run.events if e["stage"] in ("run_start", *MEASURED)]
    return _pictures(json.dumps(seen)) if plot.measured(run.events) else []


@lru_cache(maxsize=1)
def _pictures(events: str) -> list[tuple[str, Markup]]:
    """Drawn from the measured states alone, and kept until the next one: a run writes its page far more often."""
    run = json.loads(events)
    return [
        ("The trait and the incoherence, round by round; the table below holds the numbers", _data_uri(plot.rounds(run))),
        ("Shift of the target foundation against the other foundation that moved most", _data_uri(plot.map_(run, headline=False))),
    ]


def _data_uri(figure: Figure) -> Markup:
    buffer = io.BytesIO()
    with plt.rc_context(plot.STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    plt.close(figure)
    return Markup("data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode())


def round_table(run: Run) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """(headings, (stage, cells) of each measured state): the table of the readings, and dose and cosines of the rounds."""
    rows = []
    for row, read in zip(table(run.events), readings(run.events), strict=True):
        low, high = row.pop("lo", None), row.pop("hi", None)
        row["interval"] = None if low is None or high is None else f"{number(low, '+.2f')} to {number(high, '+.2f')}"
        if read.stage == "steered":
            row |= {"dose": run.at("steered", read.round).get("dose"), "cosine_to_first": run.at("vector", read.round).get("cosine_to_first")}
        if read.stage == "healed":
            row |= {key: value for key, value in run.at("round", read.round).items() if key.startswith("cosine_")}
        rows.append((read.stage, row))
    present = {key for _, row in rows for key, value in row.items() if value is not None}
    order = ["state", nats_name(target_of(run.events)[0]), *COLUMNS, *(key for _, row in rows for key in row)]
    columns = [key for key in dict.fromkeys(order) if key in present]
    cell = lambda key, value: value if isinstance(value, str) else number(value, COLUMNS.get(key, ("", "+.2f" if key.endswith("_nats") else ".3g"))[1])
    return [COLUMNS.get(key, (key,))[0] for key in columns], [(stage, [cell(key, row.get(key)) for key in columns]) for stage, row in rows]


def answers(run: Run) -> dict[str, Any]:
    """Every evaluation prompt with its answers before the loop and down the rounds, steered beside healed."""
    states = [(stage, -1) for stage in BEFORE] + [(stage, r) for r in run.rounds for stage in ("steered", "healed")]
    given = {state: answered(run, *state) for state in states}
    asked = [row["prompt"] for row in given["base", -1]]
    prompts = list(dict.fromkeys(asked))[:SHOWN_PROMPTS]
    per_prompt = max(1, SHOWN_ANSWERS // max(1, len(prompts)))
    shown = []
    for prompt in prompts:
        mine = {state: [row for row in rows if row["prompt"] == prompt][:per_prompt] for state, rows in given.items()}
        pick = lambda i, *wanted: [mine[state][i] for state in wanted if i < len(mine[state])]
        shown.append((prompt, [
            {"before": pick(i, *states[: len(BEFORE)]), "rounds": [(r, pick(i, ("steered", r), ("healed", r))) for r in run.rounds]}
            for i in range(len(mine["base", -1]))
        ]))
    return {"prompts": shown, "n_prompts_left_out": len(set(asked)) - len(shown), "n_answers_left_out": len(asked) - sum(len(s) for _, s in shown)}


def answered(run: Run, stage: str, round_: int) -> list[dict[str, Any]]:
    """The free-text answers of one state, each with its scores in words."""
    possible = run.at(stage, round_).get("items", {}).get("oracle") or []
    rows = []
    for i, row in enumerate(run.texts(stage, round_)):
        scores = [f"tail perplexity {number(row.get('ppl_tail'))}", f"repetition {number(row.get('rep'), '.2f')}"]
        scores += [f"{possible[i]:.0%} possible sentences"] if i < len(possible) and possible[i] is not None else []
        reasons = row.get("failed") or row.get("reasons") or []
        rows.append({"stage": stage, "prompt": row["prompt"], "text": row["text"], "scores": ", ".join(scores), "reasons": reasons})
    return rows


def filters(run: Run) -> Iterator[dict[str, Any]]:
    """What the filter did in each round (and with the control's text): counts, survival by dose, rows on both sides of each cut."""
    config = run.start["config"]["filter"]
    cuts = {gate: (measure, score, config[limit]) for gate, (measure, score, limit) in CUTS.items() if limit in config}
    for stage, round_ in [("control_gen", -1)] + [("gen", r) for r in run.rounds]:
        event = run.at(stage, round_)
        if not event:
            continue
        rows, dose = event["completions"], run.at("dose", round_)
        off = Counter(gate for row in rows for gate in row.get("failed", ()) if gate not in row["reasons"])
        dropped = Counter(reason for row in rows for reason in row["reasons"])
        yield {
            "title": "control" if stage == "control_gen" else f"round {round_}", "n": len(rows), "n_kept": sum(row["keep"] for row in rows),
            "n_train": event["n_train"], "kappa": dose.get("kappa"), "mode": dose.get("mode"),
            "calibration": run.at("calibration", round_).get("probes", []),
            "dropped": [(gate, dropped[gate], off[gate]) for gate in sorted({*dropped, *off}, key=lambda gate: -dropped[gate])],
            "survival": survival(rows),
            "borderline": [(gate, *cut, *borderline(rows, gate, cut[1])) for gate, cut in cuts.items() if gate in config.get("gates", cuts)],
        }


def survival(rows: Sequence[Event], n_ranges: int = 8) -> list[tuple[str, int, int]]:
    """(doses, written, kept) in at most n_ranges ranges of the dose, evenly wide in its logarithm."""
    doses = [row["dose"] for row in rows]
    low = min((dose for dose in doses if dose > 0), default=1.0)
    width = math.log(max([low, *doses]) / low) / n_ranges or 1.0
    range_of = lambda dose: min(n_ranges - 1, int(math.log(dose / low) / width + 1e-9)) if dose > 0 else -1
    out = []
    for i in sorted(set(map(range_of, doses))):
        group = [row for row in rows if range_of(row["dose"]) == i]
        first, last = (f"{edge(row['dose'] for row in group):.2g}" for edge in (min, max))
        out.append((first if first == last else f"{first} to {last}", len(group), sum(row["keep"] for row in group)))
    return out


def borderline(rows: Sequence[Event], gate: str, score: str) -> tuple[list[Event], list[Event]]:
    """(kept rows closest under the cut of a gate, dropped ones closest above it)."""
    value = lambda row: math.inf if row["scores"].get(score) is None else row["scores"][score]
    kept = sorted((row for row in rows if row["keep"]), key=value, reverse=True)
    return kept[:SHOWN_BORDERLINE], sorted((row for row in rows if gate in row["reasons"]), key=value)[:SHOWN_BORDERLINE]


def main(runs: Annotated[list[Path], tyro.conf.Positional]) -> int:
    """Writes report.html and diary.md of each run folder again, from its events.jsonl alone."""
    return redraw(runs, report, "the run did not start yet, nothing to report")


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
