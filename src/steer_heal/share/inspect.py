"""A run as an evaluation log of inspect_ai: steer-heal inspect out/<run>, then inspect view."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tyro

from steer_heal.errors import UserError, print_error, print_safe


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Write the answers and the items of every measured state of a run as a log that `inspect view` opens."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    out: Path | None = None
    """File that ends in .eval or .json; none: inspect.eval in the folder of the run."""


def write_log(command: Inspect) -> Path:
    """Writes the log, made from the events alone; returns its path."""
    if not find_spec("inspect_ai"):
        raise UserError("inspect_ai is not installed; pip install 'steer-heal[inspect]'")
    out = command.out or command.run / "inspect.eval"
    if out.suffix not in (".eval", ".json"):
        raise UserError(f"out is {str(out)!r}: it must end in .eval or .json")
    from steer_heal.runs.events import current, last_hash, read_events, schema_errors
    from steer_heal.runs.storage import atomic_write

    with schema_errors(command.run):
        log = eval_log(current(read_events(command.run)), last_hash(command.run))
    with atomic_write(out) as part:
        import_module("inspect_ai.log").write_eval_log(
            log, str(part), format="json" if out.suffix == ".json" else "eval"
        )
    return out


def eval_log(events: Sequence[Mapping[str, Any]], digest: str) -> Any:
    """An EvalLog: one sample for each answer, vignette and contrast pair in each state, one score for each state."""
    from steer_heal.report.measurements import measurements, metrics_of, run_start, verdict

    logs, start, end = import_module("inspect_ai.log"), run_start(events), events[-1]
    states, names = measurements(events), list(metrics_of(events))
    rows = [sample for state in states for sample in samples(events, state)]
    scores = [
        logs.EvalScore(
            name=state.state,
            scorer=state.stage,
            metrics={name: logs.EvalMetric(name=name, value=v) for name in names if (v := state[name]) is not None},
        )
        for state in states
    ]
    trait = start["trait"]
    spec = logs.EvalSpec(
        created=start["t"],
        task=f"steer-heal {trait['name']}",
        dataset=logs.EvalDataset(name=trait["name"], samples=len(rows), sample_ids=[row.id for row in rows]),
        model=f"steer-heal/{start['config']['model']}",
        config=logs.EvalConfig(),
        packages={"steer-heal": start["versions"].get("steer-heal", "unknown")},
        metadata={"verdict": verdict(events), "last_hash": digest, "settings": start["config"], "seed": start["seed"]},
    )
    whole = end["stage"] == "run_end" and not end.get("error")
    return logs.EvalLog(
        status="success" if whole else "cancelled",
        eval=spec,
        results=logs.EvalResults(total_samples=len(rows), completed_samples=len(rows), scores=scores),
        stats=logs.EvalStats(started_at=start["t"], completed_at=end["t"]),
        samples=rows,
    )


def samples(events: Sequence[Mapping[str, Any]], state: Any) -> Iterator[Any]:
    """The samples of one state. An item without a value has no score; one without wording in the events is told by its
    number."""
    from steer_heal.report.measurements import metrics_of, run_start

    make_sample, make_score = import_module("inspect_ai.log").EvalSample, import_module("inspect_ai.scorer").Score
    output = import_module("inspect_ai.model").ModelOutput
    at = lambda stage: next(e for e in events if (e["stage"], e["round"]) == (stage, state.round))
    texts = at("adapter_gen" if state.stage == "healed" else state.stage)["texts"]
    items, wording = at(state.stage)["items"], run_start(events).get("wording", {})
    for kind in ("text", "vignette", "pair"):
        series = {metric.item: items[metric.item] for metric in metrics_of(events).values() if metric.of == kind}
        words = wording.get(kind, [])
        for i in range(len(texts) if kind == "text" else max(map(len, series.values()), default=0)):
            if kind == "text":
                row = texts[i]
                asks, target, told = row["prompt"], "", row["text"]
                more = {"scores": row["scores"], "failed": row["failed"]}
            else:
                asks, target, *negative = words[i] if i < len(words) else (f"{kind} {i + 1}", "")
                told, more = "", {"negative": negative[0]} if negative else {}
            values = {name: value for name, row in series.items() if (value := row[i]) is not None}
            if values or kind == "text":
                yield make_sample(
                    id=f"{state.state}, {kind} {i}",
                    epoch=1,
                    input=asks,
                    target=target,
                    output=output.from_content(state.state, told),
                    scores={name: make_score(value=value) for name, value in values.items() if math.isfinite(value)},
                    metadata={"state": state.stage, "round": state.round, **more},
                )


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 written, 1 stopped by a user error."""
    try:
        print_safe(f"{write_log(tyro.cli(Inspect, args=argv, prog='steer-heal inspect'))}; open it with inspect view")
    except (UserError, OSError) as error:
        print_error(error)
        return 1
    return 0
