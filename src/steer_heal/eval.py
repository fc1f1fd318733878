"""Measures a model, an adapter, or a state of a run again.

steer-heal eval --run out/<run> [--round K] [--state steered] [--json]
steer-heal eval --model PATH [--adapter DIR] [--eval.vignettes FILE] [--json]
"""

from __future__ import annotations

import json
import math
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro
from loguru import logger

from steer_heal.errors import Problems, UserError, print_error, print_safe
from steer_heal.inputs.files import ADAPTER_CONFIG_FILES, ADAPTER_FILE, resolve
from steer_heal.settings import AdapterCfg, EvalCfg, FilterCfg, GenCfg, RunConfig, SteerCfg

if TYPE_CHECKING:
    from steer_heal.inputs import Inputs

Metrics = Mapping[str, float | None]
"""The `metrics` object of events.jsonl."""


@dataclass(frozen=True, kw_only=True)
class EvalCommand:
    """All metrics of one model; with an adapter, also intervals against the model without it.

    With --run, every setting is that of the run, and the readings are compared with the recorded ones: where one
    differs, the exit status is 1.
    """

    run: Path | None = None
    """A run folder: one of its states is measured again. Only device, n-threads and eval.batch-size can differ."""
    state: Literal["base", "prompted", "control", "steered", "healed"] = "healed"
    """Of the run. steered: the student before the round as its teacher."""
    round: int | None = None
    """Of the run, for steered and healed. None: the last that was kept."""
    model: str = ""
    """A folder, a GGUF file, a hub id, smollm2-135m-instruct, or tiny-random."""
    adapter: Path | None = None
    """A checkpoint folder (ckpt/r3), or any PEFT LoRA folder of this model."""
    trait: str = "authority"
    """Whose prompts are answered in free text: a name, or the path of a file that ends in .toml."""
    prompts: Path | None = None
    """JSON lines with `text`, or a folder of <trait>.jsonl, in place of the trait's own prompts."""
    system: str = ""
    """System prompt, such as a persona."""
    seed: int = 42
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantize: Literal["none", "nf4"] = "none"
    n_threads: int = 0
    """CPU threads; 0 leaves torch's choice."""
    temperature: float | None = None
    """Of the free text; none: as the model's generation config says."""
    top_p: float | None = None
    """Of the free text; none: as the model's generation config says."""
    max_prompt_tokens: int = 1024
    json: bool = False
    """Print one JSON object and nothing else on stdout."""
    quiet: bool = False
    """Only warnings and errors on stderr."""
    eval: EvalCfg = field(default_factory=EvalCfg)
    filter: FilterCfg = field(default_factory=FilterCfg)
    """Limits past which a text counts as broken."""


SHOWN_APART = 8
"""Numbers that differ, by name."""
WHY_APART = (
    "another device, processor, number of threads, batch size or version rounds differently, and a text that then goes "
    "another way moves whatever is read of it"
)
FREE = ("run", "state", "round", "json", "quiet", "device", "n_threads", "eval.batch_size")
"""What may be given besides --run whatever the run's own settings are."""


# --- a model or an adapter ---------------------------------------------------------------------------------------
def measure(command: EvalCommand) -> Metrics:
    """Every metric of the model, or of its adapter, with the settings of the command."""
    from steer_heal.check import check_inputs, check_model

    cfg = RunConfig(
        model=command.model,
        trait=command.trait,
        seed=command.seed,
        device=command.device,
        dtype=command.dtype,
        quantize=command.quantize,
        n_threads=command.n_threads,
        max_prompt_tokens=command.max_prompt_tokens,
        temperature=command.temperature,
        top_p=command.top_p,
        steer=SteerCfg(n_contexts=1),
        gen=GenCfg(n_prompts=2, prompts=command.prompts),
        eval=command.eval,
        filter=command.filter,
    )
    problems, inputs, folder = Problems(), None, command.adapter
    with problems.noted():
        check_model(cfg.model)
    with problems.noted():
        inputs = check_inputs(cfg)
    if folder is not None:
        with problems.noted():
            folder = resolve(folder / ADAPTER_FILE, "adapter").parent
        if not any((folder / name).is_file() for name in ADAPTER_CONFIG_FILES):
            names = " nor ".join(ADAPTER_CONFIG_FILES)
            problems.found.append(f"adapter is {str(folder)!r}: it holds neither {names}; give a saved adapter")
    problems.raise_if_any()
    assert inputs is not None

    from steer_heal import round as steps  # torch: seconds
    from steer_heal.model.steering import Condition
    from steer_heal.model.student import Student, attach_saved
    from steer_heal.report import console

    console.start(command.quiet)
    _threads(cfg)
    _show(cfg, inputs)
    lm = steps.read_model(cfg)
    logger.info(f"{cfg.model} is in {str(lm.head.weight.dtype).removeprefix('torch.')} on {lm.device}: {lm.why_dtype}")
    student = Student(lm, AdapterCfg()) if folder is None else attach_saved(lm, folder)
    system = Condition(command.system) if command.system else None
    base = steps.measure(student, inputs, cfg, condition=system, adapters="base", on_eval=_telling("base", cfg))
    if folder is None:
        return base.metrics
    return steps.measure(student, inputs, cfg, base, system, on_eval=_telling(str(folder), cfg)).metrics


# --- a state of a run --------------------------------------------------------------------------------------------
def again(command: EvalCommand) -> tuple[Metrics, Metrics, list[str]]:
    """(metrics of a state of a run, measured now; those of the run; versions and device that differ, in words).

    UserError where the run has no such state.
    """
    from steer_heal import round as steps
    from steer_heal.evals import metrics_of
    from steer_heal.model.device import device_name
    from steer_heal.model.steering import Condition
    from steer_heal.report import console
    from steer_heal.runs import codec
    from steer_heal.runs.events import git_commit, schema_errors, versions
    from steer_heal.runs.opened import open_run

    assert command.run is not None
    console.start(command.quiet)
    run = open_run(command.run, device=command.device, n_threads=command.n_threads, eval=command.eval)
    stage, r = command.state, -1
    if stage in ("steered", "healed"):
        r = run.healed(command.round)
    elif command.round is not None:
        raise UserError(f"round is {command.round}: {stage} is measured once a run; leave --round or --state out")
    with schema_errors(run.folder):
        read = run.event(stage, r)["metrics"].items()
        then = {name: None if value is None else float(value) for name, value in read}
        base = codec.result_from(run.event("base", -1), metrics_of(run.cfg.eval.evals)) if stage != "base" else None
        start = run.events[0]
        made_by = {**start["versions"], "commit": start["git_commit"], "device": start.get("device")}
    who, last = None, None
    if stage == "prompted":
        who = Condition(run.inputs.trait.positive)
    elif stage == "steered":
        who, last = run.teacher(r), r - 1 if r else None
    elif stage != "base":
        last = r
    checkpoint = None if last is None else run.checkpoint(last)
    _show(run.cfg, run.inputs)
    student = run.load()
    if checkpoint is not None and last is not None:
        student.restore(checkpoint, max(1, last + 1))
    name = f"{stage} r{r}" if r >= 0 else stage
    now = steps.measure(student, run.inputs, run.cfg, base, who, on_eval=_telling(name, run.cfg))
    here = {**versions(), "commit": git_commit(), "device": device_name(student.lm.device)}
    names = [name for name in {**made_by, **here} if made_by.get(name) != here.get(name)]
    return now.metrics, then, [f"{name} {made_by.get(name)} then, {here.get(name)} now" for name in names]


def differing(now: Metrics, then: Metrics) -> list[str]:
    """Names of the numbers that are not the same to the last bit, or that one side lacks."""
    return [name for name in {**then, **now} if now.get(name, "none") != then.get(name, "none")]


def settings_of(run: Path) -> EvalCommand:
    """The command that measures what the run measured."""
    from steer_heal.runs.resume import in_recorded_dtype, recorded

    cfg = in_recorded_dtype(recorded(run)[1], run)
    same = {name: getattr(cfg, name) for name in EvalCommand.__dataclass_fields__ if hasattr(cfg, name)}
    return EvalCommand(**(same | {"prompts": cfg.gen.prompts, "adapter": None, "quiet": False}))


def _require_same(given: EvalCommand, recorded: EvalCommand) -> None:
    """UserError with a line for each setting that differs from the run's."""
    here, there = _flat(asdict(given)), _flat(asdict(recorded))
    problems = [
        f"{name} is {here[name]!s}, that of {given.run} is {there[name]!s}; leave it out, or measure the checkpoint "
        "with --model and --adapter"
        for name in here
        if name not in FREE and here[name] != there[name]
    ]
    if problems:
        raise UserError(*problems)


def _flat(values: Mapping[str, object]) -> dict[str, object]:
    out = {}
    for name, value in values.items():
        out |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    return out


# --- what is printed ---------------------------------------------------------------------------------------------
def _threads(cfg: RunConfig) -> None:
    import torch

    if cfg.n_threads:
        torch.set_num_threads(cfg.n_threads)


def _show(cfg: RunConfig, inputs: Inputs) -> None:
    """The settings in force."""
    logger.info(f"model {cfg.model} (dtype {cfg.dtype}, quantize {cfg.quantize}), trait {cfg.trait}, seed {cfg.seed}")
    logger.info(f"evals: {', '.join(cfg.eval.evals)}")
    instrument, vignettes = cfg.eval.instrument, f"{len(inputs.vignettes)} of {cfg.eval.vignettes}"
    logger.info(f"vignettes: {vignettes}, instrument: {instrument}, {len(inputs.pairs)} contrast pairs")
    prompts = cfg.gen.prompts or f"the trait's own {len(inputs.trait.prompts)}"
    texts = f"{cfg.eval.n_texts} of {cfg.eval.max_new_tokens} tokens to the last {len(inputs.eval_prompts)} prompts"
    logger.info(f"texts: {texts} of {prompts}")
    temperature, top_p = ("the model's" if value is None else value for value in (cfg.temperature, cfg.top_p))
    logger.info(f"temperature: {temperature}, top-p: {top_p}")


def _telling(state: str, cfg: RunConfig) -> Callable[[int], None]:
    """Logs which eval of a state begins."""
    names = cfg.eval.evals
    return lambda i: logger.info(f"{state}: {names[i]} ({i + 1} of {len(names)})")


def print_metrics(metrics: Metrics, recorded: Metrics | None = None) -> None:
    """A line for each metric, with its interval and, where it is not the recorded one, that one."""
    number = lambda value: "none" if value is None else format(value, ".4f")
    for name, value in metrics.items():
        if name.endswith(("_lo", "_hi")):
            continue
        low, high = metrics.get(f"{name}_lo"), metrics.get(f"{name}_hi")
        line = f"{name:26} {number(value):>9}"
        if recorded is not None:
            line += f"   recorded {number(recorded.get(name)):>9}"
        if low is not None and high is not None:
            line += f"   against base {low:+.3f} to {high:+.3f}"
        print_safe(line)


def agreement(now: Metrics, then: Metrics, versions: Sequence[str] = ()) -> str:
    """Whether the numbers, intervals among them, are the recorded ones; if not, which are not, the furthest first, and
    why that may be. `versions`: those that differ, in words."""
    names = differing(now, then)
    if not names:
        return f"all {len(then)} numbers, intervals among them, are the recorded ones to the last digit"
    apart = {}
    for name in names:
        here, there = now.get(name), then.get(name)
        apart[name] = math.inf if here is None or there is None else abs(here - there)
    furthest = sorted(names, key=lambda name: -apart[name])
    told = [f"{name} ({'no value' if apart[name] == math.inf else f'{apart[name]:.2g} away'})" for name in furthest]
    shown = [*told[:SHOWN_APART], *[f"and {len(told) - SHOWN_APART} more"] * (len(told) > SHOWN_APART)]
    which = f"{len(names)} of {len(then)} numbers are not the recorded ones: {', '.join(shown)}"
    return f"{which}\n{WHY_APART}; {', '.join(versions) or 'versions and device are the recorded ones'}"


def _parsed(argv: Sequence[str] | None) -> EvalCommand:
    """The command. UserError where it names no model, or settings that are not those of its run."""
    words = list(sys.argv[1:] if argv is None else argv)
    finder = ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--run", type=Path, nargs="?")
    recorded = settings_of(run) if (run := finder.parse_known_args(words)[0].run) else None
    command = tyro.cli(EvalCommand, args=words, prog="steer-heal eval", default=recorded or EvalCommand())
    if recorded is not None:
        _require_same(command, recorded)
    elif command.round is not None or command.state != "healed":
        raise UserError(
            f"round is {command.round}, state is {command.state!r}: they are those of a run; give --run too"
        )
    elif not command.model:
        raise UserError("give --run out/<run> to measure a round of a run, or --model MODEL to measure a model")
    return command


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 measured, 1 a reading is not the one that the run recorded, 2 a wrong argument or file."""
    try:
        command = _parsed(argv)
        metrics, recorded, versions = (measure(command), None, []) if command.run is None else again(command)
    except (UserError, OSError, ValueError) as error:
        print_error(error)
        return 2
    if command.json:
        print(json.dumps(metrics, allow_nan=False))
    else:
        print_metrics(metrics, recorded)
    if recorded is None:
        return 0
    print_safe(agreement(metrics, recorded, versions), sys.stderr if command.json else None)
    return int(bool(differing(metrics, recorded)))


if __name__ == "__main__":
    sys.exit(main())
