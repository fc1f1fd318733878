"""Which gate tells broken text from whole text? Samples steered completions to label, and reads every gate against the labels.

python scripts/filter_evidence.py sample     # data/labels/steered_toy.jsonl, labels empty: read each text and fill them in
python scripts/filter_evidence.py table      # docs/evidence/filter.md
"""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import tyro

from steer_heal.events import of_stage, read_events
from steer_heal.lab import Lab, LabCfg, completion
from steer_heal.records import Scored, UserError
from steer_heal.stages.filter import loop, repetition, score

LABELS = Path("data/labels/steered_toy.jsonl")
EVIDENCE = Path("docs/evidence/filter.md")
KAPPAS = (0.2, 0.35, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def sample(lab: LabCfg, per_dose: int = 10, run: Path | None = None, per_round: int = 16) -> None:
    """Steered completions of the base at doses around the knee and, with --run, of the later rounds of that run, without labels."""
    if LABELS.exists() and '"coherent": null' not in LABELS.read_text(encoding="utf-8"):
        raise UserError(f"{LABELS} holds labels; move it away to draw another set")
    events = read_events(run) if run else []
    bench = Lab(lab.run_config())
    keep = replace(bench.cfg.filter, gates=(), n_keep=per_dose, max_attempts=per_dose, min_train=2)
    rows = []
    for kappa in KAPPAS:
        for row in bench.collect(bench.cfg.dose, keep, kappa=kappa, alphas=(1.0,)).scored:
            rows.append({"round": 0} | _unlabelled(row))
    for event in of_stage(events, "gen")[1:]:
        written = [completion(row) for row in event["completions"]]
        with bench.student.gate("base") as lm:
            for row in score(
                lm, written[:: max(1, len(written) // per_round)][:per_round], bench.trait.narration, keep
            ):
                rows.append({"round": event["round"]} | _unlabelled(row))
    LABELS.parent.mkdir(parents=True, exist_ok=True)
    LABELS.write_text("".join(json.dumps({"id": i, **row}) + "\n" for i, row in enumerate(rows)), encoding="utf-8")
    print(f"{len(rows)} texts in {LABELS}; set `coherent` to true or false and `enacts` to enacts, narrates or neither")


def _unlabelled(row: Scored) -> dict:
    c = row.completion
    return {
        "dose": round(c.dose, 4),
        "seed": c.seed,
        "prompt": c.prompt,
        "text": c.text,
        "ppl_tail": row.scores["ppl_tail"],
        "ppl_worst": row.scores["ppl_worst"],
        "coherent": None,
        "enacts": None,
    }


def compression(text: str) -> float:
    """1 - compressed size / size (zlib): loops compress well."""
    import zlib

    raw = text.lower().encode()
    return max(0.0, 1 - len(zlib.compress(raw, 9)) / max(1, len(raw)))


def sentences_again(text: str) -> float:
    """Share of sentences that were said before in the same text."""
    sentences = [s.strip().lower() for s in text.replace("!", ".").replace("?", ".").split(".") if s.strip()]
    return 1 - len(set(sentences)) / len(sentences) if sentences else 0.0


GATES: dict[str, Callable[[dict], float]] = {
    "perplexity": lambda row: row["ppl_tail"],
    "spike": lambda row: row["ppl_worst"],
    "repetition": lambda row: repetition(row["text"].lower()),
    "loop": lambda row: loop(row["text"].lower()),
    "compression": lambda row: compression(row["text"]),
    "sentences": lambda row: sentences_again(row["text"]),
}
"""Scores that are higher the more broken a text is; a gate drops what lies above its threshold."""


def best_threshold(scores: list[float], broken: list[bool]) -> tuple[float, float, float]:
    """(threshold, precision, recall) of dropping what lies above: the highest F1, midway between neighbouring scores."""
    best = (math.inf, 0.0, 0.0)
    edges = sorted(set(scores))
    for low, high in zip(edges, edges[1:]):
        cut = (low + high) / 2 if math.isfinite(high) else low * 1.01
        precision, recall = quality([s > cut for s in scores], broken)
        if _f1(precision, recall) > _f1(*best[1:]):
            best = (cut, precision, recall)
    return best


def quality(dropped: list[bool], broken: list[bool]) -> tuple[float, float]:
    """(precision, recall) of dropping broken text."""
    hits = sum(d and b for d, b in zip(dropped, broken, strict=True))
    return (hits / sum(dropped) if any(dropped) else 1.0), (hits / sum(broken) if any(broken) else 1.0)


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def table(lab: LabCfg) -> None:
    """Every gate alone, at its best threshold and at the preset's; all together; the borderline rows."""
    rows = [json.loads(line) for line in LABELS.read_text(encoding="utf-8").splitlines()]
    unlabelled = [
        row["id"] for row in rows if row["coherent"] is None or row["enacts"] not in ("enacts", "narrates", "neither")
    ]
    if unlabelled:
        raise UserError(f"{LABELS}: {len(unlabelled)} rows have no labels yet, the first has id {unlabelled[0]}")
    keep = lab.run_config().filter
    preset = {"perplexity": keep.ppl_max, "spike": keep.spike_max, "repetition": keep.rep_max, "loop": keep.loop_max}
    broken = [not row["coherent"] for row in rows]
    scores = {name: [gate(row) for row in rows] for name, gate in GATES.items()}
    lines = ["| gate | threshold | precision | recall | F1 |", "|---|---|---|---|---|"]

    def line(name: str, threshold: str, dropped: list[bool]) -> None:
        precision, recall = quality(dropped, broken)
        lines.append(f"| {name} | {threshold} | {precision:.2f} | {recall:.2f} | {_f1(precision, recall):.2f} |")

    halves = [range(half, len(rows), 2) for half in (0, 1)]
    for name, values in scores.items():
        cuts = [best_threshold([values[i] for i in half], [broken[i] for i in half])[0] for half in halves]
        line(f"{name}, alone", f"{cuts[0]:.3g} and {cuts[1]:.3g}", [v > cuts[1 - i % 2] for i, v in enumerate(values)])
    for name, cut in preset.items():
        line(f"{name}, as in the preset", f"{cut:g}", [v > cut for v in scores[name]])
    together: list[str] = []
    for name in preset:
        together.append(name)
        line(
            " or ".join(together),
            "as in the preset",
            [any(scores[n][i] > preset[n] for n in together) for i in range(len(rows))],
        )
    border = [
        "| id | dose | coherent | " + " | ".join(preset) + " | dropped by | end of the text |",
        "|---|" + "---|" * (4 + len(preset)),
    ]
    distance = lambda i: min(abs(math.log(max(scores[n][i], 1e-3) / preset[n])) for n in preset)
    for i in sorted(range(len(rows)), key=distance)[:16]:
        gates = [n for n in preset if scores[n][i] > preset[n]]
        text = rows[i]["text"][-90:].replace("|", "/").replace("\n", " ")
        border.append(
            f"| {rows[i]['id']} | {rows[i]['dose']:g} | {rows[i]['coherent']} | "
            + " | ".join(f"{scores[n][i]:.2f}" for n in preset)
            + f" | {', '.join(gates)} | ...{text} |"
        )
    wrong = [i for i in range(len(rows)) if any(scores[n][i] > preset[n] for n in preset) != broken[i]]
    misses = [
        f"- id {rows[i]['id']}, dose {rows[i]['dose']:g}, {'broken but kept' if broken[i] else 'whole but dropped'}: ...{rows[i]['text'][-160:]}"
        for i in wrong
    ]
    acts = {kind: sum(row["enacts"] == kind for row in rows) for kind in ("enacts", "narrates", "neither")}
    marker = "<!-- everything below is written by scripts/filter_evidence.py table -->"
    head = (
        EVIDENCE.read_text(encoding="utf-8").split(marker)[0] if EVIDENCE.exists() else "# Evidence for the filter\n\n"
    )
    body = [
        f"{len(rows)} texts, {sum(broken)} labelled broken; {acts['enacts']} enact the trait, {acts['narrates']} narrate it, {acts['neither']} do neither.",
        "",
        "## Gates against the labels",
        "Precision: share of dropped texts that are broken. Recall: share of broken texts that are dropped. `alone`: the threshold with the best F1 on the texts of",
        "even id is read on those of odd id, and the other way round, so no text judges its own threshold.",
        "",
        *lines,
        "",
        "## Borderline rows",
        "The rows closest to any threshold, on either side.",
        "",
        *border,
        "",
        "## What the gates together get wrong",
        "",
        *(misses or ["Nothing."]),
    ]
    EVIDENCE.parent.mkdir(parents=True, exist_ok=True)
    EVIDENCE.write_text(head + marker + "\n" + "\n".join(body) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    try:
        tyro.extras.subcommand_cli_from_dict({"sample": sample, "table": table}, description=__doc__)
    except UserError as error:
        sys.exit(f"error: {error}")
