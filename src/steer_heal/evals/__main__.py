"""Measures one model, with or without an adapter, as a run would.

    python -m steer_heal.evals --model PATH [--adapter DIR] [--eval.vignettes FILE] [--json]
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from steer_heal.evals.instrument import load_instrument, load_vignettes
from steer_heal.files import resolve
from steer_heal.records import Problems, UserError
from steer_heal.stages.cfg import EvalCfg, FilterCfg
from steer_heal.terminal import complain
from steer_heal.traits import load_trait


@dataclass(frozen=True, kw_only=True)
class EvalCommand:
    """Moral-foundation vignettes and free text of one model; with an adapter, intervals against the model without."""

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
    dtype: str = "auto"
    max_prompt_tokens: int = 1024
    json: bool = False
    """Print one JSON object and nothing else."""
    eval: EvalCfg = field(default_factory=EvalCfg)
    filter: FilterCfg = field(default_factory=FilterCfg)
    """Thresholds past which a text counts as degenerate."""


def measure(command: EvalCommand) -> dict[str, float | None]:
    """The metrics object of events.jsonl."""
    problems = Problems()
    with problems.noted():
        trait = load_trait(command.trait, command.prompts)
    for name in ("adapter_config.json", "adapter_model.safetensors") if command.adapter is not None else ():
        with problems.noted():
            resolve(command.adapter / name, "adapter")
    with problems.noted():
        load_vignettes(command.eval.vignettes)
    with problems.noted():
        load_instrument(command.eval.instrument)
    problems.complain()
    from steer_heal import console
    from steer_heal.evals.metrics import Condition
    from steer_heal.lm import load
    from steer_heal.stages.bake import Student, attach_saved
    from steer_heal.stages.cfg import HealCfg
    from steer_heal.stages.evaluate import evaluate, load_items

    console.start(quiet=True)
    items = load_items(command.eval, trait)
    lm = load(command.model, device=command.device, dtype=command.dtype, max_prompt_tokens=command.max_prompt_tokens)
    read = lambda student, gate, base=None: evaluate(
        student, gate, Condition(command.system or trait.plain_system), items, trait, command.eval, command.filter, command.seed, base
    )
    if command.adapter is None:
        return read(Student(lm, HealCfg()), "base").metrics
    student = attach_saved(lm, resolve(command.adapter / "adapter_config.json", "adapter").parent)
    return read(student, "full", read(student, "base")).metrics


def main(argv: list[str] | None = None) -> int:
    try:
        command = tyro.cli(EvalCommand, args=argv, prog="python -m steer_heal.evals")
        metrics = measure(command)
    except (UserError, OSError, ValueError) as error:
        complain(error)
        return 2
    if command.json:
        print(json.dumps(metrics, allow_nan=False))
        return 0
    for name, value in metrics.items():
        if not name.endswith(("_lo", "_hi")):
            interval = "" if metrics.get(f"{name}_lo") is None else f"   against base {metrics[f'{name}_lo']:+.3f} to {metrics[f'{name}_hi']:+.3f}"
            print(f"{name:18} {'none' if value is None else format(value, '.4f')}{interval}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
