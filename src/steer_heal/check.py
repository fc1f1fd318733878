"""Everything about a configuration that can be known before a model is loaded.

Problems are told in two steps: all of files, folders and trackers, without torch; then all of names. The device is
looked for between them, and told alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from importlib.util import find_spec
from os.path import exists
from pathlib import Path
from tempfile import TemporaryDirectory

from steer_heal.backends import track
from steer_heal.errors import Problems, UserError, nearest
from steer_heal.inputs import Inputs, load_inputs
from steer_heal.inputs.files import PACKAGE
from steer_heal.inputs.traits import TraitFile
from steer_heal.records import Trait
from steer_heal.settings import RunConfig

TRIAL = ".steer-heal-"
"""How the name of a folder begins that is made to see whether one can be."""


def check(cfg: RunConfig, *, resumed: bool = False) -> Inputs:
    """The parsed inputs of a valid configuration. UserError with a line for each thing that is wrong in a step.

    The export of a `resumed` run may be there already.
    """
    problems, inputs = Problems(), None
    with problems.noted():
        inputs = _read(cfg)
    with problems.noted():
        check_model(cfg.model)
    with problems.noted():
        track.check(cfg.track)
    if cfg.quantize != "none" and cfg.export is not None:
        problems.found.append(
            f"export is {str(cfg.export)!r}: a quantized model cannot be merged; leave out --export or --quantize"
        )
    for field_name, folder in (("folder", cfg.folder) if cfg.folder else ("out", cfg.out), ("export", cfg.export)):
        with problems.noted():
            _check_writable(field_name, folder)
    if not resumed and cfg.export is not None and holds_files(cfg.export):
        problems.found.append(f"export is {str(cfg.export)!r}: that folder is not empty; give a new one, or empty it")
    problems.raise_if_any()
    assert inputs is not None
    return _with_names(cfg, inputs)


def check_model(name: str) -> None:
    """UserError for a path where nothing is. Any other name may be one of the hub, which is asked on loading."""
    is_path = name.startswith((".", "/", "~")) or name.endswith(".gguf") or name.count("/") > 1
    if is_path and not any(exists(folder / name) for folder in (Path(), PACKAGE)):
        raise UserError(f"model is {name!r}: there is no such folder or file; give an existing path, or a hub id")


def check_inputs(cfg: RunConfig, trait: TraitFile | None = None) -> Inputs:
    """As `check`, without the folders that are written to. `trait`: see load_inputs."""
    return _with_names(cfg, _read(cfg, trait))


def _read(cfg: RunConfig, trait: TraitFile | None = None) -> Inputs:
    """What can be checked without torch, whose import takes seconds."""
    problems, inputs = Problems(), None
    with problems.noted():
        inputs = load_inputs(cfg, trait)
    if cfg.quantize != "none" and not find_spec("bitsandbytes"):
        problems.found.append(
            f"quantize is {cfg.quantize!r}: its package is not installed; pip install 'steer-heal[quantize]', or leave "
            "it out"
        )
    problems.raise_if_any()
    assert inputs is not None
    return inputs


def _with_names(cfg: RunConfig, inputs: Inputs) -> Inputs:
    """The inputs, once the device is there and every name in the settings and in the trait is known."""
    from steer_heal.model.device import pick_device

    pick_device(cfg.device)  # alone: torch is imported by now, and transformers is not
    problems = Problems()
    with problems.noted():
        _check_names(cfg)
    with problems.noted():
        inputs = replace(inputs, trait=_judged(cfg, inputs))
    problems.raise_if_any()
    return inputs


def _check_names(cfg: RunConfig) -> None:
    """Every name in the settings is in its table; the optional packages that are asked for serve."""
    from steer_heal.backends import steering_lite, tinymfv  # the tables hold functions on tensors: this imports torch
    from steer_heal.evals import EVALS
    from steer_heal.model.divergence import DIVERGENCES
    from steer_heal.model.steering import METHODS
    from steer_heal.model.student import ADAPTERS
    from steer_heal.stages.filter import GATES

    problems = Problems()
    problems.found += _unknown("heal.divergence", [cfg.heal.divergence], DIVERGENCES)
    problems.found += _unknown("steer.method", [cfg.steer.method], METHODS)
    problems.found += _unknown("adapter.kind", [cfg.adapter.kind], ADAPTERS)
    problems.found += _unknown("filter.gates", cfg.filter.gates, GATES)
    problems.found += _unknown("eval.evals", cfg.eval.evals, EVALS)
    problems.raise_if_any()
    if not ADAPTERS[cfg.adapter.kind].updates_weights:
        kind = f"adapter.kind {cfg.adapter.kind!r} adapts no weight matrices"
        if cfg.heal.spectral:
            problems.found.append(f"heal.spectral is {cfg.heal.spectral:g}: it must be 0, since {kind}")
        if cfg.export is not None:
            problems.found.append(f"export is {str(cfg.export)!r}: {kind}, so it cannot be merged; leave --export out")
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
    problems.raise_if_any()


def _judged(cfg: RunConfig, inputs: Inputs) -> Trait:
    """The trait, judged by the first of its targets that is measured, without the off-targets that are not.

    UserError also where an eval needs data that the trait lacks.
    """
    from steer_heal.evals import EVALS, metrics_of

    problems, trait = Problems(), inputs.trait
    if _unknown("eval.evals", cfg.eval.evals, EVALS):
        return trait
    for name in cfg.eval.evals:
        problems.found += [
            f"eval.evals holds {name!r}: trait {trait.name!r} has no {field}; write [[{field}]] or {field}_file in its "
            f"file, give --eval.{field}, or leave {name} out"
            for field in EVALS[name].needs
            if not getattr(inputs, field)
        ]
    owners = {metric.name: name for name, each in EVALS.items() for metric in each.metrics}
    judges = [metric.name for metric in metrics_of(tuple(EVALS)) if metric.moved is not None]
    problems.found += _unknown(f"trait {trait.name!r}: target", inputs.targets, judges)
    problems.found += _unknown(f"trait {trait.name!r}: off_targets", trait.off_targets, owners)
    problems.raise_if_any()
    measured = [metric.name for metric in metrics_of(cfg.eval.evals)]
    problems.found += _unknown("backtrack.limits", cfg.backtrack.limits, measured)
    health = [m for m in metrics_of(cfg.eval.evals) if m.good is not None and m.broken is not None]
    if cfg.backtrack.retries and not health and not cfg.backtrack.limits:
        problems.found.append(
            f"backtrack.retries is {cfg.backtrack.retries}: no eval of {cfg.eval.evals!r} says whether a model is "
            "whole; add text_quality, or give --backtrack.limits"
        )
    problems.raise_if_any()
    target = next((name for name in inputs.targets if name in measured), None)
    if target is None:
        wanted = " or ".join(dict.fromkeys(owners[name] for name in inputs.targets))
        raise UserError(f"eval.evals is {cfg.eval.evals!r}: trait {trait.name!r} is judged by {wanted}; add it")
    return replace(trait, target=target, off_targets=tuple(name for name in trait.off_targets if name in measured))


def _unknown(setting: str, names: Iterable[str], table: Iterable[str]) -> list[str]:
    """A line for each name that the table lacks, with the nearest that it has."""
    table = list(table)
    return [f"{setting} is {name!r}: {nearest(name, table)}" for name in names if name not in table]


def _check_writable(field_name: str, folder: Path | None) -> None:
    """UserError unless the folder can be made and written to. Nothing stays of the trial."""
    if folder is None:
        return
    try:
        there = next(place for place in (folder, *folder.resolve().parents) if place.exists())
        if not there.is_dir():
            raise ValueError(f"{there} is not a folder")
        _try_to_write(there)
    except (OSError, ValueError, RuntimeError) as error:  # too long, a zero byte, a loop of links
        why = getattr(error, "strerror", None) or error
        raise UserError(
            f"{field_name} is {str(folder)!r}: no folder can be made there ({why}); give another --{field_name}"
        ) from None


def _try_to_write(folder: Path) -> None:
    """ValueError where the folder takes nothing new. Its rights do not tell: /proc seems writable, a full disk too."""
    try:
        with TemporaryDirectory(prefix=TRIAL, dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{folder} takes no new folder: {error.strerror}") from None


def holds_files(folder: Path) -> bool:
    """Whether anything is in the folder: an export never overwrites a model."""
    return folder.is_dir() and any(folder.iterdir())
