"""A benchmark table that also goes to docs/evidence/benchmarks.jsonl, with the machine and the commit."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from steer_heal.diag import lab
from steer_heal.runs.events import jsonable

ROOT = Path(__file__).resolve().parents[1]
LOG = ROOT / "docs/evidence/benchmarks.jsonl"


def show(
    question: str | None, rows: Sequence[Mapping[str, Any]], should: Sequence[str], out: Path, name: str, **extra: Any
) -> None:
    """Shows a table like `lab.show`, and appends its rows as one line to LOG. Runs with --tiny are not recorded."""
    lab.show(question, rows, should, out, name, **extra)
    if "--tiny" not in sys.argv:
        line, _ = jsonable({"benchmark": name, **machine(), "rows": list(rows), **extra})
        with LOG.open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")


def machine() -> dict[str, Any]:
    """The commit, the date, the command, and what it ran on."""
    return {
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "cpu": cpu_name(),
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


def cpu_name() -> str:
    """The processor's model name on Linux; elsewhere what Python knows."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
