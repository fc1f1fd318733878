"""The files of a multimodal model's processor, which a merged model needs beside its tokenizer."""

from __future__ import annotations

import warnings
from contextlib import suppress
from pathlib import Path
from shutil import copyfile

from transformers.utils import AUDIO_TOKENIZER_NAME, FEATURE_EXTRACTOR_NAME, PROCESSOR_NAME, VIDEO_PROCESSOR_NAME
from transformers.utils.hub import cached_file

from steer_heal.inputs.files import adapter_base, adapter_folder
from steer_heal.model.gguf import PACKAGED
from steer_heal.model.lm import LM
from steer_heal.settings import TINY_RANDOM

PROCESSOR_FILES = (
    *(PROCESSOR_NAME, FEATURE_EXTRACTOR_NAME, VIDEO_PROCESSOR_NAME, AUDIO_TOKENIZER_NAME),
    "chat_template.json",  # of processors that were saved by an older transformers
)


def copy_processor(lm: LM, folder: Path) -> None:
    """Copies the processor's files of the base model, byte for byte, unless the folder has one of that name."""
    for name in PROCESSOR_FILES:
        source = _file_of_base(lm, name)
        if source is not None and not (folder / name).exists():
            copyfile(source, folder / name)


def _file_of_base(lm: LM, name: str) -> Path | None:
    """A file of the base model; None: it has none of that name. The hub is asked only for a multimodal model's."""
    base = lm.base
    while (adapter := adapter_folder(base)) is not None:
        base = adapter_base(adapter)
    if Path(base).exists():
        return path if (path := Path(base) / name).is_file() else None
    if base in (TINY_RANDOM, *PACKAGED) or lm.model.config.get_text_config() is lm.model.config:
        return None
    with suppress(OSError):  # it is in no cache, and the hub cannot be reached
        found = cached_file(base, name, _raise_exceptions_for_missing_entries=False)
        return None if found is None else Path(found)
    warnings.warn(f"{name} of {base} could not be fetched; copy it into the export if the model has one", stacklevel=4)
    return None
