"""report.html and diary.md of a run, written from its events alone."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import shlex
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup
from matplotlib.figure import Figure

from steer_heal.errors import printable
from steer_heal.report import plot
from steer_heal.report.measurements import (
    MEASURED,
    Measurement,
    direction,
    health_of,
    measurements,
    metrics_of,
    run_start,
    shift,
    signed,
    table_cells,
    table_columns,
    target_of,
    title,
    verdict,
)
from steer_heal.report.measurements import number as formatted
from steer_heal.runs.events import current, heal_steps, of_stage, read_events
from steer_heal.runs.storage import atomic_write

Event = Mapping[str, Any]
HERE = Path(__file__).parent
SHOWN_PROMPTS, SHOWN_ANSWERS, SHOWN_BORDERLINE, SHOWN_CHARACTERS = 64, 64, 3, 1500
"""Evaluation prompts; answers per state; rows on each side of each cut; characters of any one text."""
BEFORE = ("base", "prompted", "control")
STEERING = {
    "kappa": ("dose", "kappa"),
    "dose": ("steered", "dose"),
    "cosine to round 0": ("vector", "cosine_to_first"),
    "cosine of student and vector": ("round", "cosine_student_teacher"),
    "cosine of student and vector 0": ("round", "cosine_student_first"),
}
"""Column of the table of steering: (event, field)."""


def report(folder: Path) -> Path | None:
    """Writes report.html and diary.md from the events alone; None where the run did not start yet."""
    events = current(read_events(folder))
    if not of_stage(events, "run_start"):
        return None
    run = Run(folder.name, events)
    for name, text in (("diary.md", diary(run)), ("report.html", page(run))):
        with atomic_write(folder / name) as part:
            part.write_text(text, encoding="utf-8", newline="\n")
    return folder / "report.html"


@dataclass(frozen=True)
class Run:
    """The events of a run, looked up by stage and round."""

    name: str
    events: Sequence[Event]

    def at(self, stage: str, round_: int | None = -1) -> Event:
        """The event, empty where it was not written yet."""
        return next((e for e in reversed(self.events) if e["stage"] == stage and e["round"] == round_), {})

    @property
    def start(self) -> Event:
        return run_start(self.events)

    @property
    def rounds(self) -> list[int]:
        shown = [e for e in self.events if e["stage"] != "backtrack"]
        return sorted({e["round"] for e in shown if e["round"] is not None and e["round"] >= 0})

    def texts(self, stage: str, round_: int) -> Sequence[Event]:
        return self.at("adapter_gen" if stage == "healed" else stage, round_).get("texts") or ()

    def gates(self) -> dict[str, Event]:
        """The gates that say whether a text is broken."""
        return {name: gate for name, gate in self.start["gates"].items() if gate["broken"]}


def visible(text: str) -> str:
    """Text that is safe to show: U+FFFD for what does not print; a long one is cut, and the cut is named."""
    text, limit = printable(text), SHOWN_CHARACTERS
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text) - limit:,} characters more)"


def number(value: float | None, form: str = ".3g") -> str:
    return formatted(value, form, "\u2013").replace("-", "\u2212")


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


def template(path: Path, show: Callable[[str], str]) -> Template:
    """A template file. Every string that it prints passes `show`, and is escaped unless it then is Markup."""
    environment = Environment(
        loader=FileSystemLoader(path.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: show(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )
    environment.filters |= {"number": number, "fenced": fenced, "direction": direction}
    environment.globals |= {"plural": plural}
    return environment.get_template(path.name)


def page(run: Run) -> str:
    """The whole of report.html."""
    grade, _, detail = verdict(run.events).partition(":")
    return template(HERE / "report.html.j2", visible).render(
        run=run,
        start=run.start,
        grade=grade,
        detail=detail.strip(),
        progress=progress(run),
        figures=figures(run),
        pictures=pictures(run),
        table=round_table(run),
        metrics=metric_table(run),
        steering=steering_table(run),
        answers=answers(run),
        filters=list(filters(run)),
        heals=heals(run),
        retries=of_stage(run.events, "heal_retry"),
        dropped=of_stage(run.events, "backtrack"),
        command=shlex.join(run.start.get("command") or ()),
    )


def diary(run: Run) -> str:
    """The whole of diary.md: the run told by its answers to the first evaluation prompt."""
    return template(HERE / "diary.md.j2", inline).render(
        run=run,
        start=run.start,
        verdict=verdict(run.events),
        progress=progress(run),
        headline=next(iter(answers(run)["prompts"]), None),
        measured=measured_words(run),
        retries=of_stage(run.events, "heal_retry"),
        dropped=of_stage(run.events, "backtrack"),
    )


def measured_words(run: Run) -> dict[str, str]:
    """By state, every value of its row of the table that is there."""
    headings = {key: heading for key, (heading, _) in table_columns(run.events).items() if key != "state"}
    rows = table_cells(run.events, "")
    return {row["state"]: ", ".join(f"{headings[key]} {row[key]}" for key in headings if row[key]) for row in rows}


def progress(run: Run) -> tuple[str, str]:
    """(finished, stopped or running, a sentence about it)."""
    last, n_rounds = run.events[-1], len(of_stage(run.events, "round"))
    done = f"{n_rounds} of {plural(run.start['config']['n_rounds'], 'round')}, {last['wall_s'] / 60:.1f} minutes"
    if last["stage"] != "run_end":
        where = "" if last["round"] is None or last["round"] < 0 else f" of round {last['round']}"
        at = last["t"][:19].replace("T", " ")
        return "running", f"{done}; no end is written yet, the last event is {last['stage']}{where} at {at} UTC"
    return ("stopped", f"{done}; {last['error']}") if last.get("error") else ("finished", done)


def figures(run: Run) -> list[tuple[str, str, str]]:
    """(what, value, what it stands against) of the last healed student: the target, and every health metric."""
    states, (target, _) = measurements(run.events), target_of(run.events)
    healed = next((m for m in reversed(states) if m.stage == "healed"), None)
    base = next((m for m in states if m.stage == "base"), None)
    if healed is None or base is None:
        return []
    others = [m for m in states if m.round in (-1, healed.round) and m is not healed]
    low, high = (number(healed[f"{target.name}_{end}"], signed(target)) for end in ("lo", "hi"))
    shifts = ", ".join(f"{m.stage} {number(shift(m, base, target), signed(target))}" for m in others if m is not base)
    shown = [
        (
            f"{target.name} against base",
            number(shift(healed, base, target), signed(target)),
            f"{target.unit}, 95 % {low} to {high}; {shifts}",
        )
    ]
    for metric in health_of(metrics_of(run.events).values()):
        against = ", ".join(f"{m.stage} {number(m[metric.name], metric.form)}" for m in others)
        shown.append((title(metric), number(healed[metric.name], metric.form), against))
    return shown


def pictures(run: Run) -> list[tuple[str, Markup]]:
    """(description, data URI) of the pictures that need a measured base."""
    if not plot.is_measured(run.events):
        return []
    seen = [{**e, "items": None, "texts": None} for e in run.events if e["stage"] in ("run_start", *MEASURED)]
    drawn = _drawn(_state_figures, json.dumps(seen))
    told = "The target and the health of the model, round by round; the table below holds the numbers"
    return list(zip((told, "The shift of the target against that of a second metric"), drawn.values(), strict=True))


def _state_figures(events: Sequence[Event]) -> dict[int, Figure]:
    return dict(enumerate((plot.rounds(events), plot.map_(events, headline=False))))


def heals(run: Run) -> list[tuple[str, int, Event, Markup]]:
    """(name, steps so far, event of its end, data URI of its curves) of each heal, the control's first."""
    seen = [e for e in run.events if e["stage"] in ("run_start", "heal_step", "heal", "heal_retry")]
    drawn = _drawn(plot.heal_curves, json.dumps(seen))
    n_steps = Counter(step["round"] for step in heal_steps(seen))
    return [(_name(r), n_steps[r], run.at("heal", r), uri) for r, uri in drawn.items()]


def _name(r: int) -> str:
    return "control" if r < 0 else f"round {r}"


@lru_cache(maxsize=2)
def _drawn(draw: Callable[[Sequence[Event]], Mapping[int, Figure]], events: str) -> dict[int, Markup]:
    """Data URIs of the figures of some events, kept until those change: a run writes its page more often."""
    uris = {}
    for key, figure in draw(json.loads(events)).items():
        buffer = io.BytesIO()
        with matplotlib.rc_context(plot.STYLE):
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        uris[key] = Markup("data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode())
    return uris


Table = tuple[list[str], list[tuple[str, list[str]]]]
"""(headings, (stage, cells) of each row)."""


def round_table(run: Run) -> Table:
    """The measured states, without columns in which none has a value."""
    rows = [
        {key: text.replace("-", "\u2212") for key, text in row.items()} for row in table_cells(run.events, "\u2013")
    ]
    columns = {key: name for key, (name, _) in table_columns(run.events).items() if {r[key] for r in rows} - {"\u2013"}}
    stages = [m.stage for m in measurements(run.events)]
    cells = [(stage, [row[key] for key in columns]) for stage, row in zip(stages, rows, strict=True)]
    return list(columns.values()), cells


def metric_table(run: Run) -> Table:
    """Every metric before the loop and in the last round, with the 95 percent interval of the healed shift."""
    states = {m.stage: m for m in measurements(run.events)}
    healed = states.get("healed", Measurement("healed", 0, {}))
    rows = []
    for name, metric in metrics_of(run.events).items():
        low, high = (number(healed[f"{name}_{end}"], signed(metric)) for end in ("lo", "hi"))
        cells = [number(m[name], metric.form) for m in states.values()]
        rows.append(("", [name, metric.title, metric.unit, *cells, f"{low} to {high}"]))
    return ["metric", "", "unit", *(m.state for m in states.values()), "95 % of the healed shift"], rows


def steering_table(run: Run) -> Table:
    """Dose and direction of each round."""
    rows = [(f"round {r}", [run.at(stage, r).get(field) for stage, field in STEERING.values()]) for r in run.rounds]
    return ["", *STEERING], [("", [name, *map(number, values)]) for name, values in rows]


def answers(run: Run) -> dict[str, Any]:
    """Every evaluation prompt with its answers before the loop and in the rounds, steered beside healed."""
    states = [(stage, -1) for stage in BEFORE] + [(stage, r) for r in run.rounds for stage in ("steered", "healed")]
    given = {state: answered(run, *state) for state in states}
    asked = [row["prompt"] for row in given["base", -1]]
    prompts = list(dict.fromkeys(asked))[:SHOWN_PROMPTS]
    per_prompt = max(1, SHOWN_ANSWERS // max(1, len(prompts)))
    shown = []
    for prompt in prompts:
        mine = {key: [row for row in rows if row["prompt"] == prompt][:per_prompt] for key, rows in given.items()}
        pick = lambda i, *wanted, mine=mine: [mine[state][i] for state in wanted if i < len(mine[state])]
        samples = [
            {
                "before": pick(i, *states[: len(BEFORE)]),
                "rounds": [(r, pick(i, ("steered", r), ("healed", r))) for r in run.rounds],
            }
            for i in range(len(mine["base", -1]))
        ]
        shown.append((prompt, samples))
    return {
        "prompts": shown,
        "n_prompts_left_out": len(set(asked)) - len(shown),
        "n_answers_left_out": len(asked) - sum(len(samples) for _, samples in shown),
    }


def answered(run: Run, stage: str, round_: int) -> list[dict[str, Any]]:
    """The free-text answers of one state, each with what the gates for broken text measure of it."""
    rows = []
    for row in run.texts(stage, round_):
        scores = [f"{gate['measures']} {number(row['scores'].get(name))}" for name, gate in run.gates().items()]
        reasons = row.get("failed") or row["reasons"]
        told = {"prompt": row["prompt"], "text": row["text"], "scores": ", ".join(scores), "reasons": reasons}
        rows.append({"stage": stage, **told})
    return rows


def filters(run: Run) -> Iterator[dict[str, Any]]:
    """What the filter did in each round and with the control's text: counts, survival by dose, rows at each cut."""
    cuts = {name: gate for name, gate in run.gates().items() if gate["on"] and gate["limit"] > 0}
    for stage, round_ in [("control_gen", -1)] + [("gen", r) for r in run.rounds]:
        event = run.at(stage, round_)
        if not event:
            continue
        rows, dose = event["completions"], run.at("dose", round_)
        off = Counter(gate for row in rows for gate in row.get("failed", ()) if gate not in row["reasons"])
        dropped = Counter(reason for row in rows for reason in row["reasons"])
        failed = [gate for gate in dict.fromkeys((*run.start["gates"], *dropped, *off)) if dropped[gate] or off[gate]]
        yield {
            "title": _name(round_),
            "n": len(rows),
            "n_kept": sum(row["keep"] for row in rows),
            "n_train": event["n_train"],
            "kappa": dose.get("kappa"),
            "mode": dose.get("mode"),
            "calibration": run.at("calibration", round_).get("probes", []),
            "dropped": sorted(((gate, dropped[gate], off[gate]) for gate in failed), key=lambda row: -row[1]),
            "survival": survival(rows),
            "borderline": [(name, gate, *borderline(rows, name, gate["limit"])) for name, gate in cuts.items()],
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


def borderline(rows: Sequence[Event], gate: str, limit: float) -> tuple[list[Event], list[Event]]:
    """(kept rows, rows that the gate dropped), each those closest to its limit. A null score is infinite."""
    score = lambda row: math.inf if row["scores"].get(gate) is None else row["scores"][gate]
    near = sorted(rows, key=lambda row: abs(score(row) - limit))
    kept, dropped = [row for row in near if row["keep"]], [row for row in near if gate in row["reasons"]]
    return kept[:SHOWN_BORDERLINE], dropped[:SHOWN_BORDERLINE]
