"""The device of the model. This module imports torch, but not transformers, which is slow to import."""

from __future__ import annotations

import platform
from contextlib import suppress
from pathlib import Path

import torch

from steer_heal.errors import UserError


def pick_device(device: str) -> torch.device:
    """The device that a setting names. `auto` is the GPU if there is one, otherwise the CPU. UserError for a missing
    one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        raise UserError(f"device is {device!r}: choose auto, cpu, cuda or cuda:N") from None
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device is {device!r}: {torch.cuda.device_count()} CUDA devices are visible; use --device cpu or auto"
        )
    return place


def device_name(place: torch.device) -> str:
    """The product name of the GPU or CPU, such as NVIDIA H100 80GB HBM3. If it is unknown, the type of the CPU."""
    if place.type == "cuda":
        return torch.cuda.get_device_name(place)
    with suppress(OSError, UnicodeDecodeError):  # only Linux has this file
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.machine() or "unknown processor"
