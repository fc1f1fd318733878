"""What does TRL's self-distillation trainer put into the weights beside a heal, and at what cost?

SDFTTrainer (trl.experimental.sdft; Shenfeld et al. 2026) trains a LoRA on text that the student writes, towards the
model that also reads a privileged context: here the positive persona. Each arm trains in a process of its own, which
gives its seconds and its peak memory. Then all adapters are measured in this process. TRL needs the extra `peers`.
"""

import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import cli, show
from peft import LoraConfig

from steer_heal.bench import read_model
from steer_heal.diag.distil import ARMS, SHOWN, measured, trained
from steer_heal.diag.lab import Lab
from steer_heal.errors import UserError
from steer_heal.inputs import load_inputs
from steer_heal.loop import Loop, run_round
from steer_heal.model.student import attach_saved
from steer_heal.presets import PRESETS
from steer_heal.recipe import Recipe
from steer_heal.runs.stored import MemoryRun
from steer_heal.settings import RunConfig, changed

TRAINED = "trained.json"
GIB = 2**30


def by_heal(cfg: RunConfig, folder: Path, arm: str) -> dict[str, Any]:
    """One round of an arm of `diag distil`."""
    cfg = changed(cfg, ARMS[arm].settings)
    lab = Lab.of(cfg)
    loop = Loop(lab.bench, MemoryRun(), measures_teacher=False)
    began = time.perf_counter()
    run_round(loop, Recipe.of(cfg), 0)
    seconds = time.perf_counter() - began
    written, row = trained(loop.run, 0)
    folder.mkdir()
    lab.bench.student.save(folder, lab.bench.student.history())
    return {"seconds": seconds, "n_steps": row["n_steps"], "n_tokens": sum(len(c.completion_ids) for c in written)}


def by_trl(cfg: RunConfig, folder: Path, own: bool, max_steps: int = 0) -> dict[str, Any]:
    """SDFTTrainer with its `own` defaults, or with the rate, steps, texts and adapter of a heal."""
    sdft: Any = import_module("trl.experimental.sdft")
    inputs, lm = load_inputs(cfg), read_model(cfg)
    system = [{"role": "system", "content": inputs.trait.plain_system}] if inputs.trait.plain_system else []
    prompts = inputs.prompts[: cfg.filter.n_keep]
    rows = [
        {"prompt": [*system, {"role": "user", "content": text}], "privileged_context": inputs.trait.positive}
        for text in prompts
    ]
    n_steps = max_steps or cfg.heal.epochs * -(-len(prompts) // cfg.heal.batch_size)
    given: dict[str, Any] = {} if own else {"learning_rate": cfg.heal.lr, "lr_scheduler_type": "cosine"}
    if not own:
        given |= {"warmup_steps": n_steps // 10, "num_generations": 1, "max_steps": n_steps}
        given |= {"max_completion_length": cfg.gen.max_new_tokens, "per_device_train_batch_size": cfg.heal.batch_size}
        given |= {name: value for name in ("temperature", "top_p") if (value := getattr(cfg, name)) is not None}
    elif max_steps:
        given = {"max_steps": max_steps}
    args = sdft.SDFTConfig(
        output_dir=str(folder),
        report_to="none",
        save_strategy="no",
        seed=cfg.seed,
        use_cpu=not torch.cuda.is_available(),
        **given,
    )
    lora = LoraConfig(r=cfg.adapter.rank, lora_alpha=int(cfg.adapter.alpha), target_modules="all-linear")
    trainer = sdft.SDFTTrainer(
        model=lm.model,
        args=args,
        train_dataset=import_module("datasets").Dataset.from_list(rows),
        processing_class=lm.tokenizer,
        peft_config=LoraConfig(target_modules="all-linear") if own else lora,
    )
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    trainer.save_model(str(folder))
    state = trainer.state
    return {"seconds": seconds, "n_steps": state.global_step, "n_tokens": state.num_input_tokens_seen or None}


def in_child(work: partial[dict[str, Any]], folder: Path) -> None:
    row = work()
    row["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
    (folder.parent / TRAINED).write_text(json.dumps(row))


def apart(work: partial[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """What `work` returns and its peak memory, in a process of its own. UserError if that fails."""
    child = multiprocessing.get_context("spawn").Process(target=in_child, args=(work, folder))
    child.start()
    child.join()
    if child.exitcode:
        raise UserError(f"the arm ended with status {child.exitcode}: its error is above")
    return json.loads((folder.parent / TRAINED).read_text())


def main(
    preset: str = "smol-distil",
    trait: str = "love",
    seed: int = 41,
    arms: Sequence[str] = ("prompt", "contrast", "TRL", "TRL, its defaults"),
    max_steps: int = 0,
    out: Path = Path("out/diag"),
    tiny: bool = False,
) -> None:
    """
    Args:
        arms: Arms of diag distil, and TRL with the rate, texts, steps and adapter of the preset or with its defaults.
        max_steps: Optimiser steps of TRL. 0: those of the preset, or of its defaults.
        tiny: Do not record the benchmark.
    """
    if any(arm.startswith("TRL") for arm in arms) and not find_spec("trl"):
        raise UserError("TRL is not installed: pip install 'steer-heal[peers]', or leave its arms out")
    cfg = replace(PRESETS[preset][1], trait=trait, seed=seed)
    lab, rows = Lab.of(cfg), []
    untouched = lab.bench.student
    for arm in arms:
        with TemporaryDirectory() as parent:
            folder = Path(parent) / "adapter"
            if arm.startswith("TRL"):
                work = partial(by_trl, cfg, folder, own="defaults" in arm, max_steps=max_steps)
            else:
                work = partial(by_heal, cfg, folder, arm=arm)
            row = apart(work, folder)
            assert lab.base
            lab.bench.student = attach_saved(untouched.lm, folder)
            rows.append({"arm": arm, "seed": seed, **row, **measured(lab, lab.measure())})
            lab.bench.student.detach()
            lab.bench.student = untouched
    should = (
        "the heals move the pairs further per KL and per second than TRL at its defaults, or the page says why not.",
        "TRL with the heal's rate, texts and steps end near the arm prompt: they distil the same teacher.",
    )
    columns = ("arm", "seconds", "peak_gib", "n_steps", *SHOWN)
    shown = [{name: row.get(name) for name in columns} for row in rows]
    show(__doc__, shown, should, out, "peer", preset=preset, trait=trait, measured=rows)


if __name__ == "__main__":
    sys.exit(cli(main))
