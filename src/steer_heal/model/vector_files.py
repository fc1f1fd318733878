"""Steering vectors of other tools: GGUF control vectors (repeng, llama.cpp) and objects of steering-vectors.

Like steer-heal, all of them count blocks from 0 and add a direction to the residual stream after a block.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from steer_heal.errors import UserError, nearest
from steer_heal.model.steering import METHODS, Vector, add
from steer_heal.model.to_gguf import finish

GGUF_ARCHITECTURE = "controlvector"
BLOCK_OUTPUT = "decoder_block"
_DIRECTION = re.compile(r"direction\.(\d+)")


def read_vector(path: str | Path) -> Vector:
    """Reads a file of `Vector.save` or a GGUF control vector, whichever the content is. UserError if it is neither."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(9)
        if start.startswith(b"GGUF"):
            return _checked(_read_gguf(path), path)
        if start[8:] == b"{":
            return _checked(Vector.load(path), path)
    except OSError as error:
        raise UserError(f"vector {str(path)!r} cannot be read ({error.strerror}); give an existing file") from None
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"vector {str(path)!r} cannot be read ({error}); give a file that Vector.save or write_gguf wrote"
        ) from None
    fix = "give safetensors of steer-heal or a GGUF control vector"
    if start.startswith((b"PK", b"\x80")):
        fix = "a pickle can run code, so it is not read; load it in Python and pass the object to from_steering_vectors"
    raise UserError(f"vector {str(path)!r} is neither safetensors nor GGUF; {fix}")


def _checked(vector: Vector, path: Path) -> Vector:
    sizes = {tuple(direction.shape) for direction in vector.directions.values()}
    if len(sizes) != 1 or len(next(iter(sizes))) != 1:
        raise UserError(
            f"vector {str(path)!r} has shapes {sorted(sizes)}: it must have one direction [d] for each block"
        )
    if vector.method not in METHODS:
        raise UserError(f"vector {str(path)!r} is of method {vector.method!r}: {nearest(vector.method, METHODS)}")
    return vector


def _read_gguf(path: Path) -> Vector:
    reader = gguf.GGUFReader(path)
    architecture = reader.get_field("general.architecture")
    if architecture is None or architecture.contents() != GGUF_ARCHITECTURE:
        raise UserError(
            f"vector {str(path)!r} is a GGUF file, but not a control vector; give one of repeng or llama.cpp"
        )
    found = {match[1]: each for each in reader.tensors if (match := _DIRECTION.fullmatch(each.name))}
    if quantized := [each.name for each in found.values() if each.tensor_type.name not in ("F32", "F16")]:
        raise UserError(f"vector {str(path)!r}: {quantized[0]} is quantized; write it in float32 or float16")
    arrays = {int(layer): np.array(found[layer].data, dtype=np.float32) for layer in sorted(found, key=int)}
    return Vector({layer: torch.from_numpy(array) for layer, array in arrays.items()})


def write_gguf(vector: Vector, path: str | Path, model_type: str) -> None:
    """Writes a GGUF control vector, as repeng does. `model_type` is the field of the model's config, such as "llama".

    UserError if the vector's method does not simply add it, and for block 0, for which llama.cpp takes no direction.
    """
    added = _added(vector)
    if 0 in added:
        raise UserError("the vector has a direction for block 0, and llama.cpp takes none there; steer other blocks")
    name = GGUF_ARCHITECTURE
    writer = gguf.GGUFWriter(path, name)
    writer.add_string(f"{name}.model_hint", model_type)
    writer.add_uint32(f"{name}.layer_count", len(added))
    for layer, direction in added.items():
        writer.add_tensor(f"direction.{layer}", direction.numpy())
    finish(writer)


def to_steering_vectors(vector: Vector) -> Any:
    """Converts a vector into a SteeringVector of the package steering-vectors, whose multiplier is our dose."""
    try:
        from steering_vectors import SteeringVector  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(f"steering-vectors cannot be imported ({error}); pip install steering-vectors") from None
    return SteeringVector(layer_activations=_added(vector), layer_type=BLOCK_OUTPUT)


def from_steering_vectors(other: Any) -> Vector:
    """Converts a SteeringVector into a vector. UserError if it does not act after whole blocks."""
    if (kind := getattr(other, "layer_type", None)) != BLOCK_OUTPUT:
        raise UserError(
            f"the steering vector has layer type {kind!r}: it must be a SteeringVector with {BLOCK_OUTPUT!r}"
        )
    activations: Mapping[int, Tensor] = other.layer_activations
    return Vector({layer: activations[layer].detach().float().cpu().flatten() for layer in sorted(activations)})


def _added(vector: Vector) -> dict[int, Tensor]:
    """Directions in float32 on the CPU. UserError if the vector's method does not add it at every position."""
    if METHODS[vector.method].apply is not add:
        raise UserError(
            f"the vector has method {vector.method!r}: this format supports only methods that add the direction, such "
            "as mean_diff and pca; use Vector.save"
        )
    return {layer: direction.float().cpu().contiguous() for layer, direction in sorted(vector.directions.items())}
