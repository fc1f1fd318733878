"""steer-heal inspect RUN: writes a run as an evaluation log of inspect_ai."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from steer_heal.errors import UserError, print_safe
from steer_heal.events import Measured, Run, plain
from steer_heal.flags import parsed
from steer_heal.report import console
from steer_heal.runs.chosen import run_and_round
from steer_heal.runs.log import last_hash, read_events, read_start, schema_errors
from steer_heal.runs.storage import atomic_write
from steer_heal.settings import AllowBroken, RoundName, RunFolder, as_json, settings
from steer_heal.verdict import round_words, verdict


@settings("")
class Inspect:
    """Write the answers and eval items of a run to a log file that `inspect view` opens: those of one round and of the
    states before the loop, or with --all-rounds of every measured state."""

    run: RunFolder
    """Folder of the run."""
    round: RoundName | None = None
    """Round whose answers are written: its number (from 1), last (the last round that was kept), or best (the one that
    the verdict names). Default: best."""
    all_rounds: bool = False
    """Every round, also of a run without a healed one."""
    allow_broken: AllowBroken = False
    out: Path | None = None
    """File of the log, which ends in .eval or .json. Default: inspect.eval in the folder of the run."""


def main(argv: Sequence[str]) -> int:
    given, _ = parsed(Inspect, argv, "inspect")
    if given.all_rounds and (given.round is not None or given.allow_broken):
        raise UserError("--all-rounds takes every round, so --round and --allow-broken have no effect; leave them out")
    read_start(given.run)
    if not find_spec("inspect_ai"):
        raise UserError("inspect_ai is not installed; pip install 'steer-heal[inspect]'")
    out = given.out or given.run / "inspect.eval"
    if out.suffix not in (".eval", ".json"):
        raise UserError(f"out is {str(out)!r}: it must end in .eval or .json")
    console.lines()
    with schema_errors(given.run):
        if given.all_rounds:
            run = Run(read_events(given.run))
            rounds = [event.round for event in run.each(Measured)]
        else:
            run, r = run_and_round(given.run, given.round or "best", allow_broken=given.allow_broken)
            rounds = [None, r]
            print_safe(round_words(run, r))
        log = eval_log(run, last_hash(given.run), rounds)
    with atomic_write(out) as part:
        import_module("inspect_ai.log").write_eval_log(log, str(part), format=out.suffix[1:])
    print_safe(f"{out}; open it with inspect view")
    return 0


def eval_log(run: Run, digest: str, rounds: Collection[int | None]) -> Any:
    """An EvalLog with one sample per answer, vignette and contrast pair of each state of these rounds, and one score
    per state.

    `digest` is the hash of the run's last event.
    """
    logs = import_module("inspect_ai.log")
    start = run.start
    states = [state for state in run.each(Measured) if state.round in rounds]
    rows = [sample for state in states for sample in samples(run, state)]
    spec = logs.EvalSpec(
        created=start.t,
        task=f"steer-heal {start.trait.name}",
        dataset=logs.EvalDataset(name=start.trait.name, samples=len(rows), sample_ids=[row.id for row in rows]),
        model=f"steer-heal/{start.config.model}",
        config=logs.EvalConfig(),
        packages={"steer-heal": start.versions.get("steer-heal", "unknown")},
        metadata={
            "verdict": verdict(run),
            "last_hash": digest,
            "settings": as_json(start.config),
            "seed": start.config.seed,
            "weights": "" if start.weights is None else start.weights.note,
        },
    )
    scores = [_score_of(state, run) for state in states]
    return logs.EvalLog(
        status="cancelled" if run.end is None else "success",
        eval=spec,
        results=logs.EvalResults(total_samples=len(rows), completed_samples=len(rows), scores=scores),
        stats=logs.EvalStats(started_at=start.t, completed_at=run.events[-1].t),
        samples=rows,
    )


def _score_of(state: Measured, run: Run) -> Any:
    """The EvalScore of a state: all of its metrics that have a value."""
    logs = import_module("inspect_ai.log")
    values = {name: value for name in run.metrics if (value := state[name]) is not None and math.isfinite(value)}
    metrics = {name: logs.EvalMetric(name=name, value=value) for name, value in values.items()}
    return logs.EvalScore(name=state.label, scorer=state.state, metrics=metrics)


def samples(run: Run, state: Measured) -> Iterator[Any]:
    """The samples of one state. An item without a value has no score. An item whose wording was not recorded is named
    by its number."""
    make_sample = import_module("inspect_ai.log").EvalSample
    make_score = import_module("inspect_ai.scorer").Score
    make_output = import_module("inspect_ai.model").ModelOutput.from_content
    for kind in ("text", "vignette", "pair", "question", "instruction"):
        series = {metric.item: state.items[metric.item] for metric in run.metrics.values() if metric.of == kind}
        wording = run.start.wording.get(kind, [])
        n = len(state.texts) if kind == "text" else max(map(len, series.values()), default=0)
        for i in range(n):
            values = {name: row[i] for name, row in series.items() if i < len(row) and math.isfinite(row[i])}
            metadata = {"state": state.state, "round": state.round}
            words = wording[i] if i < len(wording) else [f"{kind} {i + 1}", ""]
            output = ""
            if kind == "text":
                answer = state.texts[i]
                words = [answer.prompt, ""]
                output = answer.text
                metadata |= {"scores": plain(answer.scores), "failed": list(answer.failed)}
            elif not values:
                continue
            if len(words) > 2:
                metadata["negative"] = words[2]
            yield make_sample(
                id=f"{state.label}, {kind} {i}",
                epoch=1,
                input=words[0],
                target=words[1],
                output=make_output(state.label, output),
                scores={name: make_score(value=value) for name, value in values.items()},
                metadata=metadata,
            )
