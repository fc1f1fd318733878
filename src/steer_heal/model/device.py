"""Where the model goes. Importing this is quick: torch, and not transformers."""

from __future__ import annotations

import torch

from steer_heal.errors import UserError


def pick_device(device: str) -> torch.device:
    """`auto` is the GPU where there is one; asking for a missing one is a UserError."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        raise UserError(f"device is {device!r}: it must be auto, cpu, cuda or cuda:N") from None
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device is {device!r}: {torch.cuda.device_count()} CUDA devices are visible; use --device cpu or auto"
        )
    return place
