"""What the scripts share: flags from a function's parameters, and benchmarks that are recorded with their machine."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
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
from steer_heal.records import Completion
from steer_heal.report import console

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "docs/evidence/benchmarks.jsonl"
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
    """Shows the table of a benchmark as `lab.show` does, and appends it to BENCHMARKS unless --tiny is given."""
    lab.show(question, rows, should, out, name, **more)
    if "--tiny" not in sys.argv:
        with BENCHMARKS.open("a", encoding="utf-8") as log:
            log.write(json.dumps(plain({"benchmark": name, **machine(), "rows": rows, **more})) + "\n")


def machine() -> dict[str, Any]:
    """The commit, the date, the command, and the machine."""
    return {
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "cpu": device_name(torch.device("cpu")),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def commit() -> str | None:
    """The commit of this checkout, with `-dirty` if there are uncommitted changes. None without git."""
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with suppress(OSError):
        return subprocess.run(describe, capture_output=True, text=True).stdout.strip() or None
    return None


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


def random_text(i: int, prompt_ids: tuple[int, ...], completion_ids: Sequence[int]) -> Completion:
    """A completion of random tokens: the i-th text, on one of eight prompts."""
    return Completion(
        prompt_index=i % 8,
        prompt="",
        prompt_ids=prompt_ids,
        completion_ids=tuple(completion_ids),
        text="",
        alpha=1.0,
        dose=1.0,
        seed=i,
    )


def seconds_of(work: Callable[[], object]) -> float:
    """Wall-clock seconds of a piece of work."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
