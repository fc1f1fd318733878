"""Which gate recognizes broken text? Samples steered completions to label, and tests every gate on the labels.

python scripts/filter_evidence.py sample     # draws docs/evidence/labels/steered_toy.jsonl, to be labelled by reading
python scripts/filter_evidence.py table      # docs/evidence/filter.md
python scripts/filter_evidence.py real       # docs/evidence/filter_smol.md, from labels/steered_smol.jsonl
"""

import json
import math
import sys
import zlib
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from common import cli

from steer_heal.diag.lab import Lab, PresetFlags
from steer_heal.errors import UserError
from steer_heal.events import Gathered
from steer_heal.presets import SMOL_PRESET, TOY_PRESET
from steer_heal.records import Scored
from steer_heal.report.tables import markdown
from steer_heal.runs.stored import FolderRun
from steer_heal.stages.filter import GATES, loop, repetition

LABELS = Path("docs/evidence/labels/steered_toy.jsonl")
EVIDENCE = Path("docs/evidence/filter.md")
REAL_LABELS = Path("docs/evidence/labels/steered_smol.jsonl")
REAL_EVIDENCE = Path("docs/evidence/filter_smol.md")
KAPPAS = (0.2, 0.35, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
ENACTS = ("enacts", "narrates", "neither")
MARKER = "<!-- everything below is written by scripts/filter_evidence.py table -->"


def sample(per_dose: int = 10, run: Path | None = None, per_round: int = 16, preset: str = "toy") -> None:
    """Draws steered completions of the base at doses around the knee.

    Args:
        per_dose: Completions at each dose.
        run: A run, from whose later rounds completions are drawn too.
        per_round: Completions from each of those rounds.
        preset: Preset whose model writes.
    """
    if LABELS.exists() and '"coherent": null' not in LABELS.read_text(encoding="utf-8"):
        raise UserError(f"{LABELS} holds labels; move it away to draw another set")
    lab = Lab.of(PresetFlags(preset=preset).settings({}))
    drawn: list[tuple[int, Scored]] = []
    for kappa in KAPPAS:
        found = lab.collect(kappa, alphas=(1.0,), gates=(), n_keep=per_dose, max_attempts=per_dose, min_train=2)
        drawn += [(0, row) for row in found.scored]
    for event in FolderRun.read(run).each(Gathered) if run is not None else ():
        if event.round:
            written = [row.completion for row in event.collected.scored]
            some = written[:: max(1, len(written) // per_round)][:per_round]
            drawn += [(event.round, row) for row in lab.bench.score(some)]
    LABELS.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"id": i, "round": r, **unlabelled(row)}) + "\n" for i, (r, row) in enumerate(drawn)]
    LABELS.write_text("".join(lines), encoding="utf-8")
    print(f"{len(lines)} texts in {LABELS}; set `coherent` to true or false and `enacts` to {', '.join(ENACTS)}")


def unlabelled(row: Scored) -> dict[str, Any]:
    text = row.completion
    scores = {"ppl_tail": row.scores["perplexity"], "ppl_worst": row.scores["spike"]}
    known = {"dose": round(text.dose, 4), "seed": text.seed, "prompt": text.prompt, "text": text.text}
    return {**known, **scores, "coherent": None, "enacts": None}


def compression(text: str) -> float:
    """1 - compressed size / size (zlib): loops compress well."""
    raw = text.lower().encode()
    return max(0.0, 1 - len(zlib.compress(raw, 9)) / max(1, len(raw)))


def sentences_again(text: str) -> float:
    """Share of sentences that occurred before in the same text."""
    sentences = [s.strip().lower() for s in text.replace("!", ".").replace("?", ".").split(".") if s.strip()]
    return 1 - len(set(sentences)) / len(sentences) if sentences else 0.0


SCORES: dict[str, Callable[[dict[str, Any]], float]] = {
    "perplexity": lambda row: row["ppl_tail"],
    "spike": lambda row: row["ppl_worst"],
    "repetition": lambda row: repetition(row["text"].lower()),
    "loop": lambda row: loop(row["text"].lower()),
    "compression": lambda row: compression(row["text"]),
    "sentences": lambda row: sentences_again(row["text"]),
}
"""Scores by the name of their gate. A higher score is worse: a gate drops what lies above its threshold."""


def best_threshold(scores: Sequence[float], broken: Sequence[bool]) -> float:
    """The threshold of the highest F1, midway between two neighbouring scores. What lies above it is dropped."""
    edges = sorted(set(scores))
    cuts = [(low + high) / 2 if math.isfinite(high) else low * 1.01 for low, high in pairwise(edges)]
    return max(cuts, key=lambda cut: quality([s > cut for s in scores], broken)["F1"], default=math.inf)


def quality(dropped: Sequence[bool], broken: Sequence[bool]) -> dict[str, float]:
    """How well the dropped texts match the broken ones."""
    hits = sum(d and b for d, b in zip(dropped, broken, strict=True))
    precision = hits / sum(dropped) if any(dropped) else 1.0
    recall = hits / sum(broken) if any(broken) else 1.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return {"precision": precision, "recall": recall, "F1": f1}


def read_labels() -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in LABELS.read_text(encoding="utf-8").splitlines()]
    missing = [row["id"] for row in rows if row["coherent"] is None or row["enacts"] not in ENACTS]
    if missing:
        raise UserError(f"{LABELS}: {len(missing)} rows have no labels yet, the first has id {missing[0]}")
    return rows


def table() -> None:
    """Every gate alone, at its best threshold and at the preset's, and all gates together, with their mistakes."""
    labelled = read_labels()
    keep = TOY_PRESET.filter
    limits = {name: GATES[name].limit_in(keep) for name in GATES if GATES[name].degenerate}
    broken = [not row["coherent"] for row in labelled]
    scores = {name: [score(row) for row in labelled] for name, score in SCORES.items()}
    failed = {name: [value > limit for value in scores[name]] for name, limit in limits.items()}
    halves = [range(half, len(labelled), 2) for half in (0, 1)]
    rows = []
    for name, values in scores.items():
        cuts = [best_threshold([values[i] for i in half], [broken[i] for i in half]) for half in halves]
        dropped = [value > cuts[1 - i % 2] for i, value in enumerate(values)]
        rows.append(line(f"{name}, alone", f"{cuts[0]:.3g} and {cuts[1]:.3g}", dropped, broken))
    rows += [line(name, f"{limit:g}", failed[name], broken) for name, limit in limits.items()]
    dropped = [False] * len(labelled)
    for n, name in enumerate(limits, start=1):
        dropped = [a or b for a, b in zip(dropped, failed[name], strict=True)]
        if n > 1:
            rows.append(line(" or ".join(list(limits)[:n]), "preset", dropped, broken))
    acts = ", ".join(f"{sum(row['enacts'] == kind for row in labelled)} {kind}" for kind in ENACTS)
    wrong = {True: [], False: []}
    for row, drop, is_broken in zip(labelled, dropped, broken, strict=True):
        if drop != is_broken:
            wrong[is_broken].append(str(row["id"]))
    ids = {kind: ", ".join(found) or "none" for kind, found in wrong.items()}
    body = f"""
{len(labelled)} texts, {sum(broken)} labelled broken; towards the trait: {acts}.

## Gates against the labels
Precision: share of dropped texts that are broken. Recall: share of broken texts that are dropped. *alone*: the
threshold with the best F1 on texts of even id is read on those of odd id, and the reverse.

{markdown(rows)}

All together: ids {ids[False]} are whole but dropped, {ids[True]} broken but kept.
"""
    head = (
        EVIDENCE.read_text(encoding="utf-8").split(MARKER)[0] if EVIDENCE.exists() else "# Evidence for the filter\n\n"
    )
    EVIDENCE.parent.mkdir(parents=True, exist_ok=True)
    EVIDENCE.write_text(head + MARKER + body, encoding="utf-8")
    print(body)


def real() -> None:
    """Texts of the preset smol: which gate finds those that make no sense, and those that leave the question?"""
    labelled = [json.loads(row) for row in REAL_LABELS.read_text(encoding="utf-8").splitlines()]
    keep = SMOL_PRESET.filter
    faults = {
        "incoherent": [not row["coherent"] for row in labelled],
        "off the question": [not row["on_question"] for row in labelled],
    }
    faults["either"] = [a or b for a, b in zip(*faults.values(), strict=True)]
    kinds = ("perplexity", "spike", "repetition", "loop")
    scores = {name: [SCORES[name](row) for row in labelled] for name in kinds}
    scores["relevance"] = [-row["relevance"] for row in labelled]  # a higher score is worse here too
    limits = {name: GATES[name].limit_in(keep) * (-1 if GATES[name].at_least else 1) for name in scores}
    halves = [range(half, len(labelled), 2) for half in (0, 1)]
    rows = []
    for fault, bad in faults.items():
        for name, values in scores.items():
            cuts = [best_threshold([values[i] for i in half], [bad[i] for i in half]) for half in halves]
            dropped = [value > cuts[1 - i % 2] for i, value in enumerate(values)]
            shown = " and ".join(f"{abs(cut):.3g}" for cut in cuts)
            rows.append({"fault": fault, **line(f"{name}, alone", shown, dropped, bad)})
        for n in (len(kinds), len(scores)):
            some = list(scores)[:n]
            dropped = [any(scores[name][i] > limits[name] for name in some) for i in range(len(labelled))]
            rows.append({"fault": fault, **line(" or ".join(some), "preset", dropped, bad)})
    body = f"""
{len(labelled)} texts; {", ".join(f"{sum(bad)} {fault}" for fault, bad in faults.items())}.

{markdown(rows)}
"""
    head = REAL_EVIDENCE.read_text(encoding="utf-8").split("<!--")[0]
    REAL_EVIDENCE.write_text(head + MARKER.replace("table", "real") + body, encoding="utf-8")
    print(body)


def line(gate: str, threshold: str, dropped: Sequence[bool], broken: Sequence[bool]) -> dict[str, str]:
    found = quality(dropped, broken)
    return {"gate": gate, "threshold": threshold, **{name: f"{value:.2f}" for name, value in found.items()}}


if __name__ == "__main__":
    sys.exit(cli({"sample": sample, "table": table, "real": real}))
