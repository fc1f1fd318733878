"""What was written in a run: the answers of every state, and the texts that the filter kept and dropped."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

from markupsafe import Markup, escape

from steer_heal.report.measurements import best_round, measurements, metrics_of, title
from steer_heal.report.view import Run, evenly, number, visible

Event = Mapping[str, Any]
SHOWN_PROMPTS, SHOWN_ANSWERS, SHOWN_BORDERLINE, SHOWN_TEXTS = 64, 64, 3, 24
"""Evaluation prompts; answers per state; rows on each side of each cut; kept and as many dropped texts per round."""
BEFORE = ("base", "prompted", "control")


def answers(run: Run) -> dict[str, Any]:
    """Every evaluation prompt with its answers before the loop and in the rounds, steered beside healed."""
    given = {state: answered(run, *state) for state in states(run)}
    asked = [row["prompt"] for row in given["base", -1]]
    prompts = list(dict.fromkeys(asked))[:SHOWN_PROMPTS]
    per_prompt = max(1, SHOWN_ANSWERS // max(1, len(prompts)))
    shown = []
    for prompt in prompts:
        mine = {key: [row for row in rows if row["prompt"] == prompt][:per_prompt] for key, rows in given.items()}
        pick = lambda i, *wanted, mine=mine: [mine[state][i] for state in wanted if i < len(mine[state])]
        samples = [
            {
                "before": pick(i, *((stage, -1) for stage in BEFORE)),
                "rounds": [(r, pick(i, ("steered", r), ("healed", r))) for r in run.rounds],
                "changes": [change(mine["base", -1][i], *pick(i, ("healed", r))) for r in _compared(run)],
            }
            for i in range(len(mine["base", -1]))
        ]
        shown.append((prompt, samples))
    return {
        "prompts": shown,
        "reasons": reasons(row for rows in given.values() for row in rows),
        "n_prompts_left_out": len(set(asked)) - len(shown),
        "n_answers_left_out": len(asked) - sum(len(samples) for _, samples in shown),
    }


def states(run: Run) -> list[tuple[str, int]]:
    """(stage, round) of every state that is measured, those before the loop first."""
    return [(stage, -1) for stage in BEFORE] + [(stage, r) for r in run.rounds for stage in ("steered", "healed")]


def answered(run: Run, stage: str, round_: int) -> list[dict[str, Any]]:
    """The free-text answers of one state, each with what was measured of it: the metrics that have a value for every
    text, then the gates for broken text."""
    items, metrics = run.at(stage, round_).get("items") or {}, metrics_of(run.events).values()
    read = [m for m in metrics if m.of == "text" and m.item in items and not m.form.endswith("%")]  # shares: 0 or 1
    rows = []
    for i, row in enumerate(run.texts(stage, round_)):
        own = [(m, items[m.item][i]) for m in read if i < len(items[m.item])]
        scores = [f"{title(m)} {number(x, m.form)}" for m, x in own if x not in row["scores"].values()]
        scores += [f"{gate['measures']} {number(row['scores'].get(name))}" for name, gate in run.gates().items()]
        failed = row.get("failed") or row["reasons"]
        told = {"prompt": row["prompt"], "text": row["text"], "scores": scores, "reasons": failed}
        rows.append({"stage": stage, "round": round_, **told})
    return rows


def reasons(rows: Iterable[Event]) -> list[str]:
    """Every reason that a row names, in the order of the first."""
    return list(dict.fromkeys(reason for row in rows for reason in row["reasons"]))


def _compared(run: Run) -> list[int]:
    """The rounds whose healed answers are set against the base's word by word: the best and the last."""
    healed = [m.round for m in measurements(run.events) if m.stage == "healed"]
    best = best_round(run.events) if healed else None
    return sorted({*healed[-1:], *([best.state.round] if best else [])})


def change(before: Event, *after: Event) -> dict[str, Any]:
    """Round and word diff of a healed answer against the base's; empty where there is none yet."""
    return {"round": after[0]["round"], "words": word_diff(before["text"], after[0]["text"])} if after else {}


def word_diff(before: str, after: str) -> Markup:
    """The second text with what it lacks of the first as <del>, and what is new as <ins>. A single word that stayed
    between two changes counts as changed, so that changes read in one piece. Line breaks are not kept."""
    old, new = visible(before).split(), visible(after).split()
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


def written(run: Run) -> list[dict[str, Any]]:
    """Texts of every round, evenly spaced over those that the filter kept and over those that each reason dropped."""
    found = []
    for stage, round_ in written_in(run):
        rows = run.at(stage, round_).get("completions") or ()
        groups: dict[tuple[str, ...], list[Event]] = {}
        for row in rows:
            groups.setdefault(tuple(row["reasons"][:1]), []).append(row)
        n_dropped = max(1, SHOWN_TEXTS // max(1, len(groups) - 1))
        for key, group in groups.items():
            found += [{**row, "round": round_} for row in evenly(group, n_dropped if key else SHOWN_TEXTS)]
    return found


def filters(run: Run) -> Iterator[dict[str, Any]]:
    """What the filter did in each round and with the control's text: counts, survival by dose, rows at each cut."""
    cuts = {name: gate for name, gate in run.gates().items() if gate["on"] and gate["limit"] > 0}
    for stage, round_ in written_in(run):
        event = run.at(stage, round_)
        if not event:
            continue
        rows, dose = event["completions"], run.at("dose", round_)
        off = Counter(gate for row in rows for gate in row.get("failed", ()) if gate not in row["reasons"])
        dropped = Counter(reason for row in rows for reason in row["reasons"])
        failed = [gate for gate in dict.fromkeys((*run.start["gates"], *dropped, *off)) if dropped[gate] or off[gate]]
        yield {
            "round": round_,
            "n": len(rows),
            "n_kept": sum(row["keep"] for row in rows),
            "n_train": event["n_train"],
            "n_rehearsed": len(event["rehearsal"]),
            "kappa": dose.get("kappa"),
            "mode": dose.get("mode"),
            "calibration": run.at("calibration", round_).get("probes", []),
            "dropped": sorted(((gate, dropped[gate], off[gate]) for gate in failed), key=lambda row: -row[1]),
            "survival": survival(rows),
            "borderline": [(name, gate, *borderline(rows, name, gate["limit"])) for name, gate in cuts.items()],
        }


def written_in(run: Run) -> list[tuple[str, int]]:
    """(stage, round) of the events with text to train on."""
    return [("control_gen", -1)] + [("gen", r) for r in run.rounds]


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
