"""What was written in a run: the answers of every state, and the texts that the filter kept and dropped."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from markupsafe import Markup, escape

from steer_heal.events import Calibrated, Gathered, Measured, Run
from steer_heal.inputs import evenly
from steer_heal.records import GateFacts, KlProbe, Scored
from steer_heal.report.view import degenerate_gates, number, rounds_begun, visible
from steer_heal.verdict import best_round, title

SHOWN_PROMPTS = 64
SHOWN_ANSWERS = 64
"""Answers per state."""
SHOWN_BORDERLINE = 3
"""Rows on each side of a limit."""
SHOWN_TEXTS = 24
"""Kept texts per round, and as many dropped ones."""
StateKey = tuple[str, int | None]
"""(state, round)."""
BEFORE: list[StateKey] = [("base", None), ("prompted", None), ("control", None)]


# --- answers -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Shown:
    """An answer of a measured state, with what was measured of it."""

    state: str
    round: int | None
    prompt: str
    text: str
    scores: tuple[str, ...]
    reasons: tuple[str, ...]
    """Gates that the text fails."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The answers of all states to one prompt that were drawn from the same random stream."""

    before: list[Shown]
    rounds: list[tuple[int, list[Shown]]]
    """Steered and healed of each round."""
    changes: list[tuple[int, Markup]]
    """Word diff of healed answers against base, by round."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The answers to the evaluation prompts, as many as are shown."""

    prompts: list[tuple[str, list[Sample]]]
    reasons: list[str]
    n_prompts_left_out: int
    n_answers_left_out: int


def answers(run: Run) -> Answers:
    """Every evaluation prompt with its answers before the loop and in the rounds, steered beside healed."""
    given = {state: answered(run, *state) for state in states(run)}
    asked = [row.prompt for row in given["base", None]]
    prompts = list(dict.fromkeys(asked))[:SHOWN_PROMPTS]
    per_prompt = max(1, SHOWN_ANSWERS // max(1, len(prompts)))
    shown = []
    for prompt in prompts:
        mine = {key: [row for row in rows if row.prompt == prompt][:per_prompt] for key, rows in given.items()}
        samples = [
            _sample(run, {key: rows[i] for key, rows in mine.items() if i < len(rows)})
            for i in range(len(mine["base", None]))
        ]
        shown.append((prompt, samples))
    return Answers(
        prompts=shown,
        reasons=reasons(row for rows in given.values() for row in rows),
        n_prompts_left_out=len(set(asked)) - len(shown),
        n_answers_left_out=len(asked) - sum(len(samples) for _, samples in shown),
    )


def _sample(run: Run, given: dict[StateKey, Shown]) -> Sample:
    """One answer of each state, side by side."""
    pairs = [(r, [("steered", r), ("healed", r)]) for r in rounds_begun(run)]
    base = given["base", None]
    healed = [(r, given["healed", r]) for r in _compared(run) if ("healed", r) in given]
    return Sample(
        before=[given[state] for state in BEFORE if state in given],
        rounds=[(r, [given[state] for state in pair if state in given]) for r, pair in pairs],
        changes=[(r, word_diff(base.text, after.text)) for r, after in healed],
    )


def states(run: Run) -> list[StateKey]:
    """Every state that is measured, those before the loop first."""
    return BEFORE + [(state, r) for r in rounds_begun(run) for state in ("steered", "healed")]


def answered(run: Run, state: str, r: int | None) -> list[Shown]:
    """The free-text answers of one state. Their scores are the metrics that have a value for every text, then the gates
    for degenerate text."""
    measured = run.measured(state, r)
    if measured is None:
        return []
    of_texts = [metric for metric in run.metrics.values() if metric.of == "text" and metric.item in measured.items]
    of_texts = [metric for metric in of_texts if not metric.form.endswith("%")]  # shares: an item is 0 or 1
    rows = []
    for i, row in enumerate(measured.texts):
        own = [(metric, measured.items[metric.item][i]) for metric in of_texts if i < len(measured.items[metric.item])]
        scores = [f"{title(metric)} {number(x, metric.form)}" for metric, x in own if x not in row.scores.values()]
        scores += [f"{gate.measures} {number(row.scores.get(name))}" for name, gate in degenerate_gates(run).items()]
        rows.append(Shown(state, r, row.prompt, row.text, tuple(scores), tuple(row.failed)))
    return rows


def first_answers(rows: Sequence[Shown]) -> dict[str, Shown]:
    """The first answer to each prompt."""
    return {row.prompt: row for row in reversed(rows)}


def reasons(rows: Iterable[Shown | Scored]) -> list[str]:
    """Every reason that a row names, in the order of the first."""
    return list(dict.fromkeys(reason for row in rows for reason in row.reasons))


def _compared(run: Run) -> list[int]:
    """The rounds whose healed answers are compared with the base's word by word: the best and the last."""
    healed = [m.round for m in run.each(Measured) if m.state == "healed"]
    best = best_round(run)
    chosen = {*healed[-1:], *([] if best is None else [best.state.round])}
    return sorted(r for r in chosen if r is not None)


def word_diff(before: str, after: str) -> Markup:
    """The second text with the words of the first that it lacks as <del>, and its new words as <ins>.

    A single word that stayed between two changes counts as changed, so that a change reads in one piece. Line breaks
    are not kept.
    """
    old = visible(before).split()
    new = visible(after).split()
    parts: list[Markup] = []
    lost: list[str] = []
    found: list[str] = []

    def flush() -> None:
        for tag, words in (("del", lost), ("ins", found)):
            if words:
                parts.append(Markup(f"<{tag}>{{}}</{tag}>").format(" ".join(words)))
                words.clear()

    for kind, i, j, k, m in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind == "equal" and (j - i > 1 or i == 0 or j == len(old)):
            flush()
            parts.append(escape(" ".join(old[i:j])))
        else:
            lost += old[i:j]
            found += new[k:m]
    flush()
    return Markup(" ").join(parts)


# --- the filter --------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Written:
    """A text that was written to be trained on."""

    round: int | None
    scored: Scored
    trains: bool


@dataclass(frozen=True, kw_only=True)
class Filtered:
    """What the filter did with the text of one heal."""

    event: Gathered
    n: int
    n_kept: int
    dropped: list[tuple[str, int, int]]
    """(gate, texts that it dropped, texts that fail it while it is off)."""
    calibration: tuple[KlProbe, ...]
    survival: list[tuple[str, int, int]]
    borderline: list[tuple[str, GateFacts, list[Written], list[Written]]]
    """(gate, facts, rows just kept, rows just dropped)."""


def texts_of(event: Gathered) -> list[Written]:
    """Every text of one heal."""
    train = set(event.collected.train)
    return [Written(round=event.round, scored=row, trains=i in train) for i, row in enumerate(event.collected.scored)]


def written(run: Run) -> list[Written]:
    """Texts of every round, evenly spaced over those that the filter kept and over those that each reason dropped."""
    found = []
    for event in run.each(Gathered):
        groups: dict[tuple[str, ...], list[Written]] = {}
        for row in texts_of(event):
            groups.setdefault(row.scored.reasons[:1], []).append(row)
        n_dropped = max(1, SHOWN_TEXTS // max(1, len(groups) - 1))
        for key, group in groups.items():
            found += evenly(group, n_dropped if key else SHOWN_TEXTS)
    return found


def filters(run: Run) -> Iterator[Filtered]:
    """What the filter did with the control's text and in each round."""
    cuts = {name: gate for name, gate in degenerate_gates(run).items() if gate.on and gate.limit > 0}
    for event in run.each(Gathered):
        rows = event.collected.scored
        off = Counter(gate for row in rows for gate in row.failed if gate not in row.reasons)
        dropped = Counter(reason for row in rows for reason in row.reasons)
        failed = [gate for gate in dict.fromkeys((*run.start.gates, *dropped, *off)) if dropped[gate] or off[gate]]
        calibrated = run.at(Calibrated, event.round)
        yield Filtered(
            event=event,
            n=len(rows),
            n_kept=sum(row.kept for row in rows),
            dropped=sorted(((gate, dropped[gate], off[gate]) for gate in failed), key=lambda row: -row[1]),
            calibration=() if calibrated is None else calibrated.calibration.probes,
            survival=survival(rows),
            borderline=[(name, gate, *borderline(texts_of(event), name, gate.limit)) for name, gate in cuts.items()],
        )


def survival(rows: Sequence[Scored], n_ranges: int = 8) -> list[tuple[str, int, int]]:
    """(doses, written, kept) in at most n_ranges ranges of the dose, evenly wide in its logarithm, and at dose 0."""
    doses = [row.completion.dose for row in rows]
    low = min((dose for dose in doses if dose > 0), default=1.0)
    width = math.log(max([low, *doses]) / low) / n_ranges or 1.0

    def range_of(dose: float) -> int:
        return min(n_ranges - 1, int(math.log(dose / low) / width + 1e-9)) if dose > 0 else -1

    out = []
    for i in sorted(set(map(range_of, doses))):
        group = [row for row in rows if range_of(row.completion.dose) == i]
        ends = dict.fromkeys(f"{end(row.completion.dose for row in group):.2g}" for end in (min, max))
        out.append((" to ".join(ends), len(group), sum(row.kept for row in group)))
    return out


def borderline(rows: Sequence[Written], gate: str, limit: float) -> tuple[list[Written], list[Written]]:
    """(kept rows, rows that the gate dropped), each those closest to its limit. A score that is not a number is far."""

    def distance(row: Written) -> float:
        far = abs(row.scored.scores.get(gate, math.inf) - limit)
        return math.inf if math.isnan(far) else far

    near = sorted(rows, key=distance)
    kept = [row for row in near if row.scored.kept]
    dropped = [row for row in near if gate in row.scored.reasons]
    return kept[:SHOWN_BORDERLINE], dropped[:SHOWN_BORDERLINE]
