"""A student in the files of other programs: transformers, PEFT and llama.cpp."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from steer_heal.errors import Problems, UserError
from steer_heal.inputs.files import adapter_folder
from steer_heal.runs.storage import atomic_folder
from steer_heal.settings import AdapterCfg, Form, Quantization

if TYPE_CHECKING:  # torch: seconds
    from steer_heal.model.student import Student

OF_ADAPTER = ("peft", "gguf-lora")
"""Formats that hold the adapter alone."""


def require_flags(form: Form, rank: int | None, quantization: Quantization | None) -> None:
    """UserError for a rank or a quantization that the format does not have. None: none was asked for."""
    problems = Problems()
    if rank is not None and form not in OF_ADAPTER:
        problems.found.append(
            f"rank is {rank}: format {form!r} has none; leave it out, or give {' or '.join(OF_ADAPTER)}"
        )
    if quantization is not None and form != "gguf":
        problems.found.append(
            f"quantization is {quantization!r}: format {form!r} has none; leave it out, or give --format gguf"
        )
    problems.raise_if_any()


def require_form(cfg: AdapterCfg, form: Form) -> None:
    """UserError for an adapter that the format cannot hold."""
    from steer_heal.model.student import ADAPTERS  # torch: seconds

    if not ADAPTERS[cfg.kind].updates_weights:
        raise UserError(
            f"format is {form!r}: it holds updates of weight matrices, and adapter.kind {cfg.kind!r} has none; share a "
            "checkpoint of the run as it is"
        )


def export(
    student: Student,
    folder: Path,
    form: Form = "hf",
    *,
    adapter_scale: float = 1.0,
    rank: int | None = None,
    quantization: Quantization | None = None,
    also: Callable[[Path, Sequence[str]], object] = lambda folder, changes: None,
) -> list[str]:
    """Writes the baked rounds to a new or empty folder. Returns a sentence for each thing in which they differ from the
    student that was measured. UserError for what the format cannot hold.

    Args:
        adapter_scale: Factor from -4 to 4 by which the effect of the rounds is multiplied.
        rank: Rank of the adapter, in place of its own.
        quantization: Of a merged GGUF. None: f16.
        also: Writes more into the folder, given these sentences, before it gets its name.
    """
    require_form(student.cfg, form)
    require_flags(form, rank, quantization)
    if form in OF_ADAPTER and adapter_folder(student.lm.name) is not None:
        raise UserError(
            f"format is {form!r}: the base of this run contains the adapter {student.lm.name!r}, which no published "
            "model does; give hf or gguf"
        )
    if form in OF_ADAPTER and not student.n_rounds:
        raise UserError(f"no round is baked, so there is no adapter for format {form!r}; heal one, or give hf or gguf")
    changes = []
    with ExitStack() as how:
        if adapter_scale != 1:
            changes.append(f"The effect of the adapter is multiplied by {adapter_scale:g}.")
        if rank is not None:
            lost = how.enter_context(student.of_rank(rank))
            changes.append(
                f"The adapter is cut to rank {rank}, which loses {lost.share:.2%} of the squared norm of its updates, "
                f"and at most {lost.most:.2%} of one matrix ({lost.where})."
            )
        if quantization not in (None, "f16"):
            changes.append(f"The weights are quantized to {quantization}.")
        how.enter_context(student.scaled(adapter_scale))

        def write(part: Path) -> None:
            _write(student, part, form, quantization or "f16")
            also(part, changes)

        write_folder(folder, write)
    return changes


def _write(student: Student, folder: Path, form: Form, quantization: Quantization) -> None:
    from steer_heal.model import to_gguf

    if form == "hf":
        student.export(folder)
    elif form == "peft":
        student.adapter.save(folder, student.n_rounds)
    elif form == "gguf-lora":
        alpha = student.cfg.alpha * student.n_rounds
        to_gguf.write_adapter(student.lm, student.history(), alpha, folder / "adapter.gguf")
    else:
        to_gguf.write_model(student.lm, student.merged_state(), folder / f"model-{quantization}.gguf", quantization)


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Writes a new or empty folder, which is whole or not there. UserError where it holds files."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"folder {str(folder)!r} is not empty; give a new one, or empty it")
    try:
        with atomic_folder(folder) as part:
            write(part)
    except OSError as error:
        raise UserError(f"folder {str(folder)!r} cannot be written ({error}); give another one") from None
