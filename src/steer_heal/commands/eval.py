"""steer-heal eval: measures a model, an adapter, or a state of a run again.

steer-heal eval --run out/<run> [--round K] [--state steered] [--json]
steer-heal eval --model PATH [--adapter DIR] [--adapter-scale S] [--eval.vignettes FILE] [--json]
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loguru import logger

from steer_heal.errors import Problems, UserError, print_safe, shown
from steer_heal.events import RunStart, plain
from steer_heal.flags import parsed
from steer_heal.inputs.files import ADAPTER_CONFIG_FILES, ADAPTER_FILE
from steer_heal.progress import Progress
from steer_heal.records import StateName, Values
from steer_heal.report import tables
from steer_heal.runs.resume import recorded_settings
from steer_heal.settings import (
    AdapterScale,
    AllowBroken,
    EvalCfg,
    FilterCfg,
    RoundName,
    RunConfig,
    changed,
    leaves,
    require_judge,
    settings,
)
from steer_heal.verdict import chosen_round, round_words

if TYPE_CHECKING:  # torch: seconds
    from steer_heal.inputs import Inputs

SETTINGS = (
    *("model", "trait", "seed", "device", "dtype", "quantize", "n_threads", "temperature", "top_p"),
    *("max_prompt_tokens", "plugin", "plugin_set", "accept_terms"),
    *(f"eval.{each.name}" for each in fields(EvalCfg)),
    *(f"filter.{each.name}" for each in fields(FilterCfg)),
)
"""Settings of a run that the command takes too."""
FREE = ("device", "n_threads", "eval.batch_size", "plugin", "accept_terms")
"""Settings that can differ from the run's."""
SHOWN_APART = 8
"""How many of the metrics that differ are named."""
WHY_APART = (
    "another device, processor, number of threads, batch size or version rounds differently, and rounding can change a "
    "sampled text and all that is measured on it"
)


@settings("")
class Eval:
    """Measure all metrics of a model. With --adapter, also print 95 percent intervals for the differences from the
    model without the adapter.

    With --run, measure a state of a run again, with the settings of the run. You can change only --device, --n-threads
    and --eval.batch-size, and accept terms. If the run used plugins, name them again with --plugin. If a number differs
    from the recorded one, the exit status is 1. Without --run, a setting that you leave out has its own default, not a
    preset's. Of the filter settings, only ppl-max, spike-max, rep-max, loop-max and relevance-min have an effect.
    """

    run: Path | None = None
    """Folder of a run."""
    state: StateName = "healed"
    """State of the run. steered: the student at the start of the round, with what turns it into the teacher (the
    vector, the persona prompt, the contrast of the personas, or the vector with one of these)."""
    round: RoundName | None = None
    """Round whose steered or healed state is measured: its number (from 1), last (the last round that was kept),
    or best (the one that the verdict names). Default: best."""
    allow_broken: AllowBroken = False
    adapter: Path | None = None
    """Folder of a checkpoint (out/<run>/ckpt/r0, of round 1), or of any PEFT LoRA adapter for the model."""
    adapter_scale: AdapterScale = 1.0
    """Multiply the effect of the adapter by this factor, from -4 to 4. 0: no effect; -1: the reverse. With a factor
    other than 1, the numbers are not compared with the recorded ones."""
    prompts: Path | None = None
    """Prompts to use instead of the trait's own: a JSON lines file with a `text` field, or a folder of <trait>.jsonl
    files."""
    system: str = ""
    """System prompt, such as a persona. Default: the trait's system prompt for plain text (`system.plain`), if any."""
    json: bool = False
    """Print one JSON object and nothing else on stdout."""
    quiet: bool = False
    """Print only warnings and errors on stderr."""


def main(argv: Sequence[str]) -> int:
    given, own = parsed(Eval, argv, "eval", SETTINGS)
    if given.prompts is not None:
        own["gen.prompts"] = given.prompts
    if given.run is not None:
        return again(given.run, given, own)
    if given.round is not None or given.state != "healed":
        flag = "--state" if given.round is None else "--round"
        raise UserError(f"{flag} was given without a run, and only a run has rounds and states; give --run too")
    if "model" not in own:
        raise UserError("give --run out/<run> to measure a state of a run, or --model MODEL to measure a model")
    if given.adapter is None:
        _require_unscaled(given, "no adapter was given", "give --adapter")
    metrics = measure(given, own)
    print_metrics(metrics, as_json=given.json, scale=given.adapter_scale)
    return 0


def _require_unscaled(given: Eval, why: str, fix: str) -> None:
    """UserError if an adapter should be scaled where there is none."""
    if given.adapter_scale != 1:
        raise UserError(f"adapter_scale is {given.adapter_scale:g}: {why}; {fix}, or leave out --adapter-scale")


# --- a model or an adapter ---------------------------------------------------------------------------------------
def measure(given: Eval, own: Mapping[str, object]) -> Values:
    """Every metric of a model or, if one is given, of its adapter. `own`: the settings that were given."""
    from steer_heal.check import check_inputs, check_model

    cfg = changed(RunConfig(), {"steer.n_contexts": 1, "gen.n_prompts": 2, **own})
    problems = Problems()
    problems.attempt(require_judge, cfg.eval)
    inputs = None
    with problems.noted():
        check_model(cfg.model)
    if given.adapter is not None:
        with problems.noted():
            _check_adapter(given.adapter)
    with problems.noted():
        inputs = check_inputs(cfg, needs_target=False)
    problems.raise_if_any()
    assert inputs is not None

    import torch  # seconds, like the imports below

    from steer_heal.bench import Bench, read_model
    from steer_heal.model.state import State
    from steer_heal.model.steering import Condition
    from steer_heal.model.student import Student, attach_saved
    from steer_heal.report import console

    console.start(given.quiet)
    if cfg.n_threads:
        torch.set_num_threads(cfg.n_threads)
    _log_settings(cfg, inputs, given.adapter_scale)
    lm = read_model(cfg)
    logger.info(f"{cfg.model} is in {str(lm.head.weight.dtype).removeprefix('torch.')} on {lm.device}: {lm.why_dtype}")
    if lm.weights_note:
        logger.info(f"{cfg.model} has {lm.weights_note}")
    student = Student(lm, cfg.adapter) if given.adapter is None else attach_saved(lm, given.adapter)
    bench = Bench(cfg, inputs, student)
    condition = Condition(given.system or inputs.trait.plain_system)
    base = bench.measure(State(name="base", adapters="base", condition=condition), progress=EvalNames("base", cfg))
    if given.adapter is None:
        return base.metrics
    healed = State(name="healed", condition=condition)
    with student.scaled(given.adapter_scale):
        return bench.measure(healed, base, EvalNames(str(given.adapter), cfg)).metrics


def _check_adapter(folder: Path) -> None:
    """UserError unless the folder holds an adapter of a known kind."""
    has_weights = (folder / ADAPTER_FILE).is_file()
    has_settings = any((folder / name).is_file() for name in ADAPTER_CONFIG_FILES)
    if not has_weights or not has_settings:
        needed = " or ".join(ADAPTER_CONFIG_FILES) if has_weights else ADAPTER_FILE
        raise UserError(f"adapter is {str(folder)!r}: it holds no {needed}; give the folder of a saved adapter")


# --- a state of a run --------------------------------------------------------------------------------------------
def again(folder: Path, given: Eval, own: Mapping[str, object]) -> int:
    """Measures a state of a run and compares the numbers with the recorded ones. Returns the exit status."""
    _require_same(folder, given, own)
    from steer_heal.model.device import device_name
    from steer_heal.report import console
    from steer_heal.runs.begin import git_commit, versions
    from steer_heal.runs.opened import open_bench, put_in, settings_of, state_of
    from steer_heal.runs.stored import FolderRun

    console.start(given.quiet)
    run = FolderRun.read(folder)
    r = None
    if given.state in ("steered", "healed"):
        r = chosen_round(run, "best" if given.round is None else given.round, allow_broken=given.allow_broken)
        logger.info(round_words(run, r))
    elif given.round is not None:
        raise UserError(f"round is {given.round}: {given.state} is measured once per run; leave out --round or --state")
    recorded = run.measured(given.state, r)
    base = None if given.state == "base" else run.measured("base")
    if recorded is None:
        raise UserError(f"{folder} did not measure {given.state}; give another --round or --state")
    if given.state in ("base", "prompted") or (given.state == "steered" and r == 0):
        _require_unscaled(given, f"the state {given.state} of this round has no adapter", "give --state healed")
    state = state_of(run, given.state, r)
    cfg = settings_of(run, **{name: value for name, value in own.items() if name in FREE})
    bench = open_bench(run, cfg)
    _log_settings(cfg, bench.inputs, given.adapter_scale)
    put_in(run, bench.student, state)
    progress = EvalNames(state.label, cfg)
    with bench.student.scaled(given.adapter_scale):
        now = bench.measure(state, None if base is None else base.result, progress).metrics
    print_metrics(now, recorded.metrics, as_json=given.json, scale=given.adapter_scale)
    if given.adapter_scale != 1:
        return 0  # the recorded numbers are those of another model
    here = {**versions(), "commit": git_commit(), "device": device_name(bench.student.lm.device)}
    words = agreement(now, recorded.metrics, changed_versions(run.start, here))
    print_safe(words, sys.stderr if given.json else None)
    return 1 if differing(now, recorded.metrics) else 0


def _require_same(folder: Path, given: Eval, own: Mapping[str, Any]) -> None:
    """UserError with a line for each setting that differs from the run's."""
    cfg = recorded_settings(folder, own.get("plugin", ()))
    then = leaves(cfg)
    now = leaves(changed(cfg, own))
    differ = {name: then[name] for name in own if name not in FREE and now[name] != then[name]}
    lines = [f"{name} is {_words(now[name])}, but {_words(value)} in {folder}" for name, value in differ.items()]
    for name, value in (("adapter", given.adapter), ("system", given.system)):
        if value:
            lines.append(f"{name} is {value}, but {folder} has its own adapters and system prompts")
    if lines:
        raise UserError(*(f"{line}; leave it out, or give --model and --adapter instead of --run" for line in lines))


def _words(value: object) -> str:
    """The value of a setting as it is typed."""
    return shown(value) if isinstance(value, tuple) else str(value)


def changed_versions(start: RunStart, here: Mapping[str, str | None]) -> list[str]:
    """The versions, the commit and the device that differ from the run's, in words."""
    then = {**start.versions, "commit": start.git_commit, "device": start.device}
    names = [name for name in {**then, **here} if then.get(name) != here.get(name)]
    return [f"{name} {then.get(name)} then, {here.get(name)} now" for name in names]


def differing(now: Values, then: Values) -> list[str]:
    """Names of the metrics whose numbers differ in any bit, or that one side lacks. NaN is the same as NaN."""
    return [name for name in {**then, **now} if repr(now.get(name, "absent")) != repr(then.get(name, "absent"))]


def agreement(now: Values, then: Values, versions: Sequence[str] = ()) -> str:
    """Whether all numbers are the recorded ones. If not, which are not, the furthest first, and what the reason may be.

    Args:
        versions: What else differs, in words.
    """
    names = differing(now, then)
    if not names:
        return f"all {len(then)} numbers, intervals included, are the recorded ones to the last digit"
    apart = {name: _distance(now.get(name), then.get(name)) for name in names}
    furthest = sorted(names, key=lambda name: -apart[name])
    listed = [
        f"{name} ({apart[name]:.2g} away)" if apart[name] < math.inf else f"{name} (no value)" for name in furthest
    ]
    if len(listed) > SHOWN_APART:
        listed = [*listed[:SHOWN_APART], f"and {len(listed) - SHOWN_APART} more"]
    why = ", ".join(versions) or "versions and device are the recorded ones"
    return f"{len(names)} of {len(then)} numbers differ from the recorded ones: {', '.join(listed)}\n{WHY_APART}; {why}"


def _distance(here: float | None, there: float | None) -> float:
    """Infinite if a side has no finite value."""
    if here is None or there is None or not math.isfinite(here - there):
        return math.inf
    return abs(here - there)


# --- what is printed ---------------------------------------------------------------------------------------------
class EvalNames(Progress):
    """Logs each eval of a state when it begins."""

    def __init__(self, state: str, cfg: RunConfig) -> None:
        self.state = state
        self.names = cfg.eval.evals

    def part(self, n: int, n_parts: int, kind: str = "eval") -> None:
        logger.info(f"{self.state}: {self.names[n - 1]} ({n} of {n_parts})")


def _log_settings(cfg: RunConfig, inputs: Inputs, adapter_scale: float) -> None:
    """Logs the settings that the metrics depend on."""
    logger.info(f"model {cfg.model} (dtype {cfg.dtype}, quantize {cfg.quantize}), trait {cfg.trait}, seed {cfg.seed}")
    logger.info(f"evals: {', '.join(cfg.eval.evals)}")
    vignettes = f"{len(inputs.vignettes)} of {cfg.eval.vignettes}"
    logger.info(f"vignettes: {vignettes}, instrument: {cfg.eval.instrument}, {len(inputs.pairs)} contrast pairs")
    if "holds" in cfg.eval.evals:
        logger.info(f"attacks: {len(inputs.attacks)} of {cfg.eval.attacks}")
    if inputs.panel:
        logger.info(f"panel: {', '.join(f'{len(pairs)} pairs of {name}' for name, pairs in inputs.panel.items())}")
    prompts = cfg.gen.prompts or f"the trait's own {len(inputs.trait.prompts)}"
    n = len(inputs.eval_prompts)
    logger.info(f"texts: {cfg.eval.n_texts} of {cfg.eval.max_new_tokens} tokens to the last {n} prompts of {prompts}")
    temperature, top_p = ("the model's" if value is None else value for value in (cfg.temperature, cfg.top_p))
    logger.info(f"temperature: {temperature}, top-p: {top_p}, adapter scale: {adapter_scale:g}")


def print_metrics(metrics: Values, recorded: Values | None = None, *, as_json: bool, scale: float = 1.0) -> None:
    """One JSON object, or a table of the metrics with their intervals and, if there are any, the recorded values. The
    scale of the adapter comes first if it is not 1."""
    if scale != 1:
        metrics = {"adapter_scale": scale, **metrics}
    if as_json:
        print(json.dumps(plain(metrics), allow_nan=False))
        return
    rows = []
    for name, value in metrics.items():
        if name.endswith(("_lo", "_hi")):
            continue
        row: dict[str, object] = {"metric": name, "value": _number(value)}
        if recorded is not None:
            row["recorded"] = _number(recorded.get(name))
        low = metrics.get(f"{name}_lo")
        high = metrics.get(f"{name}_hi")
        if low is not None and high is not None:
            row["difference to base"] = f"{low:+.3f} to {high:+.3f}"
        rows.append(row)
    tables.show(rows)


def _number(value: float | None) -> str:
    return "none" if value is None else format(value, ".4f")
