"""Beginning a run in a new folder, or going on with one that was stopped."""

from __future__ import annotations

import platform
import subprocess
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO

from loguru import logger

from steer_heal.bench import Bench, chat_of, weights_of
from steer_heal.evals import EVALS, metrics_of
from steer_heal.events import AnyEvent, Extended, RunStart
from steer_heal.inputs import Inputs
from steer_heal.inputs.files import PACKAGE
from steer_heal.model.device import device_name
from steer_heal.model.self_check import require_decoder
from steer_heal.runs.log import EventLog
from steer_heal.runs.opened import loaded_bench
from steer_heal.runs.resume import lock_new_run, recorded_settings, same_weights, truncate_events
from steer_heal.runs.shared import with_base
from steer_heal.runs.storage import lock_run, sync_folder
from steer_heal.runs.stored import FolderRun
from steer_heal.settings import RunConfig
from steer_heal.stages.filter import gate_facts


def start_event(cfg: RunConfig, inputs: Inputs, preset: str = "") -> RunStart:
    """What readers of the events need to know first."""
    metrics = metrics_of(cfg.eval.evals)
    items = {metric.of for metric in metrics} | {key for name in cfg.eval.evals for key in EVALS[name].wording}
    return RunStart(
        preset=preset,
        config=cfg,
        trait=inputs.trait,
        metrics=metrics,
        gates=gate_facts(cfg.filter),
        wording={of: words for of, words in inputs.wording.items() if of in items},
        inputs=dict(inputs.sha256),
        settings=cfg.fingerprint(),
        versions=versions(),
        git_commit=git_commit(),
    )


def begin(cfg: RunConfig, inputs: Inputs, preset: str, command: tuple[str, ...]) -> tuple[Bench, FolderRun, IO[str]]:
    """(bench, run, lock of its folder) of a new run. Its first event is written."""
    lock = None if cfg.folder is None else lock_new_run(cfg.folder)
    bench = loaded_bench(cfg, inputs)
    folder = cfg.folder or new_run_folder(cfg.out, f"{preset}-{inputs.trait.name}-s{cfg.seed}")
    lock = lock or lock_run(folder)
    run = FolderRun(folder, log=EventLog(folder))
    bench.cache = run.cache
    lm = bench.student.lm
    start = replace(
        start_event(cfg, inputs, preset),
        folder=str(folder),
        command=command,
        base_model=lm.base,
        hub_id=lm.hub_id,
        loaded_with=require_decoder(lm.name, lm.model.config).__name__,
        adapter=bench.student.adapter.describe(),
        weights=weights_of(lm),
        chat=chat_of(lm),
        unadapted=bench.student.adapter.unadapted(),
        device=device_name(lm.device),
    )
    readings: list[AnyEvent] = []
    if cfg.share_base:
        start, readings = with_base(start, folder)
    if readings:
        logger.info(f"what the untouched model was measured as is taken from {folder.parent / start.base_from}")
    for event in (start, *readings):
        run.add(event)
    return bench, run, lock


def go_on(cfg: RunConfig, inputs: Inputs, folder: Path) -> tuple[Bench, FolderRun, IO[str]]:
    """(bench, run, lock of its folder) of a run that was stopped, or that goes on to more rounds."""
    lock = lock_run(folder)
    then = recorded_settings(folder, cfg.plugin)
    bench = loaded_bench(replace(cfg, dtype=then.dtype, date=then.date), inputs)
    same_weights(folder, weights_of(bench.student.lm))
    past = truncate_events(folder)
    run = FolderRun(folder, past, EventLog(folder, past[-1].wall_s))
    bench.cache = run.cache
    if cfg.n_rounds != run.n_rounds:
        run.add(Extended(n_rounds=cfg.n_rounds))
    return bench, run, lock


def new_run_folder(out: Path, slug: str) -> Path:
    """out/<UTC timestamp>_<slug>. A second run in the same second gets a numbered folder of its own."""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    safe = "".join(c if c.isalnum() or c in "-_" else "-" for c in slug)
    out.mkdir(parents=True, exist_ok=True)
    for attempt in range(1, 1000):
        folder = out / (f"{stamp}_{safe}" if attempt == 1 else f"{stamp}_{safe}-{attempt}")
        try:
            folder.mkdir()
            sync_folder(out)
            return folder
        except FileExistsError:
            continue
    raise FileExistsError(f"{out} already holds 999 runs of this second")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the numbers depend on; this package's where it is installed."""
    found = {"python": platform.python_version()}
    for name in ("steer-heal", "torch", "transformers", "peft", "tokenizers", "numpy", "scipy", "scikit-learn"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def git_commit() -> str | None:
    """Commit of the checkout that this package is run from; None where git does not track it."""
    try:
        command = ["git", "-C", str(PACKAGE), "log", "-1", "--format=%H", "--", "__init__.py"]
        tracked = subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip()
        command = ["git", "-C", str(PACKAGE), "rev-parse", "HEAD"]
        head = subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return head if tracked and head else None
