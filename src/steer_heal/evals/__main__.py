"""Measures one model, with or without an adapter, as a run would.

steer-heal eval --model PATH [--adapter DIR] [--eval.vignettes FILE] [--json]
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from steer_heal.errors import Problems, UserError, print_error
from steer_heal.inputs.files import resolve
from steer_heal.settings import AdapterCfg, EvalCfg, FilterCfg, GenCfg, RunConfig, SteerCfg


@dataclass(frozen=True, kw_only=True)
class EvalCommand:
    """All metrics of one model; with an adapter, also intervals against the model without it."""

    model: str
    """A folder, a hub id, or tiny-random."""
    adapter: Path | None = None
    """A checkpoint folder (ckpt/r3), or any PEFT LoRA folder of this model."""
    trait: str = "authority"
    """Whose prompts are answered in free text."""
    prompts: Path | None = None
    """JSON lines with `text` in place of the trait's own prompts."""
    system: str = ""
    """System prompt, such as a persona."""
    seed: int = 42
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    temperature: float | None = None
    """Of the free text; none: as the model's generation config says."""
    top_p: float | None = None
    """Of the free text; none: as the model's generation config says."""
    max_prompt_tokens: int = 1024
    json: bool = False
    """Print one JSON object and nothing else."""
    eval: EvalCfg = field(default_factory=EvalCfg)
    filter: FilterCfg = field(default_factory=FilterCfg)
    """Limits past which a text counts as broken."""


def measure(command: EvalCommand) -> dict[str, float | None]:
    """The `metrics` object of events.jsonl."""
    from steer_heal import round as steps
    from steer_heal.check import check
    from steer_heal.model.steering import Condition
    from steer_heal.model.student import ADAPTER_FILE, Student, attach_saved
    from steer_heal.report import console

    cfg = RunConfig(
        model=command.model,
        trait=command.trait,
        seed=command.seed,
        device=command.device,
        dtype=command.dtype,
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
        inputs = check(cfg)
    for name in ("adapter_config.json", ADAPTER_FILE):
        with problems.noted():
            folder = folder and resolve(folder / name, "adapter").parent
    problems.raise_if_any()
    assert inputs is not None
    console.start(quiet=True)
    lm = steps.read_model(cfg)
    student = Student(lm, AdapterCfg()) if folder is None else attach_saved(lm, folder)
    system = Condition(command.system) if command.system else None
    base = steps.measure(student, inputs, cfg, condition=system, adapters="base")
    if folder is None:
        return base.metrics
    return steps.measure(student, inputs, cfg, base, system).metrics


def main(argv: list[str] | None = None) -> int:
    try:
        command = tyro.cli(EvalCommand, args=argv, prog="steer-heal eval")
        metrics = measure(command)
    except (UserError, OSError, ValueError) as error:
        print_error(error)
        return 2
    if command.json:
        print(json.dumps(metrics, allow_nan=False))
        return 0
    for name, value in metrics.items():
        if not name.endswith(("_lo", "_hi")):
            low, high = metrics.get(f"{name}_lo"), metrics.get(f"{name}_hi")
            interval = "" if low is None else f"   against base {low:+.3f} to {high:+.3f}"
            print(f"{name:22} {'none' if value is None else format(value, '.4f')}{interval}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
