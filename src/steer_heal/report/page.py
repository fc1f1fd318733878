"""report.html and diary.md of a run, written from its events alone."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from markupsafe import Markup

from steer_heal.errors import plural
from steer_heal.events import (
    Contrasted,
    Dropped,
    Extracted,
    Gathered,
    HealRetried,
    Measured,
    Preflight,
    RoundDone,
    Run,
    RunEnd,
    Trained,
)
from steer_heal.inputs import evenly
from steer_heal.inputs.files import OWN_CONFIG_FILE
from steer_heal.intervals import finite_mean
from steer_heal.records import NO_ATTACK, Metric, round_name, under_attack
from steer_heal.report import plot, view
from steer_heal.report.advice import Check, checks
from steer_heal.report.texts import answered, answers, filters, first_answers, reasons, states, written
from steer_heal.runs.storage import atomic_write
from steer_heal.settings import RunConfig, leaves
from steer_heal.verdict import (
    Kept,
    attack_title,
    best_round,
    ended_early,
    health_of,
    kept,
    shift,
    signed,
    title,
    verdict,
)

STEERING = ("kappa", "dose", "cosine to round 1", "cosine of student and vector", "cosine of student and vector 1")
"""Columns of the table of steering."""
KINDS = {
    "vignette": "Metrics of vignettes",
    "text": "Metrics of free answers",
    "pair": "Metrics of contrast pairs",
    "question": "Metrics of everyday questions",
    "instruction": "Metrics of unrelated system prompts",
    "trait": "Metrics of other traits' pairs",
}
"""Heading of the metrics by what one of their items is (Metric.of)."""
BELOW = {
    "vignette": "Each scene is shown with its answer.",
    "pair": "Each prompt is shown with its positive and its negative reply.",
    "question": "Each question is shown with its right and its wrong answer.",
    "instruction": "Each system prompt and question is shown with an answer that follows it and one that does not.",
}
"""What the wording of an item holds, by what an item is."""
MEANS = {"mean": "mean", "log_mean": "log of the mean", "median": "median", "rms": "root mean square"}
DIARY_PROMPTS = 3


def save(run: Run, folder: Path) -> Path:
    """Writes report.html and diary.md; returns the path of the first."""
    name = folder.resolve().name
    begun = Path(run.start.folder)  # as the commands name it where the run was started
    place = begun if begun.resolve() == folder.resolve() else folder.resolve()
    for file, text in (("diary.md", diary(run, name)), ("report.html", page(run, name, str(place)))):
        with atomic_write(folder / file) as part:
            part.write_text(text, encoding="utf-8", newline="\n")
    return folder / "report.html"


def page(run: Run, name: str, folder: str = "") -> str:
    """The whole of report.html. `folder`: where the run lies; empty for a run in memory, which no command can take."""
    grade, _, detail = view.true_minus(verdict(run)).partition(":")
    texts = written(run)
    return view.template("report.html.j2", view.visible).render(
        name=name,
        start=run.start,
        model=view.model_words(run),
        rounds=view.rounds_begun(run),
        grade=grade,
        detail=detail.strip(),
        progress=progress(run, in_memory=not folder),
        figures=figures(run),
        pictures=pictures(run),
        table=round_table(run),
        metrics=metric_tables(run),
        readings=readings(run),
        attacks=attack_table(run),
        preflight=run.at(Preflight, None),
        teachings=teaching_table(run),
        fits=fit_table(run),
        steering=steering_table(run),
        conditions=conditions(run),
        answers=answers(run),
        filters=list(filters(run)),
        written=texts,
        why=reasons(row.scored for row in texts),
        heals=heals(run),
        retries=run.each(HealRetried),
        dropped=run.each(Dropped),
        folder=shlex.quote(folder) if folder else "",
        steps=next_steps(run, shlex.quote(folder)) if folder else [],
        command=shlex.join(command_of(run)),
        settings={key: setting_words(value) for key, value in leaves(settings_of(run)).items()},
    )


def next_steps(run: Run, folder: str) -> list[tuple[str, str]]:
    """(what for, command) of what can be done with the run now."""
    own = f" --plugin {shlex.join(run.start.config.plugin)}" if run.start.config.plugin else ""
    if run.end is None and not run.dead_end:
        return [("Go on with the run, once the process that makes it has stopped", f"resume {folder}{own}")]
    more = [("Go on for another round", f"resume {folder} --n-rounds {run.n_rounds + 1}{own}")]
    if ended_early(run) or run.dead_end:
        more = []
    last = run.at(Trained, run.rounds[-1]) if run.rounds else None
    if last is None:
        return more
    best = best_round(run)
    broken = "" if best is not None or run.untrained else " --allow-broken"
    which = f"round {(run.rounds[-1] if best is None else best.state.round or 0) + 1}{broken and ', which is broken'}"
    export = [(
        f"Write {which} as a model for transformers, or with --format gguf for llama.cpp and Ollama",
        f"export {folder} {folder}-model{broken}{own}",
    )]  # fmt: skip
    if f"{last.checkpoint}/{OWN_CONFIG_FILE}" in last.files:  # no format holds such an adapter
        export = []
    return [
        (f"Talk to {which}, beside the untouched model", f"chat {folder} --web{broken}{own}"),
        *export,
        ("Measure half of its effect", f"eval --run {folder} --adapter-scale 0.5{broken}{own}"),
        *more,
        ("Show what an upload to the hub would send; --yes sends it", f"push {folder} OWNER/NAME{broken}"),
    ]


def settings_of(run: Run) -> RunConfig:
    """The settings, with the number of rounds that the run was asked for in the end."""
    return replace(run.start.config, n_rounds=run.n_rounds)


def command_of(run: Run) -> list[str]:
    """The command that makes the run again. Empty: it was made in Python."""
    command = list(run.start.command)
    if command and run.n_rounds != run.start.config.n_rounds:
        command += ["--n-rounds", str(run.n_rounds)]
    if command and run.start.chat is not None and run.start.chat.date and not run.start.config.date:
        command += ["--date", run.start.chat.date]  # else the template reads that of the day
    return command


def setting_words(value: object) -> str:
    """A setting as people read it: a list as its items."""
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def diary(run: Run, name: str) -> str:
    """The whole of diary.md: the run told by its answers to a few evaluation prompts, evenly spaced."""
    given = {state: answered(run, *state) for state in states(run)}
    prompts = evenly(list(dict.fromkeys(row.prompt for row in given["base", None])), DIARY_PROMPTS)
    told = {}
    for state, rows in given.items():
        first = first_answers(rows)
        told[state] = [(i, first[prompt]) for i, prompt in enumerate(prompts, 1) if prompt in first]
    return view.template("diary.md.j2", view.inline).render(
        name=name,
        start=run.start,
        model=view.model_words(run),
        rounds=view.rounds_begun(run),
        verdict=verdict(run),
        progress=progress(run),
        prompts=prompts,
        told=told,
        measured=measured_words(run),
        retries=run.each(HealRetried),
        dropped=run.each(Dropped),
    )


def measured_words(run: Run) -> dict[tuple[str, int | None], str]:
    """By (state, round), every value of its row of the table of states."""
    headings = {key: heading for key, (heading, _) in view.table_columns(run).items() if key != "state"}
    rows = zip(run.each(Measured), view.table_cells(run, ""), strict=True)
    return {(m.state, m.round): ", ".join(f"{headings[k]} {row[k]}" for k in headings if row[k]) for m, row in rows}


def progress(run: Run, *, in_memory: bool = False) -> tuple[str, str]:
    """(finished, stopped, running, or in memory; a sentence about it)."""
    last = view.last_event(run)
    done = f"{len(run.rounds)} of {plural(run.n_rounds, 'round')}"
    if in_memory and not isinstance(last, RunEnd):
        return "in memory", done
    done += f", {last.wall_s / 60:.1f} minutes"
    if isinstance(last, RunEnd):
        return ("stopped", f"{done}; {last.error}") if last.error else ("finished", done)
    at = last.t[:19].replace("T", " ")
    return "running", f"{done}; it has not ended yet, and its last event is {view.event_words(last)} at {at} UTC"


def figures(run: Run) -> list[tuple[str, str, str]]:
    """(what, value, what to compare it with) of the trait's metric and of each health metric, for the last healed
    student."""
    trait_metric = run.trait_metric
    base = run.measured("base")
    healed = next((m for m in reversed(run.each(Measured)) if m.state == "healed"), None)
    if healed is None or base is None:
        return []
    others = [m for m in run.each(Measured) if m.round in (None, healed.round) and m is not healed]
    form = signed(trait_metric)

    def shifted(m: Measured) -> str:
        return view.number(shift(m, base, trait_metric), form)

    low = view.number(healed[f"{trait_metric.name}_lo"], form)
    high = view.number(healed[f"{trait_metric.name}_hi"], form)
    shifts = ", ".join(f"{m.state} {shifted(m)}" for m in others if m is not base)
    about = f"{trait_metric.unit}, 95 % {low} to {high}; {shifts}"
    shown = [(f"{title(trait_metric)} against base", shifted(healed), about)]
    for metric in health_of(run.metrics.values()):
        against = ", ".join(f"{m.state} {view.number(m[metric.name], metric.form)}" for m in others)
        shown.append((title(metric), view.number(healed[metric.name], metric.form), against))
    return shown


def pictures(run: Run) -> list[tuple[str, Markup]]:
    """(description, data URI) of the pictures that need a measured base."""
    if run.measured("base") is None:
        return []
    drawn = (
        ("Metric of the trait and health of the model by round; the table below has the numbers", plot.rounds(run)),
        ("Shift of the trait's metric against that of a second metric", plot.plane(run)),
    )
    return [(description, Markup(plot.data_uri(figure))) for description, figure in drawn]


def heals(run: Run) -> list[tuple[str, int, Trained | None, Markup]]:
    """(name, number of steps, its end, data URI of its curves) of every heal that has begun, the control's first."""
    n_steps = Counter(step.round for step in run.steps)
    return [
        (round_name(r), n_steps[r], run.at(Trained, r), Markup(plot.data_uri(figure)))
        for r, figure in plot.heal_curves(run).items()
    ]


# --- tables ------------------------------------------------------------------------------------------------------
def round_table(run: Run) -> view.Table:
    """The measured states, without columns in which no state has a value."""
    found = view.table_cells(run, view.MISSING)
    rows = [{key: text.replace("-", "\u2212") for key, text in row.items()} for row in found]
    known = {key for row in rows for key, text in row.items() if text != view.MISSING}
    columns = {key: name for key, (name, _) in view.table_columns(run).items() if key in known}
    cells = [
        (state, [named, *(row[key] for key in columns if key != "state")])
        for (state, named), row in zip(state_names(run), rows, strict=True)
    ]
    return list(columns.values()), cells


def state_names(run: Run) -> list[tuple[str, str]]:
    """(state, name) of each measured state. The best round is marked."""
    measured = run.each(Measured)
    best = best_round(run)
    return [(m.state, f"{m.label} (best)" if best is not None and m is best.state else m.label) for m in measured]


def metric_tables(run: Run) -> list[tuple[str, view.Table]]:
    """(heading, table) of the metrics by what their items are. There is a row for each metric and a column for each
    state; a cell holds the value above the 95 percent interval of its difference to base."""
    groups: dict[str, list[Metric]] = {}
    for metric in run.metrics.values():
        groups.setdefault(KINDS.get(metric.of, "Other metrics"), []).append(metric)
    headings = ["metric", *(name for _, name in state_names(run))]
    return [(kind, (headings, [_metric_row(metric, run) for metric in group])) for kind, group in groups.items()]


def _metric_row(metric: Metric, run: Run) -> tuple[str, list[str]]:
    """(class, cells) of a metric."""
    trait = run.start.trait
    part = "target" if metric.name == trait.target else "off-target" if metric.name in trait.off_targets else ""
    about = ", ".join(filter(None, (metric.name, metric.unit, part)))
    breakable = Markup("_<wbr>").join(view.visible(about).split("_"))
    name = Markup("{}<small>{}</small>").format(view.visible(title(metric)), breakable)
    return part, [name, *(view.with_interval(m.metrics, metric) for m in run.each(Measured))]


def attack_table(run: Run) -> view.Table | None:
    """The mean margin of the contrast pairs without an attack and under each one, by state. A healed state's margin
    stands above the share of its shift that is kept. None: no attack was measured."""
    measured = run.each(Measured)
    if not any(under_attack() in m.items for m in measured):
        return None
    shares = [kept(m, run) if m.state == "healed" else None for m in measured]

    def cell(m: Measured, found: Kept | None, name: str) -> Markup:
        margin = Markup(view.number(finite_mean(m.items.get(under_attack(name), ())), "+.3f"))
        if found is None or name not in found.shares:
            return margin
        return Markup("{}<small>keeps {}</small>").format(margin, view.number(found.shares[name], ".0%"))

    rows = [
        ("", [attack_title(name), *(cell(m, found, name) for m, found in zip(measured, shares, strict=True))])
        for name in (NO_ATTACK, *(name for name, _ in run.start.wording.get("attack", ())))
    ]
    return ["attack", *(name for _, name in state_names(run))], rows


def teaching_table(run: Run) -> view.Table | None:
    """What each teacher of the pre-flight changes on the pairs, before any training. None: there was no pre-flight."""
    event = run.at(Preflight, None)
    if event is None:
        return None
    found = event.found
    rows = []
    for each in (*found.personas, *found.contrasts, *found.null):
        moved, low, high = (view.number(value, "+.3f") for value in (each.shift, each.low, each.high))
        strength, kl = map(view.number, (each.strength, each.kl))
        rows.append(("", [each.name, strength, kl, moved, f"{low} to {high}", view.number(each.right, ".0%")]))
    return ["teacher", "strength", "KL to base, nats", "shift of the pairs", "95 % interval", "pairs that rise"], rows


def fit_table(run: Run) -> view.Table | None:
    """How much of the teacher's distance each heal closed, and the shift of the pairs under teacher and student. None:
    no heal had a teacher's distribution."""
    heals = [event for event in run.each(Trained) if event.closed("held_out") is not None]
    pairs = next((m for m in run.metrics.values() if m.of == "pair" and m.moved is not None), None)
    base = run.measured("base")
    rows = []
    for event in heals:
        contrast = run.at(Contrasted, event.round)
        states = [run.measured(name, event.round) for name in ("steered", "healed")]
        shifts: list[float | None] = [None, None]
        if pairs is not None and base is not None:
            shifts = [None if m is None else shift(m, base, pairs) for m in states]
        cells = [
            round_name(event.round),
            view.number(None if contrast is None else contrast.found.strength),
            view.number(event.validation[0].get("kl_held_out")),
            *(view.number(event.closed(texts), ".0%") for texts in ("trained", "held_out")),
            *(view.number(each, "+.3f") for each in shifts),
        ]
        rows.append(("", cells))
    headings = ["", "strength of the contrast", "KL(teacher || student) before, nats", "closed on trained text"]
    return ([*headings, "closed on held-out text", "pairs: teacher", "pairs: student"], rows) if rows else None


def steering_table(run: Run) -> view.Table:
    """Dose and direction of each round."""
    rows = []
    for r in view.rounds_begun(run):
        gathered = run.at(Gathered, r)
        vector = run.at(Extracted, r)
        done = run.at(RoundDone, r)
        values = [
            None if gathered is None or not gathered.collected.dose else gathered.collected.kappa,
            None if gathered is None else gathered.collected.dose,
            None if vector is None else vector.cosine_to_first,
            None if done is None else done.cosine_student_teacher,
            None if done is None else done.cosine_student_first,
        ]
        rows.append(("", [round_name(r), *map(view.number, values)]))
    return ["", *STEERING], rows


def conditions(run: Run) -> tuple[view.Table, list[tuple[str, str]]]:
    """(what should hold in each round, yes or no; (round, advice) for each condition that does not hold)."""
    rounds: list[int | None] = [None, *view.rounds_begun(run)]
    found: dict[str, dict[int | None, Check]] = {}
    for event in run.events:
        for check in checks(event, run):
            found.setdefault(check.should, {})[event.round] = check

    def answer(check: Check | None) -> str:
        if check is None:
            return view.MISSING
        return "yes" if check.holds else "no"

    rows = [("", [should, *(answer(asked.get(r)) for r in rounds)]) for should, asked in found.items()]
    advice = [
        ("before the loop" if r is None else round_name(r), asked[r].advice)
        for r in rounds
        for asked in found.values()
        if r in asked and not asked[r].holds
    ]
    return (["", "before", *map(round_name, rounds[1:])], rows), advice


# --- items -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Reading:
    """An item of the trait's metric, in base and in the last healed student."""

    name: list[str]
    before: float
    after: float

    @property
    def change(self) -> float:
        return self.after - self.before


@dataclass(frozen=True, kw_only=True)
class Readings:
    """The items of the trait's metric. A change in the wanted direction comes first."""

    how: str
    below: str
    state: str
    rows: list[Reading]
    n_unread: int
    n_wanted: int
    widest: float
    """The largest change; 1 if nothing changed."""


def readings(run: Run) -> Readings | None:
    """The items of the trait's metric, each by its wording or, if the events do not hold it, by its number. None: no
    healed student was measured, or the events hold no items."""
    metric = run.trait_metric
    sign = run.start.trait.sign
    base = run.measured("base")
    healed = [m for m in run.each(Measured) if m.state == "healed"]
    before = base.items.get(metric.item, []) if base is not None else []
    after = healed[-1].items.get(metric.item, []) if healed else []
    if base is None or not before or len(before) != len(after):
        return None
    wording = [[row.prompt] for row in base.texts] if metric.of == "text" else run.start.wording.get(metric.of, [])
    rows = []
    for i, (then, now) in enumerate(zip(before, after, strict=True)):
        if math.isfinite(then) and math.isfinite(now):
            name = wording[i] if i < len(wording) else [f"{metric.of or 'item'} {i + 1}"]
            rows.append(Reading(name=name, before=then, after=now))
    return Readings(
        how=MEANS[metric.how],
        below=BELOW.get(metric.of, "") if wording else "",
        state=healed[-1].label,
        rows=sorted(rows, key=lambda row: -sign * row.change),
        n_unread=len(before) - len(rows),
        n_wanted=sum(row.change * sign > 0 for row in rows),
        widest=max((abs(row.change) for row in rows), default=0.0) or 1.0,
    )
