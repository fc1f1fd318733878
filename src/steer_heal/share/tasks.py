"""Standard tasks of lm-evaluation-harness: what they measure of a model, and how base and healed compare."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from steer_heal.errors import UserError, nearest
from steer_heal.share.readings import Reading

Results = Mapping[str, Any]
"""What lm-evaluation-harness returns."""


def task_manager(tasks: Sequence[str], include_path: Path | None) -> Any:
    """The TaskManager, which also finds the task files in `include_path`. UserError for each unknown task."""
    if include_path is not None and not include_path.is_dir():
        raise UserError(f"include_path is {str(include_path)!r}: there is no such folder")
    own = None if include_path is None else str(include_path)
    manager = import_module("lm_eval.tasks").TaskManager(include_path=own)
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        raise UserError(*(f"unknown task {name!r}; {_hint(name, manager.all_tasks)}" for name in unknown))
    return manager


def _hint(name: str, known: Sequence[str]) -> str:
    """The closest task, but never the list of all: there are thousands."""
    hint = nearest(name, known)
    return hint if hint.startswith("did you mean") else "`lm-eval ls tasks` lists them"


def evaluate(lm: Any, tasks: Sequence[str], manager: Any, *, limit: int | None, chat: bool, batch_size: int) -> Results:
    """Results of a model as it is now in memory.

    Args:
        limit: Number of items per task. None: all.
        chat: Whether the chat template of the model is applied.
    """
    try:
        with redirect_stdout(sys.stderr):
            make = import_module("lm_eval.models.huggingface").HFLM
            model = make(pretrained=lm.model, tokenizer=lm.tokenizer, backend="causal", batch_size=batch_size)
            found = import_module("lm_eval").simple_evaluate(
                model=model, tasks=list(tasks), limit=limit, task_manager=manager, apply_chat_template=chat
            )
    except Exception as error:  # each task has its own ways to fail when it loads its data
        raise UserError(f"tasks {', '.join(tasks)} could not be measured ({error})") from error
    assert found is not None
    return found


def compare(base: Results, healed: Results) -> list[Reading]:
    """One reading for each metric of each task, from the results of both states on the same items."""
    found = []
    for task, values in base["results"].items():
        for key, value in values.items():
            metric, _, chain = key.partition(",")
            if not chain or metric.endswith("_stderr") or not _is_number(value):
                continue
            stderr = f"{metric}_stderr,{chain}"
            other = healed["results"][task]
            before = _items(base, task, metric, chain)
            after = _items(healed, task, metric, chain)
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


def _items(found: Results, task: str, metric: str, chain: str) -> dict[int, float]:
    """The value of each item by its number. Empty if the metric is not made of one number per item."""
    rows = [row for row in found.get("samples", {}).get(task, ()) if row.get("filter") == chain]
    return {row["doc_id"]: float(row[metric]) for row in rows if _is_number(row.get(metric))}


def _paired_stderr(base: Mapping[int, float], healed: Mapping[int, float], change: float) -> float | None:
    """Standard error of the mean of item differences. None unless that mean is the change of the metric."""
    differences = [healed[i] - base[i] for i in base if i in healed]
    if not 2 <= len(differences) == len(base) or not math.isclose(fmean(differences), change, abs_tol=1e-9):
        return None
    return stdev(differences) / math.sqrt(len(differences))
