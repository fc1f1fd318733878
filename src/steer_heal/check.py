"""All checks of the settings that are possible before a model is loaded.

Problems are reported in up to three steps: first those of files, folders, trackers and, without plugins, names, which
need no torch; then a missing device; then those of all names and metrics.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from importlib.util import find_spec
from os.path import exists
from pathlib import Path
from tempfile import TemporaryDirectory

from steer_heal.backends import track
from steer_heal.errors import Problems, UserError, nearest
from steer_heal.inputs import Inputs, load_inputs
from steer_heal.inputs.files import ADAPTER_CONFIG_FILES, adapter_base, adapter_folder, candidates, is_path
from steer_heal.inputs.new_trait import WITHOUT_PAIRS
from steer_heal.inputs.traits import TraitFile
from steer_heal.plugins import load
from steer_heal.records import Trait
from steer_heal.settings import BUILT_IN, MODELS, TINY_RANDOM, RunConfig, leaves, require_judge

TRIAL = ".steer-heal-"
"""Prefix of the temporary folders that test whether a folder is writable."""


def check(cfg: RunConfig) -> Inputs:
    """Checks the settings, and returns the parsed inputs. UserError with a line for each problem of the first step that
    fails."""
    problems = Problems()
    inputs = problems.attempt(_load, cfg)
    problems.attempt(check_model, cfg.model)
    problems.attempt(track.check, cfg.track)
    problems.attempt(require_judge, cfg.eval)
    of_run = ("out", cfg.out) if cfg.folder is None else ("folder", cfg.folder)
    problems.attempt(check_writable, *of_run)
    problems.raise_if_any()
    assert inputs is not None
    return _with_names(cfg, inputs)


def check_model(name: str, setting: str = "model") -> None:
    """UserError for a path that does not exist or holds no model, for an adapter whose base does not exist, and for a
    name close to one of MODELS. Any other name may be on the hub, which is asked when it is loaded."""
    place = next((place for place in candidates(name) if exists(place)), None)
    if place is None and is_path(name):
        raise UserError(f"{setting} is {name!r}: there is no such folder or file; give an existing path, or a hub id")
    known = (*MODELS, TINY_RANDOM)
    if place is None and "/" not in name and name not in known and get_close_matches(name, known, cutoff=0.8):
        raise UserError(f"{setting} is {name!r}: {nearest(name, known)}")
    if place is not None and (why := _no_model(place)):
        raise UserError(f"{setting} is {name!r}: {why}")
    if (adapter := adapter_folder(name)) is not None:
        check_model(adapter_base(adapter), setting)


def _no_model(place: Path) -> str:
    """Why nothing that exists at this place can be loaded. Empty: it may be a model or an adapter."""
    if not place.is_dir():
        return "" if place.suffix == ".gguf" else "it is neither a folder nor a GGUF file (.gguf)"
    try:
        names = [each.name for each in place.iterdir()]
    except OSError as error:
        return f"this folder cannot be read ({error.strerror})"
    if not names:
        return "this folder is empty"
    kinds = ("config.json", "config of an adapter (adapter_config.json)", "GGUF file (.gguf)")
    if not any(name in ("config.json", *ADAPTER_CONFIG_FILES) or name.endswith(".gguf") for name in names):
        return f"this folder has no {', '.join(kinds[:-1])} or {kinds[-1]}"
    if "config.json" in names and not any(name.endswith(".safetensors") for name in names):
        return "this folder holds no weights (*.safetensors)"
    return ""


def check_inputs(cfg: RunConfig, trait: TraitFile | None = None, *, needs_target: bool = True) -> Inputs:
    """As `check`, but without the model, the trackers, and the folders that a run writes to.

    Args:
        trait: See load_inputs.
        needs_target: Whether the evals must report a target of the trait.
    """
    return _with_names(cfg, _load(cfg, trait), needs_target=needs_target)


def _load(cfg: RunConfig, trait: TraitFile | None = None) -> Inputs:
    """The parsed inputs. Does not import torch, which takes seconds."""
    problems = Problems()
    inputs = problems.attempt(load_inputs, cfg, trait)
    if cfg.quantize != "none" and not find_spec("bitsandbytes"):
        problems.found.append(
            f"quantize is {cfg.quantize!r}: its package is not installed; pip install 'steer-heal[quantize]', or leave "
            "it out"
        )
    if not cfg.plugin and "torch" not in sys.modules:  # with torch, `_check_names` knows the tables as they are
        problems.found += _unknown_names(cfg, BUILT_IN)
    problems.raise_if_any()
    assert inputs is not None
    return inputs


def _with_names(cfg: RunConfig, inputs: Inputs, *, needs_target: bool = True) -> Inputs:
    """The inputs with the trait of `_with_target`. UserError for a missing device, or for unknown names."""
    from steer_heal.model.device import pick_device

    pick_device(cfg.device)  # on its own: the next checks also import transformers, which takes more seconds
    plugins = load(cfg)
    problems = Problems()
    problems.attempt(_check_names, cfg)
    trait = problems.attempt(_with_target, cfg, inputs, needs_target=needs_target)
    problems.raise_if_any()
    assert trait is not None
    return replace(inputs, trait=trait, sha256={**inputs.sha256, **plugins.sha256})


def _check_names(cfg: RunConfig) -> None:
    """UserError for each unknown name in the settings, and for each optional package that is missing or unsuitable."""
    from steer_heal.backends import steering_lite, tinymfv  # the tables contain functions of tensors: imports torch
    from steer_heal.evals import EVALS, classifier, judge
    from steer_heal.model.divergence import DIVERGENCES
    from steer_heal.model.steering import METHODS
    from steer_heal.model.student import ADAPTERS
    from steer_heal.stages.filter import GATES

    problems = Problems()
    problems.found += _unknown_names(
        cfg,
        {
            "heal.divergence": DIVERGENCES,
            "steer.method": METHODS,
            "adapter.kind": ADAPTERS,
            "filter.gates": GATES,
            "eval.evals": EVALS,
        },
    )
    problems.raise_if_any()
    if cfg.heal.spectral and not ADAPTERS[cfg.adapter.kind].updates_weights:
        problems.found.append(
            f"heal.spectral is {cfg.heal.spectral:g}: it must be 0, since adapter.kind {cfg.adapter.kind!r} adapts no "
            "weight matrices"
        )
    if cfg.dose.mode == "survival" and not any(GATES[name].degenerate for name in cfg.filter.gates):
        gates = ", ".join(name for name, gate in GATES.items() if gate.degenerate)
        problems.found.append(
            f"filter.gates is {cfg.filter.gates!r}: without a gate for incoherent text ({gates}) every dose survives, "
            "and dose.mode survival would choose the ceiling; add one, or use --dose.mode fixed --dose.kappa K, or "
            "--dose.mode iso_kl"
        )
    if cfg.steer.backend == "steering-lite":
        problems.attempt(steering_lite.check, cfg.steer.method)
    if cfg.eval.backend == "tinymfv":
        problems.attempt(tinymfv.check)
    if "judge" in cfg.eval.evals:
        problems.attempt(judge.check, cfg.eval)
        if not cfg.eval.judge_url:
            problems.attempt(check_model, cfg.eval.judge_model, "eval.judge_model")
    if "classifier" in cfg.eval.evals:
        problems.attempt(classifier.check)
    problems.raise_if_any()


def _with_target(cfg: RunConfig, inputs: Inputs, *, needs_target: bool) -> Trait:
    """The trait, with the first of its targets that the evals report, and without off-targets that they do not report.
    If none is left, the pairs of other traits are the off-target of its own pairs.

    UserError for unknown metrics, for an eval that needs data which the trait lacks, and if no target is reported
    although one is needed.
    """
    from steer_heal.evals import EVALS, metrics_of

    trait = inputs.trait
    if _unknown("eval.evals", cfg.eval.evals, EVALS):
        return trait
    problems = Problems()
    without = {"pairs": f" (without pairs: {WITHOUT_PAIRS})"}
    for name in cfg.eval.evals:
        problems.found += [
            f"eval.evals contains {name!r}: trait {trait.name!r} has no {field}; add [[{field}]] or {field}_file to "
            f"its file, give --eval.{field}, or leave out {name}{without.get(field, '')}"
            for field in EVALS[name].needs
            if not getattr(inputs, field)
        ]
    owners = {metric.name: name for name, each in EVALS.items() for metric in each.metrics}
    possible = [metric.name for metric in metrics_of(tuple(EVALS)) if metric.moved is not None]
    problems.found += _unknown(f"trait {trait.name!r}: target", inputs.targets, possible)
    problems.found += _unknown(f"trait {trait.name!r}: off_targets", trait.off_targets, owners)
    problems.raise_if_any()
    metrics = metrics_of(cfg.eval.evals)
    reported = [metric.name for metric in metrics]
    problems.found += _unknown("backtrack.limits", cfg.backtrack.limits, reported)
    if cfg.backtrack.limits and not cfg.backtrack.retries:
        problems.found.append(
            "backtrack.limits is given: with backtrack.retries 0 no round is dropped; give --backtrack.retries"
        )
    if cfg.backtrack.retries and not cfg.backtrack.limits and not any(metric.is_health for metric in metrics):
        problems.found.append(
            f"backtrack.retries is {cfg.backtrack.retries}: none of the evals {cfg.eval.evals!r} reports whether a "
            "model is coherent; add text_quality, or give --backtrack.limits"
        )
    problems.raise_if_any()
    target = next((name for name in inputs.targets if name in reported), None if needs_target else trait.target)
    if target is None:
        wanted = " or ".join(dict.fromkeys(owners[name] for name in inputs.targets))
        raise UserError(f"eval.evals is {cfg.eval.evals!r}: the target of trait {trait.name!r} needs {wanted}; add it")
    upwards = any(metric.towards_persona for metric in metrics_of(tuple(EVALS)) if metric.name == target)
    off_targets = tuple(name for name in trait.off_targets if name in reported)
    if not off_targets and any(metric.of == "pair" for metric in metrics if metric.name == target):
        off_targets = tuple(metric.name for metric in metrics if metric.of == "trait" and metric.how == "rms")
    return replace(trait, target=target, sign=1 if upwards else trait.sign, off_targets=off_targets)


def _unknown_names(cfg: RunConfig, tables: Mapping[str, Iterable[str]]) -> list[str]:
    """As `_unknown`, for each setting that is a name or a list of names. `tables`: the known names by setting."""
    found = []
    for setting, table in tables.items():
        given = leaves(cfg)[setting]
        found += _unknown(setting, [given] if isinstance(given, str) else given, table)
    return found


def _unknown(setting: str, names: Iterable[str], table: Iterable[str]) -> list[str]:
    """A line for each name that is not in the table, with the nearest name that is."""
    known = list(table)
    return [f"{setting} is {name!r}: {nearest(name, known)}" for name in names if name not in known]


def check_writable(field_name: str, folder: Path) -> None:
    """UserError unless the folder can be created and written to."""
    if why := why_unwritable(folder):
        raise UserError(f"{field_name} is {str(folder)!r}: {why}; give another --{field_name}")


def why_unwritable(folder: Path) -> str:
    """Why a folder cannot be created or written to. Empty: it can be. The probe folder is removed."""
    try:
        there = next(place for place in (folder, *folder.resolve().parents) if place.exists())
        if not there.is_dir():
            raise ValueError(f"{there} is not a folder")
        _try_to_write(there)
    except (OSError, ValueError, RuntimeError) as error:  # too long, a zero byte, a loop of links
        return f"this folder cannot be created ({getattr(error, 'strerror', None) or error})"
    return ""


def _try_to_write(folder: Path) -> None:
    """ValueError if nothing can be created in the folder. Permissions are not enough: /proc and full disks have
    them."""
    try:
        with TemporaryDirectory(prefix=TRIAL, dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{folder} is not writable: {error.strerror}") from None
