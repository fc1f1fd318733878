"""steer-heal export RUN DIR [--format FORMAT]: the student of a round for other programs."""

from __future__ import annotations

from collections.abc import Sequence
from os.path import lexists
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from steer_heal.check import why_unwritable
from steer_heal.errors import Problems, UserError, print_safe
from steer_heal.flags import parsed
from steer_heal.report import console
from steer_heal.runs.chosen import run_and_round
from steer_heal.settings import AdapterScale, AllowBroken, Count, Form, Quantization, RoundName, RunFolder, settings
from steer_heal.share.export import require_flags
from steer_heal.verdict import round_words


@settings("")
class Export:
    """Write the healed student of a run for other programs: merged or as an adapter, for transformers, PEFT, vLLM,
    llama.cpp and Ollama. docs/serve.md says how to load each format."""

    run: RunFolder
    """Folder of the run."""
    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """New folder for the files."""
    round: RoundName = "best"
    allow_broken: AllowBroken = False
    format: Form = "hf"
    """hf: the merged model, for transformers and vLLM. peft: the adapter, for PEFT and vLLM. gguf-lora: the adapter,
    for llama.cpp. gguf: the merged model, for llama.cpp and Ollama."""
    quantization: Quantization | None = None
    """Weight precision in the format gguf: float16 or 8-bit blocks. Default: f16."""
    rank: Count | None = None
    """Cut the adapter to this rank, and say what is lost. Default: the full rank (rank per round x number
    of rounds)."""
    adapter_scale: AdapterScale = 1.0
    """Multiply the effect of the adapter by this factor, from -4 to 4. 0: no effect; -1: the reverse."""


def main(argv: Sequence[str]) -> int:
    given, own = parsed(Export, argv, "export", ["device", "plugin"])
    problems = Problems()
    problems.attempt(_require_new, given.folder)
    problems.attempt(require_flags, given.format, given.rank, given.quantization)
    console.lines()
    chosen = problems.attempt(run_and_round, given.run, given.round, allow_broken=given.allow_broken)
    problems.raise_if_any()
    assert chosen is not None
    print_safe(round_words(*chosen))
    from steer_heal.runs.opened import settings_of, student_of  # torch: seconds
    from steer_heal.runs.stored import FolderRun
    from steer_heal.share.card import write_export_card
    from steer_heal.share.export import export, require_form

    run = FolderRun.read(given.run)
    cfg = settings_of(run, **own)
    require_form(run.start.config.adapter, given.format)
    _, r = chosen
    student = student_of(run, cfg, r)
    changes = export(
        student,
        given.folder,
        given.format,
        adapter_scale=given.adapter_scale,
        rank=given.rank,
        quantization=given.quantization,
        also=lambda folder, changes: write_export_card(run, r, folder, given.format, changes),
    )
    for sentence in changes:
        print_safe(sentence)
    for path in sorted(given.folder.iterdir()):
        print_safe(f"{path}: {tqdm.format_sizeof(path.stat().st_size, 'B')}")
    return 0


def _require_new(folder: Path) -> None:
    """UserError unless the folder can be made."""
    why = "it exists already" if lexists(folder) else why_unwritable(folder)
    if why:
        raise UserError(f"DIR is {str(folder)!r}: {why}; give a new one")
