"""Measures a model, an adapter, or a round of a run again.

steer-heal eval --run out/<run> [--round K] [--json]
steer-heal eval --model PATH [--adapter DIR] [--eval.vignettes FILE] [--json]
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro
from loguru import logger

from steer_heal.errors import Problems, UserError, print_error, print_safe
from steer_heal.inputs.files import resolve
from steer_heal.settings import AdapterCfg, EvalCfg, FilterCfg, GenCfg, RunConfig, SteerCfg

if TYPE_CHECKING:
    from steer_heal.inputs import Inputs

Metrics = Mapping[str, float | None]
"""The `metrics` object of events.jsonl."""


@dataclass(frozen=True, kw_only=True)
class EvalCommand:
    """All metrics of one model; with an adapter, also intervals against the model without it.

    With --run, every setting is that of the run, and the readings are compared with the recorded ones.
    """

    run: Path | None = None
    """A run folder: one of its rounds is measured again. Only device, n-threads and eval.batch-size can differ."""
    round: str | None = None
    """Of the run: a number, base or control. None: the last healed round that was kept."""
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


FREE = ("run", "round", "json", "quiet", "device", "n_threads", "eval.batch_size")
"""What may be given besides --run whatever the run's own settings are."""


# --- a model or an adapter ---------------------------------------------------------------------------------------
def measure(command: EvalCommand) -> Metrics:
    """Every metric of the model, or of its adapter, with the settings of the command."""
    from steer_heal import round as steps
    from steer_heal.check import check_inputs
    from steer_heal.model.steering import Condition
    from steer_heal.model.student import ADAPTER_FILE, Student, attach_saved

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
        inputs = check_inputs(cfg)
    for name in ("adapter_config.json", ADAPTER_FILE):
        with problems.noted():
            folder = folder and resolve(folder / name, "adapter").parent
    problems.raise_if_any()
    assert inputs is not None
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


# --- a round of a run --------------------------------------------------------------------------------------------
def again(command: EvalCommand) -> tuple[Metrics, Metrics]:
    """(metrics of a round of a run, measured now; those that the run recorded)."""
    from steer_heal import round as steps
    from steer_heal.evals import metrics_of
    from steer_heal.runs import codec
    from steer_heal.runs.events import schema_errors
    from steer_heal.runs.opened import open_run

    assert command.run is not None
    run = open_run(command.run, device=command.device, n_threads=command.n_threads, eval=command.eval)
    stage, asked = _state(command.round)
    r = run.healed(asked) if stage == "healed" else -1
    with schema_errors(run.folder):
        read = run.event(stage, r)["metrics"].items()
        then = {name: None if value is None else float(value) for name, value in read}
        base = codec.result_from(run.event("base", -1), metrics_of(run.cfg.eval.evals)) if stage != "base" else None
    checkpoint = run.checkpoint(r) if stage != "base" else None
    _show(run.cfg, run.inputs)
    student = run.load()
    if checkpoint is not None:
        student.restore(checkpoint, max(1, r + 1))
    name = f"healed r{r}" if stage == "healed" else stage
    now = steps.measure(student, run.inputs, run.cfg, base, on_eval=_telling(name, run.cfg))
    return now.metrics, then


def _state(name: str | None) -> tuple[str, int | None]:
    """(stage of its event, its round) of a --round. The round is None for the last, and where there is none."""
    if name in ("base", "control"):
        return name, None
    try:
        return "healed", None if name is None else int(name)
    except ValueError:
        raise UserError(f"round is {name!r}: it must be a number, base or control") from None


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


def agreement(now: Metrics, then: Metrics) -> str:
    """How many of the numbers, intervals among them, are the recorded ones, and which one is furthest from it."""
    names = differing(now, then)
    if not names:
        return f"all {len(then)} numbers, intervals among them, are the recorded ones to the last digit"
    apart = {name: abs((now.get(name) or 0.0) - (then.get(name) or 0.0)) for name in names}
    worst = max(names, key=lambda name: apart[name])
    return f"{len(names)} of {len(then)} numbers are not the recorded ones; {worst} is {apart[worst]:.2g} away"


def _parsed(argv: Sequence[str] | None) -> EvalCommand:
    """The command. UserError where it names no model, or settings that are not those of its run."""
    words = list(sys.argv[1:] if argv is None else argv)
    finder = ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--run", type=Path, nargs="?")
    recorded = settings_of(run) if (run := finder.parse_known_args(words)[0].run) else None
    command = tyro.cli(EvalCommand, args=words, prog="steer-heal eval", default=recorded or EvalCommand())
    if recorded is not None:
        _require_same(command, recorded)
    elif command.round is not None:
        raise UserError(f"round is {command.round!r}: it is one of a run; give --run too")
    elif not command.model:
        raise UserError("give --run out/<run> to measure a round of a run, or --model MODEL to measure a model")
    return command


def main(argv: Sequence[str] | None = None) -> int:
    try:
        command = _parsed(argv)
        from steer_heal.report import console

        console.start(command.quiet)
        metrics, recorded = (measure(command), None) if command.run is None else again(command)
    except (UserError, OSError, ValueError) as error:
        print_error(error)
        return 2
    if command.json:
        print(json.dumps(metrics, allow_nan=False))
    else:
        print_metrics(metrics, recorded)
    if recorded is not None:
        print_safe(agreement(metrics, recorded), sys.stderr if command.json else None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
