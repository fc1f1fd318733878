"""Everything about a configuration that can be known before a model is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from steer_heal.errors import Problems, UserError, nearest
from steer_heal.inputs import Inputs, load_inputs
from steer_heal.records import Trait
from steer_heal.settings import RunConfig


def check(cfg: RunConfig, *, resumed: bool = False) -> Inputs:
    """The parsed inputs of a valid configuration. UserError with a line for each thing that is wrong.

    The export of a `resumed` run may be there already.
    """
    problems, inputs = Problems(), None
    with problems.noted():
        inputs = load_inputs(cfg)
    with problems.noted():
        _check_names(cfg, inputs.trait if inputs is not None else None)
    if cfg.quantize != "none" and not find_spec("bitsandbytes"):
        problems.found.append(
            f"quantize is {cfg.quantize!r}: its package is not installed; pip install -e '.[quantize]', or leave it out"
        )
    if cfg.quantize != "none" and cfg.export is not None:
        problems.found.append(
            f"export is {str(cfg.export)!r}: a quantized model cannot be merged; leave out --export or --quantize"
        )
    for field_name, folder in (("out", cfg.out), ("export", cfg.export)):
        with problems.noted():
            _check_writable(field_name, folder)
    if not resumed and cfg.export is not None and holds_files(cfg.export):
        problems.found.append(f"export is {str(cfg.export)!r}: that folder is not empty; give a new one, or empty it")
    problems.raise_if_any()
    assert inputs is not None
    return inputs


def _check_names(cfg: RunConfig, trait: Trait | None) -> None:
    """Every name in the settings and the trait is in its table; the optional packages that are asked for serve."""
    from steer_heal.backends import steering_lite, tinymfv  # the tables hold functions on tensors: this imports torch
    from steer_heal.evals import EVALS, metrics_of
    from steer_heal.model.divergence import DIVERGENCES
    from steer_heal.model.steering import METHODS
    from steer_heal.stages.filter import GATES

    problems = Problems()

    def known(setting: str, names: Iterable[str], table: Iterable[str]) -> None:
        table = list(table)
        problems.found.extend(f"{setting} is {n!r}: {nearest(n, table)}" for n in names if n not in table)

    known("heal.divergence", [cfg.heal.divergence], DIVERGENCES)
    known("steer.method", [cfg.steer.method], METHODS)
    known("filter.gates", cfg.filter.gates, GATES)
    known("eval.evals", cfg.eval.evals, EVALS)
    problems.raise_if_any()
    if cfg.dose.mode == "survival" and not any(GATES[name].broken for name in cfg.filter.gates):
        gates = ", ".join(name for name, gate in GATES.items() if gate.broken)
        problems.found.append(
            f"filter.gates is {cfg.filter.gates!r}: without a gate for broken text ({gates}) every dose survives, so "
            "dose.mode survival would pick the ceiling; or give --dose.mode fixed --dose.kappa K, or --dose.mode iso_kl"
        )
    if cfg.steer.backend == "steering-lite":
        with problems.noted():
            steering_lite.check(cfg.steer.method)
    if cfg.eval.backend == "tinymfv":
        with problems.noted():
            tinymfv.check()
    if trait is not None:
        metrics = metrics_of(cfg.eval.evals)
        names, targets = [m.name for m in metrics], [m.name for m in metrics if m.moved is not None]
        owners = {metric.name: name for name, each in EVALS.items() for metric in each.metrics}
        judges = {owners[name]: None for name in (trait.target, *trait.off_targets) if name in owners}
        if lacking := ", ".join(name for name in judges if name not in cfg.eval.evals):
            problems.found.append(
                f"eval.evals is {cfg.eval.evals!r}: trait {trait.name!r} is judged by {lacking}; add it"
            )
        else:
            known(f"trait {trait.name!r}: target", [trait.target], targets)
            known(f"trait {trait.name!r}: off_targets", trait.off_targets, names)
    problems.raise_if_any()


def _check_writable(field_name: str, folder: Path | None) -> None:
    """UserError unless the folder can be made and written to; nothing is made yet."""
    if folder is None:
        return
    try:
        there = next(place for place in (folder, *folder.resolve().parents) if place.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise OSError(f"{there} is {'not writable' if there.is_dir() else 'not a folder'}")
    except (OSError, ValueError, RuntimeError) as error:  # too long, a zero byte, a loop of links
        raise UserError(
            f"{field_name} is {str(folder)!r}: no folder can be made there ({error}); give another --{field_name}"
        ) from None


def holds_files(folder: Path) -> bool:
    """Whether anything is in the folder: an export never overwrites a model."""
    return folder.is_dir() and any(folder.iterdir())
