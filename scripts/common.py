"""What the scripts share: flags from a function's parameters, and benchmarks that are recorded with their machine."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import tyro
from transformers import AutoModelForCausalLM, PreTrainedConfig

from steer_heal.diag import lab
from steer_heal.errors import UserError, print_error
from steer_heal.events import plain
from steer_heal.model.device import device_name
from steer_heal.model.lm import LM, load
from steer_heal.report import console
from steer_heal.runs.begin import git_commit, versions

BENCHMARKS = Path(__file__).resolve().parents[1] / "docs" / "evidence" / "benchmarks.jsonl"
Main = Callable[..., int | None]


def cli(main: Main | Mapping[str, Main], argv: Sequence[str] | None = None) -> int:
    """Runs the main function of a script with its parameters from the command line, or one of several by its name.
    Returns the exit status: what the function returns, or 2 for an error that the user can fix."""
    console.start(quiet=True)
    try:
        if isinstance(main, Mapping):
            return tyro.extras.subcommand_cli_from_dict(dict(main), args=argv) or 0
        return tyro.cli(main, args=argv, description=sys.modules[main.__module__].__doc__) or 0
    except (UserError, OSError, ValueError) as error:
        print_error(error)
        return 2


def show(
    question: str | None, rows: Sequence[Mapping[str, object]], should: Sequence[str], out: Path, name: str, **more: Any
) -> None:
    """Shows the table of a benchmark as `lab.show` does, and appends it to BENCHMARKS with the time, the commit, the
    machine and the versions of the packages. Runs with --tiny are not recorded."""
    lab.show(question, rows, should, out, name, **more)
    if "--tiny" in sys.argv:
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = {"t": datetime.now(UTC).isoformat(timespec="seconds"), "commit": git_commit()}
    where |= {"device": device_name(device), "n_threads": torch.get_num_threads(), "versions": versions()}
    line = {"benchmark": name, **where, "command": sys.argv, "rows": rows, **more}
    with BENCHMARKS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(plain(line)) + "\n")


def random_lm(
    config: PreTrainedConfig, seed: int, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> LM:
    """Random weights of any shape, with the tokenizer of the toy model."""
    torch.manual_seed(seed)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.name_or_path = "random"
    lm = load("tiny-random", device="cpu")
    return replace(lm, model=model.eval().requires_grad_(False), name="random", max_prompt_tokens=4096)


def seconds_of(work: Callable[[], object]) -> float:
    """Wall-clock seconds of a piece of work."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
