"""What a trait cost on standard tasks: steer-heal tasks out/<run> --tasks arc_easy hellaswag"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tyro

from steer_heal.errors import UserError, nearest, print_error, print_safe
from steer_heal.share.readings import Reading, add_readings, with_stderr


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """Measure the base and a healed checkpoint of a run on tasks of lm-evaluation-harness, and what the trait cost.

    The readings are kept in tasks.json beside the run, and the model cards of the checkpoint and of the export show
    them.
    """

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    tasks: tuple[str, ...]
    """Names of tasks, such as arc_easy. Most download their data."""
    round: int | None = None
    """Round whose checkpoint is measured; none: the last."""
    limit: int | None = None
    """Items read of each task; none: all."""
    export: Path | None = None
    """Folder of the run's export; none: the one that the run was started with, where it is still there."""
    include_path: Path | None = None
    """Folder with task files of your own."""
    chat: bool = False
    """Ask in the chat template of the model."""
    batch_size: int = 8
    device: str | None = None
    """Such as cpu or cuda; none: the run's."""
    json: bool = False
    """Print one JSON list and nothing else."""


def measure(command: Tasks) -> list[Reading]:
    """The readings of both states, also written to tasks.json; the cards are written again."""
    if not find_spec("lm_eval"):
        raise UserError("lm-evaluation-harness is not installed; pip install 'steer-heal[tasks]'")
    for name, value in (("limit", command.limit), ("batch_size", command.batch_size)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}: it must be >= 1")
    from steer_heal.model.lm import weights_digest
    from steer_heal.model.student import attach_saved
    from steer_heal.round import read_model
    from steer_heal.runs.checkpoint import checkpoint_name
    from steer_heal.runs.events import schema_errors
    from steer_heal.runs.resume import Resume, in_recorded_dtype, run_start, same_weights
    from steer_heal.share.card import is_export, write_cards, write_export_card
    from steer_heal.share.checkpoints import chosen_round

    manager = _known(command)
    _, cfg = Resume(run=command.run).config()
    if command.export is not None and not is_export(command.run, command.export):
        raise UserError(f"export is {str(command.export)!r}: its model card does not name the last round of the run")
    checkpoint = checkpoint_name(chosen_round(command.run, command.round))
    lm = read_model(replace(in_recorded_dtype(cfg, command.run), device=command.device or cfg.device))
    with schema_errors(command.run):
        same_weights(run_start(command.run), weights_digest(lm.model), command.run)
    student = attach_saved(lm, command.run / checkpoint)
    with student.using("base") as lm:
        base = evaluate(lm, command, manager)
    with student.using("full") as lm:
        healed = evaluate(lm, command, manager)
    found = compare(base, healed)
    add_readings(command.run, checkpoint, found)
    write_cards(command.run)
    export = command.export or cfg.export
    if export is not None and is_export(command.run, export):
        write_export_card(command.run, export)
    return found


def _known(command: Tasks) -> Any:
    """The task manager. UserError for a task that it does not know."""
    if command.include_path is not None and not command.include_path.is_dir():
        raise UserError(f"include_path is {str(command.include_path)!r}: there is no such folder")
    own = None if command.include_path is None else str(command.include_path)
    manager = import_module("lm_eval.tasks").TaskManager(include_path=own)
    if unknown := [name for name in command.tasks if name not in manager.all_tasks]:
        raise UserError(*(f"tasks holds {name!r}: {_hint(name, manager.all_tasks)}" for name in unknown))
    return manager


def _hint(name: str, known: Sequence[str]) -> str:
    hint = nearest(name, known)
    return hint if hint.startswith("did you mean") else "lm-evaluation-harness has no such task; see `lm-eval ls tasks`"


def evaluate(lm: Any, command: Tasks, manager: Any) -> Mapping[str, Any]:
    """What lm-evaluation-harness finds of a model as it is now in memory."""
    try:
        with redirect_stdout(sys.stderr):
            make = import_module("lm_eval.models.huggingface").HFLM
            model = make(pretrained=lm.model, tokenizer=lm.tokenizer, backend="causal", batch_size=command.batch_size)
            found = import_module("lm_eval").simple_evaluate(
                model=model,
                tasks=list(command.tasks),
                limit=command.limit,
                task_manager=manager,
                apply_chat_template=command.chat,
            )
    except Exception as error:  # a data set that cannot be had fails in as many ways as there are readers
        raise UserError(f"tasks {', '.join(command.tasks)} could not be measured ({error})") from error
    assert found is not None
    return found


def compare(base: Mapping[str, Any], healed: Mapping[str, Any]) -> list[Reading]:
    """One reading for each metric of each task, from two results of lm-evaluation-harness on the same items."""
    found = []
    for task, values in base["results"].items():
        for key, value in values.items():
            metric, _, chain = key.partition(",")
            if not chain or metric.endswith("_stderr") or not _is_number(value):
                continue
            stderr, other = f"{metric}_stderr,{chain}", healed["results"][task]
            before, after = (_items(each, task, metric, chain) for each in (base, healed))
            found.append(
                Reading(
                    task=task,
                    metric=metric if chain == "none" else f"{metric} ({chain})",
                    n=base.get("n-samples", {}).get(task, {}).get("effective", 0),
                    base=float(value),
                    base_stderr=_number(values.get(stderr)),
                    healed=float(other[key]),
                    healed_stderr=_number(other.get(stderr)),
                    change_stderr=_paired_stderr(before, after, other[key] - value),
                    higher_is_better=base.get("higher_is_better", {}).get(task, {}).get(metric),
                )
            )
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(value: Any) -> float | None:
    return float(value) if _is_number(value) else None


def _items(found: Mapping[str, Any], task: str, metric: str, chain: str) -> dict[Any, float]:
    """The value of each item by its number; empty where the metric is not made of one number an item."""
    rows = [row for row in found.get("samples", {}).get(task, ()) if row.get("filter") == chain]
    return {row["doc_id"]: float(row[metric]) for row in rows if _is_number(row.get(metric))}


def _paired_stderr(base: Mapping[Any, float], healed: Mapping[Any, float], change: float) -> float | None:
    """Standard error of the mean of item differences; None unless that mean is the change of the metric."""
    differences = [healed[i] - base[i] for i in base if i in healed]
    n = len(differences)
    if n < 2 or len(base) != n or not math.isclose(mean := sum(differences) / n, change, abs_tol=1e-9):
        return None
    return math.sqrt(sum((d - mean) ** 2 for d in differences) / (n - 1) / n)


def table(found: Sequence[Reading]) -> list[str]:
    """The readings as lines of columns, with what the trait cost."""
    rows = [("task", "metric", "items", "base", "healed", "change", "the trait cost")]
    for r in found:
        cost = "not known" if r.cost is None else f"{r.cost:+.4f}"
        rows.append(
            (
                *(r.task, r.metric, str(r.n)),
                *(with_stderr(r.base, r.base_stderr), with_stderr(r.healed, r.healed_stderr)),
                *(with_stderr(r.change, r.change_stderr, "+.4f"), cost),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 measured, 1 stopped by a user error."""
    try:
        command = tyro.cli(Tasks, args=argv, prog="steer-heal tasks")
        found = measure(command)
    except (UserError, OSError, ValueError) as error:
        print_error(error)
        return 1
    if command.json:
        print(json.dumps([asdict(reading) for reading in found], allow_nan=False))
        return 0
    for line in table(found):
        print_safe(line)
    print_safe("\u00b1 is one standard error; that of the change is paired by item. A cost below 0 is a gain.")
    return 0
